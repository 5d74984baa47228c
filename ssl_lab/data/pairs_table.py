"""Undecoded images with their captions, or clips with transcripts, from parquet, the hub, .csv and .tsv."""

import csv
import logging
import re
import sys
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ssl_lab.data.folders import HELD_OUT, choose, share
from ssl_lab.data.medium import IMAGES, Medium
from ssl_lab.data.tables import Table, bytes_of, open_table, table_of
from ssl_lab.errors import UserError

if TYPE_CHECKING:
    import datasets

log = logging.getLogger(__name__)

_LABEL_NAMES = ("label", "labels", "target", "class")
_CSV = (".csv", ".tsv")
_READ = 10_000  # rows whose captions are looked at together
_SEPARATORS = ("\t", ",", ";", "|")


@dataclass(slots=True)
class PairTable:
    """Images of a table and their captions, all columns of `texts`; relative paths of images start at `base`."""

    table: Table
    texts: "datasets.Dataset | None"  # None: there are none
    base: Path | None = None

    @property
    def classes(self) -> list[str]:
        """Names of the classes."""
        return self.table.classes

    def __len__(self) -> int:
        return len(self.table)

    def blobs(self, rows: Sequence[int]) -> list[bytes]:
        """The encoded images at `rows`; empty where a file cannot be opened."""
        return [bytes_of(x, self.base) for x in self.table.rows[list(rows)][self.table.column]]

    def labels(self, rows: Tensor) -> Tensor:
        """(B,) int64 targets."""
        return self.table.labels(rows)

    def name(self, row: int) -> str:
        """How a person finds the image."""
        return self.table.name(row)

    def captions(self, rows: Sequence[int]) -> list[list[str]]:
        """The captions of each row that are not empty, column by column."""
        columns = {} if self.texts is None else self.texts[list(rows)]
        if not columns:
            return [[] for _ in rows]
        return [_texts_of(values) for values in zip(*columns.values(), strict=True)]


def open_pairs(
    path: str,
    split: str,
    image_column: str | None = None,
    caption_column: str | Sequence[str] | None = None,
    label_column: str | None = None,
    medium: Medium = IMAGES,
    optional: bool = False,
) -> PairTable:
    """The captioned images of `split` at `path`; rows without a caption are left out, and counted in a warning.

    Of another medium: the clips with transcripts. `optional` keeps all rows, and takes as texts only columns of a usual
    name; a folder is then searched for files, not for a .csv.

    Raises:
        UserError: nothing is there, a column is missing, or no row has a caption.
    """
    local = Path(path).expanduser()
    if files := _csv_files(local, optional):
        wanted = (image_column, caption_column, label_column)
        table = _from_csv(local, files, split, *wanted, medium, optional)
        return PairTable(table, _all_columns(table, medium).select_columns(["captions"]))
    table = open_table(path, split, image_column, label_column, medium)
    base = (local if local.is_dir() else local.parent) if local.exists() else None
    if optional and caption_column is None:
        known = [] if table.columns is None else [x for x in medium.texts if x in table.columns.features]
        return PairTable(table, None if table.columns is None else table.columns.select_columns(known[:1]), base)
    rows = _all_columns(table, medium)
    named = _listed(caption_column) or [None]
    columns = [_text_column(rows, table.column, x, table.origin or path, medium) for x in named]
    keep = list(range(len(rows))) if optional else _with_text(rows.select_columns(columns))
    word, where = medium.words, " or ".join(columns)
    if not keep:
        raise UserError(f"{table.origin}: no row has a {word} in column {where}: set {word}_column")
    if len(keep) < len(table):
        log.warning("%s: left out %s of %s rows without a %s", path, len(table) - len(keep), len(table), word)
        table = table.select(keep)
    return PairTable(table, _all_columns(table, medium).select_columns(columns), base)


def _csv_files(local: Path, alone: bool) -> list[Path]:
    """`local` itself if it is a .csv or .tsv, or (unless `alone`) those in it, if there is no parquet too."""
    if local.is_file():
        return [local] if local.suffix.lower() in _CSV else []
    if alone or not local.is_dir() or any(local.glob("*.parquet")) or any(local.glob("data/*.parquet")):
        return []
    return sorted(x for x in local.iterdir() if x.suffix.lower() in _CSV and not x.name.startswith("."))


def _all_columns(table: Table, medium: Medium) -> "datasets.Dataset":
    if table.columns is None:
        words = f"{medium.words}s"
        raise UserError(
            f"{table.name(0)} and its like are files without {words}: list them with their {words} in a .csv file"
        )
    return table.columns


