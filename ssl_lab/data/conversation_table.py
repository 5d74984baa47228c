"""Conversations from files: the JSON of LLaVA, JSON lines, and parquet with the images in it."""

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssl_lab.data.conversation_text import ConversationEncoder, Message
from ssl_lab.data.conversations import Conversations, Dialogue
from ssl_lab.data.folders import missing, share
from ssl_lab.data.images import EncodedImages
from ssl_lab.data.tables import bytes_of
from ssl_lab.data.text_tables import divided, find, read_text
from ssl_lab.errors import UserError

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_TURNS, _IMAGES = ("conversations", "messages"), ("image", "images")


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
    local = Path(path).expanduser()
    if not local.exists():
        raise UserError(missing(local))
    files = find(local, (".parquet",)) or find(local, (".json", ".jsonl")) or sorted(local.glob("*.json"))
    if not files:
        raise UserError(f"{path} holds no conversations: give a .json, .jsonl or .parquet file, or a folder of them")
    chosen, divide = divided(local, files, split)
    rows, store = _parquet(chosen) if chosen[0].suffix == ".parquet" else _json(chosen)
    turns = next((x for x in _TURNS if rows and x in rows[0]), None)
    if turns is None:
        raise UserError(f"{chosen[0]} has no column {' or '.join(_TURNS)}")
    if divide:
        kept = share([zlib.crc32(_key(row, i).encode()) for i, row in enumerate(rows)], split)
        rows = [rows[i] for i in kept]
        if not rows:
            raise UserError(f"{path} has too few images to hold a tenth out: nothing is left for {split}; give more")
    store.base = Path(image_folder).expanduser() if image_folder is not None else chosen[0].parent
    dialogues = []
    for number, row in enumerate(rows):
        messages = [_message(x, f"{path} row {number}") for x in row[turns]]
        count = store.take(row)
        dialogues.append(Dialogue(tuple(range(len(store) - count, len(store))), _marked(messages, count, encode)))
    images = EncodedImages(store, str(path), split, bad_samples=bad_samples) if len(store) else None
    return Conversations(images, dialogues, encode, origin=str(path))


class _Store:
    """Images by number: what the rows hold, or where it lies in a table that is read when it is needed."""

    def __init__(self, column: str | None, table: Any = None) -> None:
        self.column, self.table, self.base = column, table, Path()
        self.cells: list[Any] = []  # a path, or (row, place) of the table
        self.classes: list[str] = []

    def __len__(self) -> int:
        return len(self.cells)

    def take(self, row: dict[str, Any]) -> int:
        """Number the images of a row; gives how many it has."""
        if self.table is not None:
            found = [(row["row"], k) for k in range(row["count"])]
            self.cells += found
            return len(found)
        value = next((row[x] for x in _IMAGES if row.get(x)), None)
        listed = value if isinstance(value, list) else [] if value is None else [value]
        self.cells += listed
        return len(listed)

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


def _json(files: Sequence[Path]) -> tuple[list[dict[str, Any]], _Store]:
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
    return rows, _Store(None)


def _parquet(files: Sequence[Path]) -> tuple[list[dict[str, Any]], _Store]:
    """Rows without their images, which stay in the file."""
    import datasets
    import pyarrow as pa

    table = datasets.load_dataset("parquet", data_files=[str(x) for x in files], split="train")
    names = list(table.features)
    turns = next((x for x in _TURNS if x in names), None)
    if turns is None:
        raise UserError(f"{files[0]} has no column {' or '.join(_TURNS)}: it has {', '.join(names)}")
    column = next((x for x in _IMAGES if x in names), None)
    rows: list[dict[str, Any]] = [{turns: value, "row": i, "count": 0} for i, value in enumerate(table[turns])]
    if column is not None:
        feature = table.features[column]
        if isinstance(feature, datasets.Image):
            table = table.cast_column(column, datasets.Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            table = table.cast_column(column, datasets.List(datasets.Image(decode=False)))
        cells = table.select_columns([column]).with_format("arrow")[:][column]
        for row, cell in zip(rows, cells, strict=True):
            several = isinstance(cell.type, pa.ListType | pa.LargeListType)
            row["count"] = 0 if not cell.is_valid else len(cell) if several else 1
    return rows, _Store(column, table)


def _key(row: dict[str, Any], number: int) -> str:
    """What decides the split: the first image, so that one image is not in both."""
    value = next((row[x] for x in _IMAGES if row.get(x)), None)
    return str((value[0] if isinstance(value, list) else value) if value else number)


def _message(turn: Any, where: str) -> Message:
    role = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
    content = turn.get("content", turn.get("value")) if isinstance(turn, dict) else None
    if role not in ROLES or not isinstance(content, str):
        raise UserError(f"{where} has a turn of {role!r} with {type(content).__name__}: roles are {', '.join(ROLES)}")
    return {"role": ROLES[role], "content": content}


def _marked(messages: list[Message], images: int, encode: ConversationEncoder) -> tuple[Message, ...]:
    """With the markers where the model wants them."""
    marker = encode.marker
    count = sum(message["content"].count(marker) for message in messages)
    if images and not count:
        first = next((m for m in messages if m["role"] == "user"), messages[0])
        first["content"] = f"{marker}\n" * images + first["content"]
    elif images == count == 1:
        turn = next(m for m in messages if marker in m["content"])
        turn["content"] = f"{marker}\n{turn['content'].replace(marker, '').strip()}".rstrip("\n")
    return tuple(messages)
