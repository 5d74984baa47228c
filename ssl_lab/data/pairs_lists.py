"""Images with captions, or clips with transcripts, that a .csv or .tsv lists by their paths."""

import csv
import logging
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, repeat
from pathlib import Path
from typing import Any, Literal, TextIO

from ssl_lab.data.folders import HELD_OUT, choose, share
from ssl_lab.data.medium import Medium
from ssl_lab.data.tables import Table, table_of
from ssl_lab.errors import UserError

log = logging.getLogger(__name__)

_LABEL_NAMES = ("label", "labels", "target", "class")
_SEPARATORS = ("\t", ",", ";", "|")
_UNQUOTED = ("\t", "|")  # between fields in which a quote may be one that somebody said
_NUMBER = re.compile(r"-?\d{1,18}")


def from_list(
    local: Path,
    files: list[Path],
    split: str,
    image_column: str | None,
    caption_column: str | Sequence[str] | None,
    label_column: str | None,
    medium: Medium,
    optional: bool,
) -> Table:
    """The images of `split` in the order in which they are first named, each with all captions beside it.

    Classes are numbered over the files of all splits.

    Args:
        local: what was asked for: one of `files`, or the folder of them.
        files: the tables in it.
        split: train, or what is held out.
        image_column: None = found.
        caption_column: one or several; None = found.
        label_column: None = found, if there is one.
        medium: images or clips.
        optional: keep images without a caption.

    Raises:
        UserError: a file is no table, a column is missing, no line has what is wanted, or nothing is left for `split`.
    """
    from datasets import Dataset, Features, Value

    splits: dict[str, list[Path]] = {}
    for x in files:
        stem = re.match(rf"(train|{'|'.join(HELD_OUT)})(?![a-z])", x.stem)
        splits.setdefault(stem[1] if stem and x != local else "", []).append(x)
    chosen, divide = choose(splits, split)
    if len(chosen) > 1:
        raise UserError(f"{local} holds {len(chosen)} tables, such as {chosen[0].name}: give the path of one")
    file = chosen[0]
    heads, lines = _read(file)
    image = _named(file, heads, image_column, medium.paths, f"{medium.one}_column")
    named = listed(caption_column) or ([None] if not optional or set(heads) & set(medium.texts) else [])
    captions = [_named(file, heads, x, medium.texts, f"{medium.words}_column") for x in named]
    wanted = [label_column] if label_column else _LABEL_NAMES
    others = [x for name, several in splits.items() for x in several if name and x != file]
    said = set[str]().union(*(_labels(x, wanted) for x in others))  # so that a class has one number in all splits
    label = next((x for x in wanted if x in heads), None)
    if label_column and label is None and not said:
        raise UserError(f"{file} has no column {label_column!r}: it has {', '.join(heads)}")
    told = "split" if "split" in heads else None
    found: dict[str, dict[str, Any]] = {}
    for line in lines:
        entry = found.setdefault(line[image], {"captions": [], "label": None, "split": None})
        entry["captions"] += texts_of(line[name] for name in captions)
        if label is not None and line[label]:
            entry["label"] = line[label]
            said.add(line[label])
        if told is not None:
            entry["split"] = line[told]
    names = [name for name, entry in found.items() if name and (optional or entry["captions"])]
    if not names:
        both = f"both an {medium.one} ({image}) and a {medium.words} ({' or '.join(captions)})"
        raise UserError(f"{file}: no line has {both}")
    if len(names) < len(found):
        left = len(found) - len(names)
        log.warning("%s: left out %s of %s %s without a %s", file, left, len(found), medium.many, medium.words)
    paths = [str(file.parent / Path(name).expanduser()) for name in names]
    columns: dict[str, Any] = {medium.one: paths, "captions": [found[name]["captions"] for name in names]}
    features = {medium.one: Value("string"), "captions": [Value("string")]}
    kind: type = int if all(_NUMBER.fullmatch(x) for x in said) else str
    if said:
        labels = [found[name]["label"] for name in names]
        columns["label"] = [None if x is None else kind(x) for x in labels]
        features["label"] = Value("int64" if kind is int else "string")
    rows = Dataset.from_dict(columns, Features(features))
    known = sorted(map(kind, said))
    given = "label" if label_column and said else None
    table = table_of(rows, str(file), medium.one, given, lambda column: known, None, medium)
    table.origin = ""  # a sample is named by its path
    if not divide:
        return table
    told_of = [found[name]["split"] for name in names]
    if {"train"} < set(told_of) <= {"train", *HELD_OUT}:
        return table.select([i for i, x in enumerate(told_of) if (x != "train") == (split != "train")])
    keep = share([zlib.crc32(name.encode()) for name in names], split)
    if not keep:
        raise UserError(f"{file} names a single {medium.one}: it cannot be divided into train and test")
    return table.select(keep)


def _labels(file: Path, wanted: Sequence[str]) -> set[str]:
    heads, lines = _read(file)
    name = next((x for x in wanted if x in heads), None)
    return set() if name is None else {line[name] for line in lines} - {""}


def _read(file: Path) -> tuple[list[str], Iterator[dict[str, str]]]:
    """The names in the first line, and the others with a text for each name."""
    lines = _lines(file)
    heads = next(lines, [])
    return heads, (dict(zip(heads, chain(line, repeat("")), strict=False)) for line in lines if line)


def _lines(file: Path) -> Iterator[list[str]]:
    csv.field_size_limit(min(sys.maxsize, 1 << 30))
    try:
        with open(file, newline="", encoding="utf-8-sig") as stream:
            first = stream.readline()
            separator = max(_SEPARATORS, key=first.count)
            quoted = separator not in _UNQUOTED or _quotes(stream, separator)
            stream.seek(0)
            quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
            yield from csv.reader(stream, delimiter=separator, quoting=quoting)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file} is no readable table ({error}): save it as UTF-8 text with a line of names") from None


def _quotes(stream: TextIO, separator: str) -> bool:
    """Whether quotes enclose fields: each ends with the one it begins with, and no field would swallow others."""
    stream.seek(0)
    lines = csv.reader(stream, delimiter=separator, strict=True)
    try:
        names = len(next(lines, []))
        return not any(separator in x and ("\n" in x or len(line) != names) for line in lines for x in line)
    except csv.Error:
        return False


def _named(file: Path, heads: list[str], given: str | None, usual: Sequence[str], argument: str) -> str:
    found = next((x for x in ([given] if given else usual) if x in heads), None)
    if found is None:
        wanted = f"no column {given!r}" if given else f"no column named {' or '.join(usual[:3])}"
        raise UserError(f"{file} has {wanted}: set {argument} to one of {', '.join(heads) or 'none, it is empty'}")
    return found


def texts_of(values: Iterable[str | list[str | None] | None]) -> list[str]:
    """Those of some cells of a row that are not empty."""
    texts = [text for value in values for text in listed(value)]
    return [text for text in texts if text and text.strip()]


def listed(value: Any) -> list[Any]:
    """One text, several, or None, as a list."""
    return [value] if isinstance(value, str) else list(value or [])