def _text_column(rows: "datasets.Dataset", image: str, given: str | None, origin: str, medium: Medium) -> str:
    import datasets

    def is_text(feature: Any) -> bool:
        inner = getattr(feature, "feature", feature[0] if isinstance(feature, list) and feature else feature)
        return isinstance(inner, datasets.Value) and inner.dtype in ("string", "large_string")

    texts = [name for name, feature in rows.features.items() if name != image and is_text(feature)]
    if given is not None and given not in texts:
        kind = "is no text" if given in rows.features else "is not there"
        raise UserError(f"{origin}: column {given!r} {kind}; texts are in {', '.join(texts) or 'no column'}")
    found = given or next((x for x in medium.texts if x in texts), texts[0] if len(texts) == 1 else None)
    if found is None:
        word, one_of = medium.words, ", ".join(texts) or "none"
        raise UserError(f"{origin} has no {word} column: set {word}_column to one of {one_of}")
    return found


def _with_text(rows: "datasets.Dataset") -> list[int]:
    """Rows that hold a text that is not empty, in any of these columns of texts or of lists of texts."""
    keep = []
    for start in range(0, len(rows), _READ):
        columns = rows[start : start + _READ]
        found = enumerate(zip(*columns.values(), strict=True), start)
        keep += [row for row, values in found if _texts_of(values)]
    return keep


def _texts_of(values: Iterable[str | list[str | None] | None]) -> list[str]:
    texts = [text for value in values for text in _listed(value)]
    return [text for text in texts if text and text.strip()]


def _listed(value: Any) -> list[Any]:
    return [value] if isinstance(value, str) else list(value or [])


def _from_csv(
    local: Path,
    files: list[Path],
    split: str,
    image_column: str | None,
    caption_column: str | Sequence[str] | None,
    label_column: str | None,
    medium: Medium,
    optional: bool,
) -> Table:
    """Images in the order in which they are first named, each with all captions beside it."""
    from datasets import Dataset, Features, Value

    splits: dict[str, list[Path]] = {}
    for x in files:
        stem = re.match(rf"(train|{'|'.join(HELD_OUT)})(?![a-z])", x.stem)
        splits.setdefault(stem[1] if stem and x != local else "", []).append(x)
    chosen, divide = choose(splits, split)
    if len(chosen) > 1:
        raise UserError(f"{local} holds {len(chosen)} tables, such as {chosen[0].name}: give the path of one")
    file = chosen[0]
    lines, heads = _read(file)
    image = _named(file, heads, image_column, medium.paths, f"{medium.one}_column")
    named = _listed(caption_column) or ([None] if not optional or set(heads) & set(medium.texts) else [])
    captions = [_named(file, heads, x, medium.texts, f"{medium.words}_column") for x in named]
    label = next((x for x in ([label_column] if label_column else _LABEL_NAMES) if x in heads), None)
    if label_column and label is None:
        raise UserError(f"{file} has no column {label_column!r}: it has {', '.join(heads)}")
    told = "split" if "split" in heads else None
    found: dict[str, dict[str, Any]] = {}
    for line in lines:
        entry = found.setdefault(line[image], {"captions": [], "label": None, "split": None})
        entry["captions"] += _texts_of(line[name] for name in captions)
        if label is not None and line[label]:
            entry["label"] = int(line[label]) if line[label].lstrip("-").isdigit() else line[label]
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
    labels = [found[name]["label"] for name in names]
    if label is not None and any(x is not None for x in labels):
        words = any(isinstance(x, str) for x in labels)
        columns["label"] = [None if x is None else str(x) if words else x for x in labels]
        features["label"] = Value("string" if words else "int64")
    rows = Dataset.from_dict(columns, Features(features))
    label = "label" if "label" in columns else None
    known = sorted({x for x in columns.get("label", []) if x is not None})
    table = table_of(rows, str(file), medium.one, label, lambda column: known, None, medium)
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


def _read(file: Path) -> tuple[list[dict[str, str]], list[str]]:
    csv.field_size_limit(min(sys.maxsize, 1 << 30))
    try:
        with open(file, newline="", encoding="utf-8-sig") as stream:
            first = stream.readline()
            separator = max(_SEPARATORS, key=first.count)
            stream.seek(0)
            reader = csv.DictReader(stream, delimiter=separator, restval="")
            return [{k: v for k, v in line.items() if k is not None} for line in reader], list(reader.fieldnames or [])
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file} is no readable table ({error}): save it as UTF-8 text with a line of names") from None


def _named(file: Path, heads: list[str], given: str | None, usual: Sequence[str], argument: str) -> str:
    found = next((x for x in ([given] if given else usual) if x in heads), None)
    if found is None:
        wanted = f"no column {given!r}" if given else f"no column named {' or '.join(usual[:3])}"
        raise UserError(f"{file} has {wanted}: set {argument} to one of {', '.join(heads) or 'none, it is empty'}")
    return found
