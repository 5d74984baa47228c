"""What the configuration folders hold, read as text: quick enough for `--help`, and no Hydra needed."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

import ssl_lab
from ssl_lab.errors import UserError

FIELDS = ("method", "data", "hardware", "time", "result")  # of an experiment's head comment


@dataclass(frozen=True)
class Root:
    """A verb's root file: its groups with their default choice, its own keys with default, comments by dotted key."""

    groups: dict[str, Any]
    keys: dict[str, Any]
    comments: dict[str, str]

    @property
    def names(self) -> list[str]:
        """All that a person may set at the top level."""
        return [name for name in dict.fromkeys([*self.groups, *self.keys]) if name != "local"]


@dataclass(frozen=True)
class Experiment:
    """The head comment of one experiment: a sentence, then `# field: ... | field: ...`."""

    name: str
    summary: str
    fields: dict[str, str]


def conf_folder() -> Path:
    """`conf/` of an installed wheel (inside the package) or of a checkout (beside it)."""
    package = Path(ssl_lab.__file__).parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "train.yaml").is_file():
            return folder
    raise UserError(f"conf/ is neither in {package} nor beside it: install ssl-lab again")


def choices(group: str, folders: list[Path]) -> list[str]:
    """Names that can be chosen in a group, from every folder."""
    found = {f.relative_to(base / group).with_suffix("") for base in folders for f in (base / group).rglob("*.yaml")}
    return sorted(name.as_posix() for name in found)


def groups(folders: list[Path]) -> list[str]:
    """Names of all groups that have a choice."""
    found = {path.name for base in folders for path in base.iterdir() if path.is_dir()}
    return sorted(name for name in found if choices(name, folders))


def mounts(group: str, folders: list[Path]) -> bool:
    """Choices of this group become a node of its name, not parts of the whole (`# @package` elsewhere)."""
    files = [file for base in folders for file in (base / group).rglob("*.yaml")]
    return any(not file.read_text().startswith("# @package") for file in files)


@cache
def root(verb: str) -> Root:
    """The root file of a verb, together with the root files that its defaults list includes."""
    text = (conf_folder() / f"{verb}.yaml").read_text()
    keys = yaml.safe_load(text) or {}
    found: dict[str, Any] = {}
    comments: dict[str, str] = {}
    for entry in keys.pop("defaults", []):
        if isinstance(entry, str) and entry != "_self_":
            base = root(entry)
            found, keys, comments = found | base.groups, base.keys | keys, comments | base.comments
        elif isinstance(entry, dict):
            found.update({name.split()[-1]: choice for name, choice in entry.items()})  # "optional x", "override x"
    parent = ""
    for line in text.splitlines():
        key, colon, rest = line.partition(":")
        if colon and key in keys:
            parent = key
        elif parent and key.startswith(" "):
            key = f"{parent}.{key.strip()}"
        else:
            continue
        if " # " in rest:
            comments[key] = rest.partition(" # ")[2].strip()
    keys.pop("hydra", None)
    return Root(found, keys, comments)


def head(file: Path) -> list[str]:
    """Lines of the comment that a YAML file begins with, without the package line."""
    lines = []
    for line in file.read_text().splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            lines.append(line.lstrip("#").strip())
    return [line for line in lines if line]


def experiments(folders: list[Path]) -> list[Experiment]:
    """Every experiment with what its head comment says."""
    found = []
    for name in choices("experiment", folders):
        file = next(f for base in folders if (f := base / "experiment" / f"{name}.yaml").is_file())
        summary, *rest = head(file) or ["(no description)"]
        fields = {}
        for part in " | ".join(rest).split(" | "):
            field, colon, text = part.partition(":")
            if colon and field.strip() in FIELDS:
                fields[field.strip()] = text.strip()
        found.append(Experiment(name, summary, fields))
    return found
