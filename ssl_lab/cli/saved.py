"""The saved configuration of a run, read as data: it may come from anywhere, so nothing in it is trusted."""

import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from ssl_lab.errors import UserError

ALLOWED = ("ssl_lab", "torch", "lightning", "timm", "torchvision")
_PLAIN = ("datetime.timedelta",)  # how long the processes of strategy=ddp wait for one another
_LARGEST = 1 << 20  # bytes; ours have a few thousand


def run_folder(path: Path) -> Path | None:
    """The run folder (the one with a config.yaml) that is `path` or holds it, None if there is none."""
    return next((f for f in (path, *path.parents[:2]) if (f / "config.yaml").is_file()), None)


def load_config(folder: Path, trust: Sequence[str] = ()) -> dict[str, Any]:
    """`config.yaml` of a run folder as plain data.

    Args:
        folder: with a config.yaml, written with all interpolations resolved.
        trust: further packages that a `_target_` may name, for methods of one's own.

    Raises:
        UserError: not readable as plain YAML, or a `_target_` outside the allowed packages.
    """
    path = folder / "config.yaml"
    if path.stat().st_size > _LARGEST:
        raise UserError(f"{path} has {path.stat().st_size} bytes: no configuration of a run; evaluate another folder")
    text = path.read_text()
    try:
        aliases = any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text))
        config = None if aliases else yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not plain YAML: {str(error).splitlines()[0]}; restore it from the run") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} is no mapping without aliases, so no run wrote it; evaluate another folder")
    check_targets(config, str(path), trust)
    return config


def lend(cfg: DictConfig) -> None:
    """Give data that were chosen for the evaluation of a run what belongs to that run: its views and its tokenizer.

    A tokenizer that was named stays; one that would be trained on the other data gives way.

    Raises:
        UserError: see `load_config`.
    """
    if cfg.get("ckpt") is None or cfg.get("method") is not None or "_target_" not in (cfg.get("data") or {}):
        return
    folder = run_folder(Path(str(cfg.ckpt)))
    if folder is None:
        return
    if "views" not in cfg.data:
        views = (load_config(folder, cfg.trust).get("data") or {}).get("views")
        OmegaConf.update(cfg, "data.views", views, force_add=True)
    if isinstance(cfg.data.get("tokenizer"), DictConfig) and (folder / "tokenizer.json").is_file():
        OmegaConf.update(cfg, "data.tokenizer", str(folder), merge=False)


def own_tokenizer(data: Any, folder: Path) -> Any:
    """The `data` saved by the run in `folder`, with the tokenizer that it wrote there wherever they name theirs.

    One that is trained on a text would be another one once the text has changed.
    """
    if not (folder / "tokenizer.json").is_file():
        return data
    named = data.get("tokenizer")

    def lent(node: Any) -> Any:
        if isinstance(node, list):
            return [lent(value) for value in node]
        if not isinstance(node, dict):
            return node
        return {k: str(folder) if k == "tokenizer" and v and v == named else lent(v) for k, v in node.items()}

    return lent(data)


def without_downloads(config: Any) -> Any:
    """The same configuration without starting weights, for networks that a checkpoint fills or that stay random.

    Only a text under `weights` or `head_weights` names a start: a loss may have weights too.
    """
    if isinstance(config, list):
        return [without_downloads(value) for value in config]
    if not isinstance(config, dict):
        return config
    plain = {key: without_downloads(value) for key, value in config.items()}
    plain |= {key: None for key in ("weights", "head_weights") if isinstance(config.get(key), str)}
    return plain | ({"pretrained": False} if config.get("pretrained") is True else {})


def check_targets(config: Any, source: str, trust: Sequence[str] = ()) -> None:
    """Every `_target_` must be a class of an allowed package, or a function of ssl_lab itself.

    The prefix of the name alone proves little (`ssl_lab.x.os.system` has a good one): the object that it leads to is
    asked for its own module too.

    Raises:
        UserError: naming the key and the target.
    """
    packages = (*ALLOWED, *trust)
    for key, target in _targets(config):
        if target in _PLAIN:
            continue
        if not _inside(target, packages):
            raise UserError(
                f"{source}: {key} = {target!r} is outside {', '.join(packages)}: refused, since it would be run; "
                f"for a package of your own add trust=[{str(target).split('.')[0]}]"
            )
        try:
            found = get_object(target)
        except Exception:
            raise UserError(f"{source}: {key} = {target!r} does not exist in this version of ssl_lab") from None
        home = inspect.getmodule(found)
        ours = home is not None and _inside(f"{home.__name__}.", ("ssl_lab", *trust))
        if not ours and not (inspect.isclass(found) and _inside(f"{found.__module__}.", packages)):
            raise UserError(f"{source}: {key} = {target!r} is no class of {', '.join(packages)}: refused")


def _inside(name: Any, packages: Sequence[str]) -> bool:
    return isinstance(name, str) and any(name.startswith(f"{package}.") for package in packages)


def _targets(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for name, value in items:
        here = f"{key}.{name}" if key else str(name)
        if name == "_target_":
            yield here, value
        yield from _targets(value, here)
