"""Undecoded images or sound with their targets, from parquet, a folder of files, or the Hugging Face hub."""

import json
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ssl_lab.data.folders import HELD_OUT, choose, class_folders, files_below, missing, nothing_in, share, split_folders
from ssl_lab.data.hub import from_hub, on_hub
from ssl_lab.data.medium import IMAGES, Medium
from ssl_lab.data.table_labels import kind_of, labels_of
from ssl_lab.errors import UserError
from ssl_lab.rng import fold

if TYPE_CHECKING:
    import datasets

_READ = 256  # images that are hashed together


@dataclass(slots=True)
class Table:
    """Undecoded files: column `column` of `rows` holds bytes, a path, or both; targets (N,) int64, -1 = unlabelled."""

    rows: "datasets.Dataset"
    column: str
    targets: Tensor
    classes: list[str]
    origin: str = ""  # what the row numbers count in; empty where a row is a file
    numbers: list[int] = field(default_factory=list)  # row numbers in `origin`, where only some of them are here
    columns: "datasets.Dataset | None" = None  # the same rows with all their columns, where there are others

    def __len__(self) -> int:
        return len(self.rows)

    def blobs(self, rows: Sequence[int]) -> list[bytes]:
        """The files at `rows`; empty where one cannot be opened."""
        return [bytes_of(x) for x in self.rows[list(rows)][self.column]]

    def labels(self, rows: Tensor) -> Tensor:
        """(B,) int64 targets of the rows (B,) int64."""
        return self.targets[rows]

    def select(self, keep: list[int]) -> "Table":
        """The same with some of the rows, ascending."""
        numbers = [self.numbers[x] for x in keep] if self.numbers else keep
        columns = None if self.columns is None else self.columns.select(keep)
        targets = self.targets[keep]
        return replace(self, rows=self.rows.select(keep), targets=targets, numbers=numbers, columns=columns)

    def name(self, row: int) -> str:
        """How a person finds the sample."""
        number = self.numbers[row] if self.numbers else row
        return f"{self.origin} row {number}" if self.origin else str(self.rows[row][self.column])


