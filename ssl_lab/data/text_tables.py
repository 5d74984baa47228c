"""Tables of texts, from parquet or JSON lines, from the Hugging Face hub, or made up: rows with named columns."""

import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ssl_lab.data import text_captions
from ssl_lab.data.folders import HELD_OUT, choose, missing, share
from ssl_lab.data.hub import from_hub, on_hub
from ssl_lab.errors import UserError
from ssl_lab.rng import fold

CAPTIONS = "captions"  # the path of the generated sentences
PARQUET, JSONL = (".parquet",), (".jsonl", ".json")
_TEXT_NAMES = ("text", "content", "document", "sentence", "caption", "story")
_SPLIT_NAME = re.compile(rf"(?:^|\.)(train|{'|'.join(HELD_OUT)})(?![a-z])")
_CHUNK = 4096  # rows that are read at once

Chunk = dict[str, list[Any]]
Reader = Callable[[Sequence[str]], Iterator[Chunk]]


@dataclass(slots=True)
class Rows:
    """A split of a table. `classes` are the names of the classes in a column where the file states them."""

    origin: str
    columns: list[str]
    reader: Reader
    count: int
    classes: dict[str, list[str]] = field(default_factory=dict)
    keep: list[int] | None = None  # ascending rows that belong to the split; None = all

    def chunks(self, columns: Sequence[str]) -> Iterator[Chunk]:
        """The named columns, some thousand rows at a time, in order.

        Raises:
            UserError: a column is missing, or the file cannot be read.
        """
        for column in columns:
            if column not in self.columns:
                raise UserError(f"{self.origin} has no column {column!r}: it has {', '.join(self.columns) or 'none'}")
        wanted, start = None if self.keep is None else set(self.keep), 0
        for chunk in self.reader(columns):
            count = len(chunk[columns[0]])
            if wanted is not None:
                here = [i for i in range(count) if start + i in wanted]
                chunk = {name: [values[i] for i in here] for name, values in chunk.items()}
            start += count
            yield chunk

    def read(self, columns: Sequence[str]) -> Chunk:
        """The named columns as whole lists."""
        found: Chunk = {name: [] for name in columns}
        for chunk in self.chunks(list(found)):
            for name, values in chunk.items():
                found[name] += values
        return found

    def text_column(self) -> str:
        """The column that holds the text, by its name, or because there is only one."""
        named = [x for x in _TEXT_NAMES if x in self.columns] or (self.columns if len(self.columns) == 1 else [])
        if not named:
            raise UserError(f"{self.origin} has no column named text: set column to one of {', '.join(self.columns)}")
        return named[0]


def open_rows(path: str, split: str | None, key: str | None = None) -> Rows:
    """The rows of a split; `path` and `split` as for `ssl_lab.data.text_files.documents`.

    Where the table has no splits, rows with the same text in column `key` fall into the same one.

    Raises:
        UserError: nothing is there, or it is no table.
    """
    if path == CAPTIONS:
        return _captions(split)
    local = Path(path).expanduser()
    if not local.exists():
        if on_hub(path):
            return _hub(path, split)
        raise UserError(missing(local))
    for suffixes, open_files in ((PARQUET, _parquet), (JSONL, _jsonl)):
        if files := find(local, suffixes):
            chosen, divide = divided(local, files, split)
            rows = open_files(chosen)
            return _part(rows, str(split), key) if divide else rows
    if local.is_file():
        raise UserError(f"{path} is no table: a text is a .txt file, rows are a .parquet or .jsonl file")
    names = ", ".join(sorted(x.name for x in local.iterdir())[:4])
    raise UserError(f"no texts in {local} (looked for .txt .parquet .jsonl): it holds {names or 'nothing'}")


def find(local: Path, suffixes: Sequence[str]) -> list[Path]:
    """`local` itself if it is such a file, else such files below it, in sorted order.

    A folder is not searched for .json: what lies beside texts under that name is seldom one.
    """
    if local.is_file():
        return [local] if local.suffix in suffixes else []
    found = (x for suffix in suffixes if suffix != ".json" for x in local.rglob(f"*{suffix}"))
    return sorted(x for x in found if not any(part.startswith((".", "__")) for part in x.relative_to(local).parts))


