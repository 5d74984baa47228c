"""What lies in a folder: files of a medium, classes, splits. Names only; nothing is opened."""

import difflib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from ssl_lab.data.medium import IMAGES, Medium
from ssl_lab.errors import UserError

HELD_OUT = ("test", "val", "valid", "validation", "dev")

T = TypeVar("T")


def choose(splits: dict[str, T], wanted: str) -> tuple[T, bool]:
    """What serves as split `wanted`, and whether it is the only one and has to be divided.

    `splits` has keys among train, test, val, valid, validation, dev and "" (no split is named; where others
    are named as held out, it is what to train on).
    """
    if wanted not in ("train", *HELD_OUT):
        raise UserError(f"no split {wanted!r}: a local set has train and one of {', '.join(HELD_OUT)}")
    held_out = next((x for x in (wanted, *HELD_OUT) if x != "train" and x in splits), None)
    train = "train" if "train" in splits else ""
    if train in splits and held_out:
        return splits[train if wanted == "train" else held_out], False
    return splits[train if train in splits or held_out is None else held_out], True


def share(keys: list[int], wanted: str) -> list[int]:
    """Numbers of the entries that belong to `wanted` where a tenth is held out by the hashes `keys`.

    Entries with one hash stay together.
    """
    test = {i for i, key in enumerate(keys) if key % 10 == 0}
    if not test and len(set(keys)) > 1:
        least = min(keys)
        test = {i for i, key in enumerate(keys) if key == least}
    return [i for i in range(len(keys)) if (i in test) == (wanted != "train")]


def split_folders(root: Path, medium: Medium = IMAGES) -> dict[str, Path]:
    """The sub-folders of `root` that are named as splits, else `root` itself under "".

    Raises:
        UserError: something is held out of files that stand in no folder `train`.
    """
    found = {x.name: x for x in _entries(root) if x.is_dir() and x.name in ("train", *HELD_OUT)}
    if found and "train" not in found:
        held_out, others = next(iter(found)), [x for x in _entries(root) if x.name not in found]
        if beside := [x.name for x in others if _is_a(x.name, medium) or (x.is_dir() and any(files_below(x, medium)))]:
            raise UserError(
                f"{root} has {held_out} but no train, and {', '.join(beside[:4])} beside it: move what is to train on "
                f"into a folder train (or rename {held_out}, if it is a class)"
            )
    return found or {"": root}


def class_folders(folder: Path, medium: Medium = IMAGES) -> list[str]:
    """Names of the sub-folders that are classes: at least two with such files in them, and no such file beside them."""
    entries = _entries(folder)
    if any(_is_a(x.name, medium) and x.is_file() for x in entries):
        return []
    names = [x.name for x in entries if x.is_dir() and any(files_below(x, medium))]
    return names if len(names) > 1 else []


def files_below(folder: Path, medium: Medium = IMAGES) -> Iterator[str]:
    """Paths of the files of a medium in `folder` and below, by their suffix, in sorted order."""
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(x for x in folders if not x.startswith((".", "__")))
        yield from (os.path.join(parent, x) for x in sorted(files) if _is_a(x, medium))


def nothing_in(folder: Path, medium: Medium = IMAGES) -> str:
    """The message for a folder without any file of a medium."""
    holds = ", ".join(x.name for x in _entries(folder)[:4])
    looked = f"looked for {' '.join(medium.suffixes)} and parquet"
    return f"no {medium.many} in {folder} ({looked}): it holds {holds or 'nothing'}"


def missing(path: Path) -> str:
    """The message for a path that does not exist: how far it goes, and the nearest names there."""
    parent, wanted = path.absolute(), path.name
    while not parent.is_dir():
        parent, wanted = parent.parent, parent.name
    names = [x.name for x in _entries(parent)]
    near = difflib.get_close_matches(wanted, names, 3, 0.6)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there is {', '.join(names[:6]) or 'nothing'}"
    return f"no file or folder {path}: looked for {wanted!r} in {parent}; {hint} (a hub data set is named owner/name)"


def _entries(folder: Path) -> list[Path]:
    return sorted(x for x in folder.iterdir() if not x.name.startswith((".", "__")))


def _is_a(name: str, medium: Medium) -> bool:
    return name.lower().endswith(medium.suffixes) and not name.startswith(".")
