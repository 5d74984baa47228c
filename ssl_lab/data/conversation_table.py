"""Conversations from files: the JSON of LLaVA, JSON lines, and parquet with the images in it."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssl_lab.data.conversation_text import ConversationEncoder, Message
from ssl_lab.data.conversations import Conversations, Dialogue
from ssl_lab.data.folders import missing, share
from ssl_lab.data.images import EncodedImages
from ssl_lab.data.tables import bytes_of, key_of
from ssl_lab.data.text_tables import divided, find, read_text
from ssl_lab.errors import UserError

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
TURNS, _IMAGES = ("conversations", "messages"), ("image", "images")


def conversations(
    path: str | Path,
    encode: ConversationEncoder,
    *,
    split: str = "train",
    image_folder: str | Path | None = None,
    bad_samples: str | Path | None = None,
) -> Conversations:
    """Rows with `conversations` (`from`, `value`) or `messages` (`role`, `content`), and with `image` or `images`.

    An image is a path from `image_folder` on, or in parquet the bytes of a file. `<image>` stands in the text for each
    one; where it does not, the first question begins with them. With one image it is brought to the front of its turn,
    as LLaVA does. Where the file has no splits, a tenth of the images is held out with what is said.

    Args:
        path: a .json, .jsonl or .parquet file, or a folder of them.
        encode: makes tokens of conversations.
        split: train, or what is held out.
        image_folder: where paths begin; None = beside the file.
        bad_samples: a file to list unreadable images in.

    Raises:
        UserError: nothing there, no such columns, or a role that is not known.
    """
    rows, store = read_rows(path, split, TURNS, image_folder)
    turns = store.column_of(TURNS)
    dialogues = []
    for number, row in enumerate(rows):
        where = f"{path} row {number}"
        messages = [message(x, where, encode.marker) for x in cell(row, turns, where, list)]
        images = store.take(row)
        dialogues.append(Dialogue(images, marked(messages, len(images), encode)))
    found = EncodedImages(store, str(path), split, bad_samples=bad_samples) if len(store) else None
    return Conversations(found, dialogues, encode, origin=str(path))


def read_rows(
    path: str | Path, split: str, columns: Sequence[str], image_folder: str | Path | None
) -> tuple[list[dict[str, Any]], "ImageStore"]:
    """Rows of a split with those of `columns` that the files have, and what knows their images.

    Raises:
        UserError: nothing there, or nothing left for the split.
    """
    local = Path(path).expanduser()
    if not local.exists():
        raise UserError(missing(local))
    files = find(local, (".parquet",)) or find(local, (".json", ".jsonl")) or sorted(local.glob("*.json"))
    if not files:
        raise UserError(f"{path} holds no conversations: give a .json, .jsonl or .parquet file, or a folder of them")
    chosen, divide = divided(local, files, split)
    rows, store = _parquet(chosen, columns) if chosen[0].suffix == ".parquet" else _json(chosen)
    if divide:
        kept = share(
            [key_of(i if image is None else image) for i, image in enumerate(_first_images(rows, store))], split
        )
        rows = [rows[i] for i in kept]
        if not rows:
            raise UserError(f"{path} has too few images to hold a tenth out: nothing is left for {split}; give more")
    store.base = Path(image_folder).expanduser() if image_folder is not None else chosen[0].parent
    return rows, store


class ImageStore:
    """Images by number: what the rows hold, or where it lies in a table that is read when it is needed.

    Args:
        file: the first one, for messages.
        names: columns that the files have.
        column: of the images in `table`.
        table: parquet; None = rows hold paths.
    """

    def __init__(self, file: Path, names: Sequence[str], column: str | None = None, table: Any = None) -> None:
        self.file, self.names = file, list(names)
        self.column, self.table, self.base = column, table, Path()
        self.cells: list[Any] = []  # a path, or (row, place) of the table
        self.classes: list[str] = []

    def __len__(self) -> int:
        return len(self.cells)

    def column_of(self, names: Sequence[str]) -> str:
        """The first of `names` that the files have.

        Raises:
            UserError: none of them.
        """
        found = next((name for name in names if name in self.names), None)
        if found is None:
            raise UserError(f"{self.file} has no column {' or '.join(names)}: it has {', '.join(self.names)}")
        return found

    def take(self, row: dict[str, Any]) -> tuple[int, ...]:
        """Number the images of a row; gives their numbers."""
        begin = len(self.cells)
        if self.table is not None:
            self.cells += [(row["row"], k) for k in range(row["count"])]
        else:
            value = next((row[x] for x in _IMAGES if row.get(x)), None)
            self.cells += value if isinstance(value, list) else [] if value is None else [value]
        return tuple(range(begin, len(self.cells)))

    def blobs(self, rows: Sequence[int]) -> list[bytes]:
        return [bytes_of(self._cell(self.cells[row]), self.base) for row in rows]

    def labels(self, rows: Tensor) -> Tensor:
        return torch.full((len(rows),), -1)

    def name(self, row: int) -> str:
        cell = self.cells[row]
        return str(self.base / str(cell)) if self.table is None else f"image {cell[1]} of row {cell[0]}"

    def _cell(self, cell: Any) -> Any:
        if self.table is None:
            return cell
        value = self.table[cell[0]][self.column]
        return value[cell[1]] if isinstance(value, list) else value


def _json(files: Sequence[Path]) -> tuple[list[dict[str, Any]], ImageStore]:
    rows: list[dict[str, Any]] = []
    for file in files:
        text = read_text(file)
        try:
            found = (
                json.loads(text) if text.lstrip()[:1] == "[" else [json.loads(x) for x in text.split("\n") if x.strip()]
            )
        except ValueError as error:
            raise UserError(f"{file} is no JSON ({error}): give a list of objects, or one object a line") from None
        if not all(isinstance(row, dict) for row in found):
            raise UserError(f"{file} holds other things than objects: each row has conversations and, if any, an image")
        rows += found
    if not rows:
        raise UserError(f"{files[0]} has no rows")
    return rows, ImageStore(files[0], list(rows[0]))


def _parquet(files: Sequence[Path], columns: Sequence[str]) -> tuple[list[dict[str, Any]], ImageStore]:
    """Rows without their images, which stay in the file."""
    import datasets
    import pyarrow as pa

    table = datasets.load_dataset("parquet", data_files=[str(x) for x in files], split="train")
    names = list(table.features)
    column = next((x for x in _IMAGES if x in names), None)
    rows: list[dict[str, Any]] = [{"row": i, "count": 0} for i in range(len(table))]
    for name in (x for x in columns if x in names):
        for row, value in zip(rows, table[name], strict=True):
            row[name] = value
    if column is not None:
        feature = table.features[column]
        if isinstance(feature, datasets.Image):
            table = table.cast_column(column, datasets.Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            table = table.cast_column(column, datasets.List(datasets.Image(decode=False)))
        table = table.select_columns([column])
        for row, cell in zip(rows, table.with_format("arrow")[:][column], strict=True):
            several = isinstance(cell.type, pa.ListType | pa.LargeListType)
            row["count"] = 0 if not cell.is_valid else len(cell) if several else 1
    return rows, ImageStore(files[0], names, column, table)


def _first_images(rows: Sequence[dict[str, Any]], store: ImageStore) -> Iterator[Any]:
    """What decides the split, so that one image is not in both: the first of each row, None where there is none."""
    if store.table is None:
        cells = (next((row[x] for x in _IMAGES if row.get(x)), None) for row in rows)
    elif store.column is None:
        cells = (None for _ in rows)
    else:
        cells = (cell.as_py() for cell in store.table.with_format("arrow")[:][store.column])
    return ((cell[0] if isinstance(cell, list) else cell) if cell else None for cell in cells)


def cell(row: dict[str, Any], name: str, where: str, *kinds: type) -> Any:
    """What a row has in a column.

    Raises:
        UserError: nothing, or something of another kind.
    """
    value = row.get(name)
    if not isinstance(value, kinds):
        found = "nothing" if value is None else type(value).__name__
        raise UserError(f"{where} has {found} in {name}, where a {' or a '.join(k.__name__ for k in kinds)} is wanted")
    return value


def message(turn: Any, where: str, marker: str) -> Message:
    """A turn with `role` or `from` and with `content` or `value`, a text or a list of typed parts.

    Raises:
        UserError: another role or content.
    """
    role = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
    content = turn.get("content", turn.get("value")) if isinstance(turn, dict) else None
    if isinstance(content, list) and all(
        isinstance(part, dict) and (part.get("type") == "image" or isinstance(part.get("text"), str))
        for part in content
    ):
        content = "\n".join(marker if part.get("type") == "image" else part["text"] for part in content)
    if role not in ROLES or not isinstance(content, str):
        raise UserError(f"{where} has a turn of {role!r} with {type(content).__name__}: roles are {', '.join(ROLES)}")
    return {"role": ROLES[role], "content": content}


def marked(messages: list[Message], images: int, encode: ConversationEncoder) -> tuple[Message, ...]:
    """With the markers where the model wants them, see `conversations`."""
    marker = encode.marker
    count = sum(each["content"].count(marker) for each in messages)
    if images and messages and not count:
        first = next((m for m in messages if m["role"] == "user"), messages[0])
        first["content"] = f"{marker}\n" * images + first["content"]
    elif images == count == 1:
        turn = next(m for m in messages if marker in m["content"])
        turn["content"] = f"{marker}\n{turn['content'].replace(marker, '').strip()}".rstrip("\n")
    return tuple(messages)