def divided(local: Path, files: list[Path], split: str | None) -> tuple[list[Path], bool]:
    """The files of a split, told by names such as train/a.txt, train-00000.parquet, wiki.train.txt.

    And whether there is only one, which is then to be divided.
    """
    if split is None:
        return files, False
    splits: dict[str, list[Path]] = {}
    for file in files:
        parts = file.relative_to(local).parts if file != local else (file.name,)
        named = next((found for part in parts if (found := _SPLIT_NAME.search(part))), None)
        splits.setdefault(named[1] if named else "", []).append(file)
    return choose(splits, split)


def _part(rows: Rows, split: str, key: str | None) -> Rows:
    values = rows.read([key])[key] if key else range(rows.count)
    rows.keep = share([zlib.crc32(str(x).encode()) if key else fold(0, x) for x in values], split)
    if not rows.keep:
        raise UserError(f"{rows.origin} is a single row: it cannot be divided into train and test")
    return rows


def read_text(file: Path) -> str:
    """The text of a file in UTF-8, without a byte order mark, with line ends as they are in Unix.

    Raises:
        UserError: it is something else.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is no UTF-8 text (byte {error.start}): convert it, or remove it") from None


def _parquet(files: list[Path]) -> Rows:
    import pyarrow.parquet as pq

    names, classes, count = dict[str, None](), dict[str, list[str]](), 0  # not every file has all columns
    for file in files:
        try:
            found = pq.ParquetFile(file)
        except Exception as error:
            raise UserError(f"{file} is no readable parquet file: {_line(error)}") from error
        count += found.metadata.num_rows
        names |= dict.fromkeys(found.schema_arrow.names)
        metadata = found.schema_arrow.metadata or {}
        if b"classes" in metadata:
            classes = dict.fromkeys(found.schema_arrow.names, json.loads(metadata[b"classes"])) | classes
        elif b"huggingface" in metadata:
            classes = _class_labels(json.loads(metadata[b"huggingface"]).get("info", {}).get("features", {})) | classes

    def reader(columns: Sequence[str]) -> Iterator[Chunk]:
        for file in files:
            try:
                for batch in pq.ParquetFile(file).iter_batches(_CHUNK, columns=list(columns)):
                    empty: Chunk = {name: [None] * batch.num_rows for name in columns}
                    yield empty | batch.to_pydict()
            except OSError as error:
                raise UserError(f"{file} is no readable parquet file: {_line(error)}") from error

    return Rows(_origin(files), list(names), reader, count, classes)


def _class_labels(features: dict[str, Any]) -> dict[str, list[str]]:
    """Names of the classes in the features that `datasets` stores, by column."""
    labels = ((k, x) for k, x in features.items() if isinstance(x, dict) and x.get("_type") == "ClassLabel")
    return {name: feature["names"] for name, feature in labels}


def _jsonl(files: list[Path]) -> Rows:
    table: Chunk = {}
    count = 0
    for file in files:
        for number, line in enumerate(read_text(file).split("\n"), 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
            except ValueError:
                entry = None
            if not isinstance(entry, dict):
                raise UserError(f'{file} line {number} is no JSON object: each line holds one, such as {{"text": ...}}')
            for name in entry.keys() - table.keys():
                table[name] = [None] * count
            count += 1
            for name, values in table.items():
                values.append(entry.get(name))
    return Rows(_origin(files), list(table), _in_memory(table), count)


def _hub(path: str, split: str | None) -> Rows:
    found = from_hub(path, split)

    def reader(columns: Sequence[str]) -> Iterator[Chunk]:
        yield from found.select_columns(list(columns)).iter(_CHUNK)

    classes = {name: x.names for name, x in found.features.items() if hasattr(x, "names")}
    return Rows(f"{path} {split or ''}".rstrip(), list(found.features), reader, len(found), classes)


def _captions(split: str | None) -> Rows:
    splits = ["train", "test"] if split is None else ["train" if split == "train" else "test"]
    table: Chunk = {}
    for name in splits:
        for column, values in text_captions.table(name).items():
            table[column] = [*table.get(column, []), *values]
    return Rows(CAPTIONS, list(table), _in_memory(table), len(table["text"]))


def _in_memory(table: Chunk) -> Reader:
    def reader(columns: Sequence[str]) -> Iterator[Chunk]:
        yield {name: table[name] for name in columns}

    return reader


def _origin(files: list[Path]) -> str:
    return str(files[0] if len(files) == 1 else files[0].parent)


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0] or type(error).__name__
