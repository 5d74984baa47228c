"""Is a composed configuration fit to run? Every key and value is held against the root file and the constructors."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from ssl_lab.cli import catalog
from ssl_lab.cli.catalog import Root
from ssl_lab.cli.duration import parse_duration
from ssl_lab.cli.kinds import kind_of, misfit
from ssl_lab.cli.nearest import did_you_mean
from ssl_lab.cli.signature import Signature, exists, signature_of
from ssl_lab.errors import UserError

OURS = "ssl_lab."


def check_root(cfg: DictConfig, root: Root) -> None:
    """Every top-level key is a key or a group of the verb's root file, and no needed group was removed.

    Keys that concern training alone may come with an experiment; other verbs drop them.
    """
    for key in list(cfg):
        if key not in root.names and key in catalog.root("train").keys:
            with open_dict(cfg):
                del cfg[key]
        elif key not in root.names:
            raise UserError(f"{key} is not a key of this configuration; {did_you_mean(str(key), root.names)}")
    for group, default in root.groups.items():
        if default == "???" and group not in cfg:
            raise UserError(f"{group} is missing: choose one with {group}=NAME")


def drop_unchosen(cfg: DictConfig, folders: list[Path]) -> None:
    """Take out what an experiment sets of evaluators and loggers that are not chosen, as with `eval=[]`."""
    for group in (name for name in ("eval", "logger") if name in cfg):
        for name in [name for name, node in cfg[group].items() if "_target_" not in node]:
            if name not in (known := catalog.choices(group, folders)):
                raise UserError(f"{group}.{name} is set, but nothing is called so; {did_you_mean(str(name), known)}")
            with open_dict(cfg):
                del cfg[group][name]


def check_values(cfg: DictConfig, root: Root) -> None:
    """Values of top-level keys have the type of their default.

    A number where a text stands becomes one, and one value where a list stands becomes a list.
    """
    for key, default in root.keys.items():
        value = cfg[key]
        if isinstance(default, str) and isinstance(value, int | float) and not isinstance(value, bool):
            cfg[key] = str(value)
        elif isinstance(default, list) and not isinstance(value, ListConfig):
            cfg[key] = [] if value is None else [value]
        elif (wanted := misfit(value, kind_of(default))) is not None and not isinstance(default, dict):
            raise UserError(f"{key}={_shown(value)}: {wanted}{_sweep_hint(value)}")
    if "duration" in cfg:
        parse_duration(cfg.duration)
        for key in ("max_steps", "max_epochs"):
            if cfg.trainer.get(key) is not None:
                raise UserError(f"trainer.{key} would not be used: write duration=... with a number of epochs or steps")
        if cfg.trainer.get("max_time") is not None:
            raise UserError(
                "trainer.max_time would end every part of the run before its end: write duration=..., or end it with a "
                "signal (timeout 3600 ssl-lab ...), after which the same command goes on"
            )
    check_targets(cfg)


def check_targets(cfg: DictConfig) -> None:
    """Every key beside a `_target_` is one of its arguments, and every plain value has the type it asks for."""
    for path, node in targets(cfg):
        target = str(node["_target_"])
        if target.startswith(OURS) and not exists(target):
            raise UserError(f"{path}._target_={target}: there is no such class or function")
        signature = signature_of(target)
        if signature is None:
            continue
        for key in arguments_in(node):
            if key not in signature.arguments and not signature.open:
                hint = did_you_mean(key, signature.arguments)
                raise UserError(f"{path}.{key}: {target.rpartition('.')[2]} has no such argument; {hint}")
            _check_value(f"{path}.{key}", node, key, signature)


def targets(node: Any, path: str = "") -> Iterator[tuple[str, DictConfig]]:
    """Every node with a `_target_` below `node`, with its dotted path, outermost first."""
    if (
        not isinstance(node, DictConfig | ListConfig)
        or node._is_none()
        or node._is_missing()
        or node._is_interpolation()
    ):
        return
    if isinstance(node, DictConfig):
        if "_target_" in node:
            yield path, node
        items: list[tuple[Any, Any]] = [(key, node._get_node(key)) for key in node]
    else:
        items = [(index, node._get_node(index)) for index in range(len(node))]
    for key, child in items:
        yield from targets(child, _join(path, key))


def missing(node: Any, path: str = "") -> list[str]:
    """Dotted paths of every `???` below `node`."""
    if not isinstance(node, DictConfig) or node._is_none() or node._is_missing() or node._is_interpolation():
        return []
    paths = {key: _join(path, key) for key in node}
    absent = [where for key, where in paths.items() if OmegaConf.is_missing(node, key)]
    return absent + [m for key, where in paths.items() for m in missing(node._get_node(key), where)]


def check_references(node: Any, path: str = "") -> None:
    """Every `${...}` below `node` leads to a value."""
    keys: Any = node if isinstance(node, DictConfig) else range(len(node))
    for key in keys:
        child: Any = node._get_node(key)
        where = _join(path, key)
        if child._is_interpolation():
            try:
                node[key]
            except OmegaConfBaseException as error:
                lost = re.search(r"key '([^']+)' not found", str(error))
                reason = f"there is no {lost[1]} here" if lost else str(error).splitlines()[0]
                raise UserError(f"{where}={child._value()} cannot be worked out: {reason}") from None
        elif isinstance(child, DictConfig | ListConfig) and not child._is_none() and not child._is_missing():
            check_references(child, where)


def arguments_in(node: DictConfig) -> list[str]:
    """Keys of a node that are handed to its target."""
    return [str(key) for key in node if not str(key).startswith("_")]


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def _check_value(path: str, node: DictConfig, key: str, signature: Signature) -> None:
    value = node[key]
    if key not in signature.arguments or (isinstance(value, DictConfig) and "_target_" in value):
        return
    if (wanted := misfit(value, signature.arguments[key])) is not None:
        raise UserError(f"{path}={_shown(value)}: {wanted}{_sweep_hint(value)}")


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)


def _sweep_hint(value: Any) -> str:
    return "; for one run each write the values without brackets and add -m" if isinstance(value, ListConfig) else ""
