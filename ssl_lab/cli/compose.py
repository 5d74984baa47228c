"""From a verb and its overrides to a resolved, checked configuration, and from a node of it to an object."""

import importlib
import re
from pathlib import Path
from typing import Any

import hydra
from hydra import initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf, open_dict

from ssl_lab.cli import catalog, check, overrides, saved
from ssl_lab.cli.duration import steps_of
from ssl_lab.cli.mistakes import COMPOSING, explain, explain_build
from ssl_lab.errors import UserError

__all__ = ["build", "compose", "perform", "steps_of"]

SETTINGS = ["hydra.output_subdir=null", "hydra/job_logging=none", "hydra/hydra_logging=none"]

OmegaConf.register_new_resolver(  # the first of its arguments that is not empty
    "either", lambda *options: next((o for o in options if o not in (None, "")), None), replace=True
)


def compose(verb: str, typed: list[str], folders: list[Path]) -> DictConfig:
    """The configuration of one run: complete, resolved, every key and value checked, without Hydra's own part.

    Args:
        verb: names the root file.
        typed: overrides as on the command line.
        folders: `conf/`, then the user's own.

    Raises:
        UserError: any mistake in `typed` or in a YAML file.
    """
    return assemble(verb, list(settled(verb, typed, folders).values()), folders)


def settled(verb: str, typed: list[str], folders: list[Path]) -> dict[str, str]:
    """Each of `typed` -> the same as Hydra takes it, choices in groups before values; see `overrides`."""
    if not (folders[0] / f"{verb}.yaml").is_file():
        raise UserError(f"{verb} has no configuration: {folders[0] / verb}.yaml is missing")
    root = catalog.root(verb)
    words = overrides.read(typed, root, folders)
    mounted = [w for w in words.choices if w.package is not None or w.key_or_group not in root.groups]
    taken = {w: w for w in words.settings} | {
        str(w.input_line): str(w.input_line) for w in words.choices if w not in mounted
    }
    try:
        base = compose_raw(verb, list(taken.values()), folders)
    except UserError:
        overrides.check_names(words, root)  # `methd=mae` explains why there is no method
        raise
    if mounted:
        places = list(base.hydra.runtime.choices)
        taken |= {str(w.input_line): overrides.mount(w, places) for w in mounted}
        base = compose_raw(verb, list(taken.values()), folders)
    return taken | {str(w.input_line): overrides.settle(w, base, root, folders) for w in words.values}


def assemble(verb: str, words: list[str], folders: list[Path], swept: dict[str, str] | None = None) -> DictConfig:
    """Compose what `settled` gave, check and resolve it; see `finish` for `swept`."""
    cfg = compose_raw(verb, words, folders)
    HydraConfig.instance().set_config(cfg)  # for ${hydra:...} only: Lightning must not believe that Hydra runs
    try:
        with open_dict(cfg):
            del cfg["hydra"]
        return finish(verb, cfg, folders, swept or {})
    finally:
        HydraConfig.instance().cfg = None


def compose_raw(verb: str, words: list[str], folders: list[Path]) -> DictConfig:
    """What Hydra makes of it, unresolved, with its own part under `hydra`."""
    with session(folders):
        try:
            return hydra.compose(verb, [*SETTINGS, *search_path(folders), *words], return_hydra_config=True)
        except COMPOSING as error:
            raise explain(error) from None


def session(folders: list[Path]) -> initialize_config_dir:
    """A context in which Hydra is initialised on `conf/`."""
    return initialize_config_dir(str(folders[0]), job_name="ssl_lab", version_base="1.3")


def search_path(folders: list[Path]) -> list[str]:
    """The override that adds the user's folders."""
    return [f"hydra.searchpath=[{','.join(repr(f'file://{folder}') for folder in folders[1:])}]"]


def finish(verb: str, cfg: DictConfig, folders: list[Path], swept: dict[str, str]) -> DictConfig:
    """Check and resolve a composed configuration in place; `hydra:` interpolations must be live.

    The values of `swept` tell the runs of a sweep apart: they are added to `name`, if the verb has one.
    """
    root = catalog.root(verb)
    if verb == "evaluate":  # settings without a choice are for the evaluators of its run
        saved.lend(cfg)
    else:
        check.drop_unchosen(cfg, folders)
    check.check_root(cfg, root)
    if absent := check.missing(cfg):
        told = f" ({comment})" if (comment := root.comments.get(absent[0])) else ""
        raise UserError(f"{absent[0]} is not given: write {absent[0]}=...{told}")
    check.check_references(cfg)
    if swept and "name" in cfg:
        suffix = ",".join(f"{key}={value}" for key, value in swept.items())
        cfg.name = re.sub(r"[^\w.=,+-]", "_", f"{cfg.name}-{suffix}")
    OmegaConf.resolve(cfg)
    check.check_values(cfg, root)
    return cfg


def perform(verb: str, cfg: DictConfig) -> Any:
    """Run a verb's body, `ssl_lab.cli.<verb>.run(cfg)`; what its YAML did wrong becomes a `UserError`."""
    body = importlib.import_module(f"ssl_lab.cli.{verb}")
    try:
        return body.run(cfg)
    except InstantiationException as error:
        raise explain_build(error, cfg) or error from error.__cause__


def build(node: Any, **parts: Any) -> Any:
    """The object that a node with `_target_` describes; `parts` are further arguments.

    Lists and dicts arrive as plain Python: no DictConfig leaves the command line.
    """
    if parts:  # instances are handed over as they are, never read as configuration
        partial = hydra.utils.instantiate(node, _convert_="all", _partial_=True)
        return partial(**parts)
    return hydra.utils.instantiate(node, _convert_="all")
