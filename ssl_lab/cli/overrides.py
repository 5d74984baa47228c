"""What was typed, read before Hydra composes it: choices that do not exist, keys that nothing has.

Three things are easier here than in plain Hydra. A constructor argument that no YAML mentions needs no `+`. A group
that is mounted in one place needs no `@`: `backbone=vit_s16` is `backbone@method.encoder=vit_s16` for a method with one
backbone. And every mistake names the nearest valid name.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig

from ssl_lab.cli import catalog
from ssl_lab.cli.catalog import Root
from ssl_lab.cli.check import arguments_in, targets
from ssl_lab.cli.nearest import did_you_mean, nearest
from ssl_lab.cli.signature import signature_of
from ssl_lab.errors import UserError

OTHER_NAMES = {  # of other tools -> ours
    "model": "method (or backbone)",
    "dataset": "data",
    "epochs": "duration=10epochs",
    "max_epochs": "duration=10epochs",
    "steps": "duration=1000steps",
    "max_steps": "duration=1000steps",
    "gpus": "trainer.devices",
    "resume": "ckpt",
    "checkpoint": "ckpt",
    "output_dir": "out",
}
OTHER_CHOICES = {  # of other tools -> ours
    "strategy=deepspeed": "strategy=fsdp2, which divides weights, gradients and optimizer state as ZeRO stage 3 does",
    "strategy=fsdp": "strategy=fsdp2",
}
TEXTS = ("prompt", "system")  # keys whose values are sentences: taken as they are typed


@dataclass(frozen=True)
class Words:
    """The typed overrides, parted: `hydra.*` settings, choices in groups, and values of keys."""

    settings: list[str]
    choices: list[Override]
    values: list[Override]


def read(overrides: list[str], root: Root, folders: list[Path]) -> Words:
    """Parse every override; a `UserError` names the first that cannot be read or chooses what does not exist."""
    groups = {*catalog.groups(folders), *root.groups}
    words = Words([], [], [])
    for text in overrides:
        word = parse(text, folders)
        if word.is_sweep_override():
            raise UserError(
                f"{text}: several values; add -m for one run each, or write [{text.partition('=')[2]}] for a list"
            )
        if word.key_or_group.startswith(("hydra.", "hydra/")):
            words.settings.append(text)
        elif word.key_or_group in groups:
            _check_choice(word, root, folders)
            words.choices.append(word)
        else:
            words.values.append(word)
    return words


def parse(text: str, folders: list[Path]) -> Override:
    """One override in Hydra's grammar."""
    key, equals, value = text.partition("=")
    if not equals and not text.startswith("~"):
        named = nearest(text, catalog.choices("experiment", folders), 1)
        meant = f"ckpt={text}" if Path(text).exists() else f"experiment={named[0]}" if named else ""
        hint = f"; did you mean {meant}?" if meant else ""
        raise UserError(f"'{text}' has no value: write key=value, without spaces around ={hint}")
    if not key.strip("+~") or key != key.strip() or value != value.lstrip():
        raise UserError(f"'{text}': write key=value, without spaces around =")
    if key in TEXTS:
        text = f"{key}={_quoted(key, value)}"
    elif value.lstrip("\"'").startswith("~/"):  # a shell leaves it alone behind most keys
        text = f"{key}={value.replace('~', os.path.expanduser('~'), 1)}"
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException:
        quoted = value.replace('"', '\\"')
        raise UserError(
            f"{text}: cannot read the value; if it is a text, quote it twice: '{key}=\"{quoted}\"'"
        ) from None


def _quoted(key: str, value: str) -> str:
    """A sentence in Hydra's quotes, where backslashes count only before a quote."""
    if "${" in value:
        raise UserError(f"{key}: ${{ would be read as a reference to another key; write $ {{ apart")
    return '"' + re.sub(r'(\\*)("|$)', lambda m: m[1] * 2 + m[2].replace('"', '\\"'), value) + '"'


def _check_choice(word: Override, root: Root, folders: list[Path]) -> None:
    group, options = word.key_or_group, catalog.choices(word.key_or_group, folders)
    if word.is_add() and group in root.groups:
        raise UserError(f"{word.input_line}: {group} is already there to be chosen, leave out the +")
    empty = word.type == OverrideType.DEL or word.value() is None
    default = root.groups.get(group)
    if empty and isinstance(default, str) and group not in root.keys and word.package is None:
        raise UserError(f"{group} cannot be empty; {did_you_mean('', options)}")
    for name in [] if empty else _chosen(word):
        if name not in options:
            ours = OTHER_CHOICES.get(f"{group}={name}")
            hint = did_you_mean(name, options) if ours is None else f"here it is {ours}"
            raise UserError(f"{group}={name} does not exist; {hint}")


def _chosen(word: Override) -> list[str]:
    value = list(word.sweep_iterator()) if word.is_sweep_override() else word.value()
    flat: list[str] = []
    for item in value if isinstance(value, list) else [value]:
        flat.extend(str(part).strip("'\"") for part in (item if isinstance(item, list) else [item]))
    return flat


