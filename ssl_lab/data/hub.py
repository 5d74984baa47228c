"""Data sets of the Hugging Face hub, named owner/name or owner/name:configuration."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from ssl_lab.errors import UserError

if TYPE_CHECKING:
    import datasets

_NAME = re.compile(r"\w[\w.-]*/[\w.-]+(:[\w.-]+)?")
_FILES = (".parquet", ".jsonl", ".json", ".csv", ".tsv", ".txt")  # a path that does not exist, but no name


def on_hub(path: str) -> bool:
    """Whether `path`, where nothing is, may be the name of a data set: `photos/cats` is none if there is `photos`."""
    local = Path(path).expanduser()
    return bool(_NAME.fullmatch(path)) and local.suffix not in _FILES and not local.parent.exists()


def from_hub(path: str, split: str | None) -> "datasets.Dataset":
    """The rows of a split, which may be a slice such as `train[:90%]`; `split=None` takes those of all splits.

    Raises:
        UserError: the hub, or the copy of it on this machine, does not give them.
    """
    import datasets

    name, _, configuration = path.partition(":")
    try:
        found = datasets.load_dataset(name, configuration or None, split=split)
        return datasets.concatenate_datasets(list(found.values())) if split is None else found
    except Exception as error:  # its own errors, those of the network, those of the file system
        line = (str(error).strip().splitlines() or [""])[0] or type(error).__name__
        reason = f"and the Hugging Face hub does not give it: {line}"
        offline = "without a network, set data.path to a local file or folder"
        raise UserError(f"{path!r} is no local file or folder, {reason} ({offline})") from error
