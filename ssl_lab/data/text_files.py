"""Documents, as language models read them: text files, or the rows of a table."""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ssl_lab.data.folders import share
from ssl_lab.data.text_tables import CAPTIONS, JSONL, PARQUET, divided, find, open_rows, read_text
from ssl_lab.errors import UserError

_TRAIN_SHARE = 0.9  # of the characters of a single text file, as in nanoGPT's preparation of its sets


@dataclass(frozen=True, slots=True)
class Documents:
    """What `documents` gives for the same arguments, to be read as often as wanted."""

    path: str
    split: str | None = None
    column: str | Sequence[str] | None = None

    def __iter__(self) -> Iterator[str]:
        return documents(self.path, self.split, self.column)


def documents(path: str, split: str | None = None, column: str | Sequence[str] | None = None) -> Iterator[str]:
    """The documents at `path`: text files as they are, else the rows of a column (or of several, one after another).

    `path` is a .txt file, a folder of them, a parquet or .jsonl file or a folder of them, a data set of the hub
    (owner/name, or owner/name:configuration), or `captions`. `split=None` takes all that is there. A
    single text file is divided at 90 % of its characters, anything else without named splits by a hash.

    Raises:
        UserError: nothing is there, it cannot be read, or a column is missing.
    """
    local = Path(path).expanduser()
    plain = path != CAPTIONS and local.exists() and not find(local, (*PARQUET, *JSONL))
    if plain and (files := find(local, (".txt",))):
        yield from _texts(local, files, split)
        return
    rows = open_rows(path, split)
    columns = [column or rows.text_column()] if column is None or isinstance(column, str) else list(column)
    for chunk in rows.chunks(columns):
        for name in columns:
            for text in chunk[name]:
                if text is not None and not isinstance(text, str):
                    raise UserError(
                        f"{rows.origin} holds {type(text).__name__} values in {name}, not texts: set column"
                    )
                yield text or ""


def _texts(local: Path, files: list[Path], split: str | None) -> Iterator[str]:
    chosen, divide = divided(local, files, split)
    if divide and len(chosen) == 1:
        text = read_text(chosen[0])
        middle = int(len(text) * _TRAIN_SHARE)
        yield text[:middle] if split == "train" else text[middle:]
        return
    names = [x.relative_to(local).as_posix() if x != local else x.name for x in chosen]
    keep = share([zlib.crc32(x.encode()) for x in names], str(split)) if divide else range(len(chosen))
    for i in keep:
        yield read_text(chosen[i])