def check_names(words: Words, root: Root) -> None:
    """A `UserError` for the first key whose beginning is nearly, but not quite, a name of the root file."""
    for word in words.values:
        name = word.key_or_group.partition(".")[0]
        if name not in root.names and (meant := nearest(name, root.names)):
            raise UserError(f"there is no {name} in this configuration; did you mean {' or '.join(meant)}?")


def mount(word: Override, places: list[str]) -> str:
    """The override with the place its group is mounted at, given the places of this configuration (`group[@path]`)."""
    group = word.key_or_group
    fitting = [place for place in places if place.partition("@")[0] == group]
    asked = word.get_key_element().lstrip("+~")
    if asked in fitting or word.is_add():
        return str(word.input_line)
    if len(fitting) == 1 and word.package is None:
        return _replaced(word, fitting[0])
    if not fitting:
        raise UserError(f"{word.input_line}: nothing in this configuration takes a choice of {group}")
    value = word.get_value_element_as_str()
    raise UserError(f"{asked}={value}: write {' or '.join(f'{place}={value}' for place in fitting)}")


def settle(word: Override, base: DictConfig, root: Root, folders: list[Path]) -> str:
    """The override of a value as Hydra takes it, given the configuration without any values typed."""
    key, text = word.key_or_group, str(word.input_line)
    node, rest = _deepest(base, key)
    if word.type != OverrideType.CHANGE:
        return text
    if not rest:
        mounted = [p for p in base.hydra.runtime.choices if "@" in p and p.partition("@")[2] == key]
        if mounted and isinstance(node, DictConfig) and isinstance(word.value(), str):
            raise UserError(f"{text}: {key} is chosen from a group, write {mounted[0]}={word.value()}")
        return text
    if isinstance(node, DictConfig) and len(rest) == 1 and "_target_" in node:
        signature = signature_of(str(node["_target_"]))
        if signature is None or signature.open or rest[0] in signature.arguments:
            return f"++{text}"
    group = key.partition(".")[0]
    if node is base and root.groups.get(group, "") is None and catalog.mounts(group, folders):
        return f"++{text}"  # laid over what a checkpoint brings
    raise UserError(_unknown(word, node, rest, base, root, folders))


def _unknown(word: Override, node: Any, rest: list[str], base: DictConfig, root: Root, folders: list[Path]) -> str:
    key, last = word.key_or_group, word.key_or_group.rpartition(".")[2]
    within = key[: len(key) - len(".".join(rest))].rstrip(".")
    told = f"there is no {key} in this configuration"
    if within in root.groups and rest[0] in catalog.choices(within, folders):
        listed = isinstance(root.groups[within], list)
        return f"{told}: {within}={'[...,' if listed else ''}{rest[0]}{']' if listed else ''} was not chosen"
    known = _all_keys(base)
    same = [k for k in known if k.rpartition(".")[2] == last]
    if same and not within:
        return f"{told}; did you mean {' or '.join(sorted(same, key=lambda k: (k.count('.'), k))[:3])}?"
    if not within and last in OTHER_NAMES:
        return f"{told}; here it is {OTHER_NAMES[last]}"
    if within:
        siblings = [k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == within]
        if close := [f"{within}.{name}" for name in nearest(rest[0], siblings)] or same[:3]:
            return f"{told}; did you mean {' or '.join(close)}?"
        return f"{told}; {within}: {did_you_mean('', siblings)}"
    names = nearest(last, root.names) or nearest(key, known)
    if not names:
        ends = nearest(last, [k.rpartition(".")[2] for k in known], 1)
        names = [k for k in known if k.rpartition(".")[2] in ends][:3]
    hint = f"did you mean {' or '.join(names)}?" if names else "all keys: add --cfg job to the command"
    return f"{told}; {hint}"


def _deepest(base: DictConfig, key: str) -> tuple[Any, list[str]]:
    """The deepest node on the way to `key`, and what is left of the key."""
    node: Any = base
    parts = key.split(".")
    for done, part in enumerate(parts):
        if not isinstance(node, DictConfig):
            return node, [] if node is not None else parts[done:]
        if part not in node.keys():  # noqa: SIM118 (`in node` is false for missing values)
            return node, parts[done:]
        node = node._get_node(part)
    return node, []


def _all_keys(base: DictConfig) -> list[str]:
    """Dotted paths of every key, and of every constructor argument that no YAML mentions."""
    keys = [key for key in base if key != "hydra"]
    paths = [str(key) for key in keys]
    for path, node in targets(base):
        if not path.startswith("hydra"):
            signature = signature_of(str(node["_target_"]))
            names = [*arguments_in(node), *(signature.arguments if signature else [])]
            paths.extend(f"{path}.{name}" for name in dict.fromkeys(names))
    return paths


def _replaced(word: Override, key: str) -> str:
    """The override with another key."""
    return key + str(word.input_line)[str(word.input_line).index("=") :]
