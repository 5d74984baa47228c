"""Undecoded images with their captions, or clips with transcripts, from parquet, the hub, .csv and .tsv."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ssl_lab.data.medium import IMAGES, Medium
from ssl_lab.data.pairs_lists import from_list, listed, texts_of
from ssl_lab.data.tables import Table, bytes_of, open_table
from ssl_lab.errors import UserError

if TYPE_CHECKING:
    import datasets

log = logging.getLogger(__name__)

_CSV = (".csv", ".tsv")
_READ = 10_000  # rows whose captions are looked at together


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
        return [texts_of(values) for values in zip(*columns.values(), strict=True)]


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
    if files := csv_files(local, optional):
        wanted = (image_column, caption_column, label_column)
        table = from_list(local, files, split, *wanted, medium, optional)
        return PairTable(table, _all_columns(table, medium).select_columns(["captions"]))
    table = open_table(path, split, image_column, label_column, medium, by_content=medium is IMAGES)
    base = (local if local.is_dir() else local.parent) if local.exists() else None
    if optional and caption_column is None:
        known = [] if table.columns is None else [x for x in medium.texts if x in table.columns.features]
        return PairTable(table, None if table.columns is None else table.columns.select_columns(known[:1]), base)
    rows = _all_columns(table, medium)
    named = listed(caption_column) or [None]
    columns = [_text_column(rows, table.column, x, table.origin or path, medium) for x in named]
    keep = list(range(len(rows))) if optional else _with_text(rows.select_columns(columns))
    word, where = medium.words, " or ".join(columns)
    if not keep:
        raise UserError(f"{table.origin}: no row has a {word} in column {where}: set {word}_column")
    if len(keep) < len(table):
        log.warning("%s: left out %s of %s rows without a %s", path, len(table) - len(keep), len(table), word)
        table = table.select(keep)
    return PairTable(table, _all_columns(table, medium).select_columns(columns), base)


def csv_files(local: Path, alone: bool) -> list[Path]:
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
        keep += [row for row, values in found if texts_of(values)]
    return keep