def open_table(
    path: str,
    split: str,
    column: str | None = None,
    label_column: str | None = None,
    medium: Medium = IMAGES,
    by_content: bool = False,
) -> Table:
    """The images of `split` at `path`, or the files of another medium; `column` holds them in a table.

    Where a local set has only one split, its column `split` tells what is held out; without one, a tenth is, by a hash
    of the file name (or the row number): the same ones on every machine and in every run. In parquet with `by_content`,
    by a hash of the image itself, so that several rows of one image stay together; all images are read for it.

    Raises:
        UserError: nothing is there, it holds no such files, or a column is missing.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        files = sorted(local.glob("*.parquet")) or sorted(local.glob("data/*.parquet"))
        if not files:
            return _folder(local, split, medium)
        return _parquet(local, files, split, column, label_column, medium, by_content)
    if local.is_file() and local.suffix == ".parquet":
        return _parquet(local, [local], split, column, label_column, medium, by_content)
    if local.is_file():
        raise UserError(f"{path} is neither a folder nor a parquet file: unpack an archive first, then give its folder")
    if on_hub(path):
        return _hub(path, split, column, label_column, medium)
    raise UserError(missing(local))


def _folder(root: Path, split: str, medium: Medium) -> Table:
    from datasets import Dataset

    splits = split_folders(root, medium)
    classes = sorted({name for folder in splits.values() for name in class_folders(folder, medium)})
    folder, divide = choose(splits, split)
    files: list[str] = []
    targets: list[int] = []
    for name in class_folders(folder, medium) or [""]:
        found = list(files_below(folder / name, medium))
        files += found
        targets += [classes.index(name) if name else -1] * len(found)
    if not files:
        raise UserError(nothing_in(folder, medium))
    # Arrow keeps the names in one buffer; a list of strings would be copied, page by page, into every worker.
    table = Table(Dataset.from_dict({medium.one: files}), medium.one, torch.tensor(targets), classes)
    keys = [zlib.crc32(Path(x).relative_to(folder).as_posix().encode()) for x in files] if divide else []
    return _part(table, keys, split) if divide else table


def _parquet(
    root: Path,
    files: list[Path],
    split: str,
    column: str | None,
    label_column: str | None,
    medium: Medium,
    by_content: bool,
) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import load_dataset
    from pyarrow.types import is_nested

    splits: dict[str, list[Path]] = {}
    names: list[str] | None = None
    schemas = {}
    for file in files:
        try:
            schemas[file] = pq.read_schema(file)
        except Exception as error:
            raise UserError(f"{file} is no readable parquet file: {_line(error)}") from error
        metadata = schemas[file].metadata or {}
        names = json.loads(metadata[b"classes"]) if b"classes" in metadata else names
        named = re.match(rf"(train|{'|'.join(HELD_OUT)})(?![a-z])", file.stem)
        splits.setdefault(named[1] if named else "", []).append(file)
    chosen, divide = choose(splits, split)
    if not sum(pq.read_metadata(x).num_rows for x in chosen):
        raise UserError(f"no {medium.many} in {', '.join(map(str, chosen))}: there are no rows")

    def values(column: str) -> list[Any]:
        usable = (x for x in files if column in schemas[x].names and not is_nested(schemas[x].field(column).type))
        return list({x for file in usable for x in pq.read_table(file, columns=[column])[column].unique().to_pylist()})

    rows = load_dataset("parquet", data_files=[str(x) for x in chosen], split="train")
    origin = str(chosen[0] if len(chosen) == 1 else root)
    if label_column not in rows.features and any(label_column in x.names for x in schemas.values()):
        rows = rows.add_column(label_column, pa.nulls(len(rows)))  # only another split is labelled
    table = table_of(rows, origin, column, label_column, values, names, medium)
    if divide and (told := _told(rows)):
        held_out = split != "train"
        return table.select([i for i, name in enumerate(told) if (name != "train") == held_out])
    if not divide:
        return table
    parts = (table.rows[i : i + _READ][table.column] for i in range(0, len(table) if by_content else 0, _READ))
    keys = [key_of(x) for part in parts for x in part] or [fold(0, row) for row in range(len(table))]
    return _part(table, keys, split)


def _told(rows: "datasets.Dataset") -> list[str]:
    """What a column named `split` says of each row; nothing if there is none, or it names other things."""
    if "split" not in rows.features:
        return []
    found: list[str] = rows.with_format("arrow")[:]["split"].to_pylist()
    return found if {"train"} < set(found) <= {"train", *HELD_OUT} else []


def _hub(path: str, split: str, column: str | None, label_column: str | None, medium: Medium) -> Table:
    from datasets import ClassLabel

    rows = from_hub(path, split)

    def values(column: str) -> list[Any]:
        typed = isinstance(rows.features[column], ClassLabel)  # its names are the same in all splits
        return list((rows if typed else from_hub(path, None)).unique(column))

    return table_of(rows, f"{path} {split}", column, label_column, values, None, medium)


def _part(table: Table, keys: list[int], split: str) -> Table:
    keep = share(keys, split)
    if not keep:
        raise UserError(f"{table.origin or table.name(0)} is a single file: it cannot be divided into train and test")
    return table.select(keep)


def table_of(
    rows: "datasets.Dataset",
    origin: str,
    column: str | None,
    label_column: str | None,
    values: Callable[[str], list[Any]],
    names: list[str] | None,
    medium: Medium = IMAGES,
) -> Table:
    """Find the columns; `values` lists what a column holds over all splits, `names` those of the classes if known."""
    import datasets

    features = rows.features
    for given in (column, label_column):
        if given is not None and given not in features:
            raise UserError(f"{origin} has no column {given!r}: it has {', '.join(features)}")
    kind = getattr(datasets, medium.feature)
    typed = [x for x, feature in features.items() if isinstance(feature, kind)]
    usual = [column] if column else [x for x in (*typed, *medium.columns) if x in features]
    found = next((x for x in usual if x in typed or _holds_files(features[x])), None)
    if found is None:
        said = f": {usual[0]!r} holds {kind_of(rows, usual[0])}, not bytes or paths" if usual else ""
        one_of = ", ".join(features)
        raise UserError(f"{origin} has no column of {medium.many}{said}: set {medium.one}_column to one of {one_of}")
    targets, classes = labels_of(rows, label_column, values, names, origin)
    if found in typed:
        rows = rows.cast_column(found, kind(decode=False))
    return Table(rows.select_columns([found]), found, targets, classes, origin, columns=rows)


def _holds_files(feature: Any) -> bool:
    """Whether `bytes_of` can read a column."""
    if isinstance(feature, dict):
        return not {"bytes", "path"}.isdisjoint(feature)
    return getattr(feature, "dtype", "").removeprefix("large_").removesuffix("_view") in ("binary", "string")


def bytes_of(value: Any, base: Path | None = None) -> bytes:
    """What a cell holds, or what is in the file that it names, from `base` on; empty where that cannot be opened."""
    if isinstance(value, bytes):
        return value
    entry: dict[str, Any] = {"path": value} if isinstance(value, str) else value if isinstance(value, dict) else {}
    inside: bytes | None = entry.get("bytes")
    if inside is not None or not entry.get("path"):
        return inside or b""
    try:
        return Path(base or "", entry["path"]).read_bytes()
    except OSError:
        return b""


def key_of(value: Any) -> int:
    """A hash of what a cell holds: the bytes of a file, else its path."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    return zlib.crc32(value if isinstance(value, bytes) else str(value).encode())


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0] or type(error).__name__
