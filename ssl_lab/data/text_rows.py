"""Sentences with a class, pairs of them, and translations: rows of a table, tokenized once."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssl_lab.data.source import Samples
from ssl_lab.data.text_tables import Rows, open_rows
from ssl_lab.data.tokenizer import Tokenizer, as_tokenizer
from ssl_lab.errors import UserError

_BATCH = 4096  # texts that are encoded at once
_SENTENCES = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("sentence",), ("text",), ("content",))
_LABELS = ("label", "labels", "target", "class")


class Ragged:
    """N sequences of token ids in one array, so that no worker copies a list of them."""

    def __init__(self, rows: Iterable[Sequence[int] | np.ndarray]):
        parts = [np.asarray(row, dtype=np.int32) for row in rows]
        self.ids = np.concatenate([np.zeros(0, np.int32), *parts])
        self.ends = np.cumsum([0, *map(len, parts)])

    def __len__(self) -> int:
        return len(self.ends) - 1

    def take(self, rows: Sequence[int]) -> list[np.ndarray]:
        """Sequences (Li,) int32."""
        return [self.ids[self.ends[row] : self.ends[row + 1]] for row in rows]


class Sentences:
    """Sentences, or pairs of them, with classes.

    `Samples.data` is a tuple of one or two lists of B sequences (Li,) int32 without special tokens, for `PadSentences`.

    Args:
        path: a parquet or .jsonl file, a folder of them, a data set of the hub, or `captions`.
        tokenizer: a tokenizer, or the path of one.
        split: train, or what is held out: test, val, valid, validation, dev.
        columns: one or two columns of text; None = found by their usual names.
        label_column: the column of classes; None = found by its name, and without one there are no classes. Their names
            are those that the file states, else the sorted values over all splits. A split may lack the column.

    Raises:
        UserError: nothing at `path`, a missing column, or labels that are no classes.
    """

    unit = "sentences"

    def __init__(
        self,
        path: str,
        tokenizer: Tokenizer | str,
        *,
        split: str = "train",
        columns: Sequence[str] | None = None,
        label_column: str | None = None,
    ):
        self.tokenizer = as_tokenizer(tokenizer)
        rows = open_rows(path, split)
        names = list(columns) if columns is not None else _usual(rows)
        if len(names) not in (1, 2):
            raise UserError(f"columns={names}: name one column of sentences, or two for pairs")
        label = label_column or next((x for x in _LABELS if x in rows.columns), None)
        if label is not None and label not in rows.columns and label in open_rows(path, None).columns:
            label = None  # another split has it
        table = rows.read([*names, *([label] if label is not None else [])])
        self._parts = [tokenized(table[name], self.tokenizer, f"{rows.origin} {name}") for name in names]
        self.targets, self.classes = torch.full((len(self),), -1), list[str]()
        if label is not None:
            self.targets, self.classes = _classes(path, table[label], rows, label)

    def __len__(self) -> int:
        return len(self._parts[0])

    def read(self, rows: Sequence[int]) -> Samples:
        """Sentences and their classes, -1 where there is none."""
        index = torch.tensor(rows, dtype=torch.int64)
        return Samples(tuple(part.take(rows) for part in self._parts), self.targets[index], index)


class Translations:
    """Sentences and their translations.

    `Samples.data` is (source, target), two lists of B sequences (Li,) int32 without special tokens, for
    `PadTranslations`. Both are made by one tokenizer, as in the Transformer of 2017. `source` and `target` are columns;
    other arguments and errors as with `Sentences`. A row without text on one side is left out.
    """

    unit = "sentence pairs"

    def __init__(self, path: str, tokenizer: Tokenizer | str, *, source: str, target: str, split: str = "train"):
        self.tokenizer = as_tokenizer(tokenizer)
        self.classes: list[str] = []
        self.source, self.target = source, target
        rows = open_rows(path, split)
        table = rows.read([source, target])
        pairs = [(a, b) for a, b in zip(table[source], table[target], strict=True) if a and b]
        if not pairs:
            raise UserError(f"{rows.origin} has no rows with both {source} and {target}")
        self.references = [b for _, b in pairs]  # the target as text, to score translations by
        self._source = tokenized([a for a, _ in pairs], self.tokenizer, f"{rows.origin} {source}")
        self._target = tokenized(self.references, self.tokenizer, f"{rows.origin} {target}")

    def __len__(self) -> int:
        return len(self._source)

    def read(self, rows: Sequence[int]) -> Samples:
        """Source and target sentences; there are no classes."""
        index = torch.tensor(rows, dtype=torch.int64)
        return Samples((self._source.take(rows), self._target.take(rows)), torch.full((len(index),), -1), index)


def tokenized(texts: Sequence[Any], tokenizer: Tokenizer, origin: str) -> Ragged:
    """Texts as ids; None is an empty one. `origin` names them in messages."""
    if (wrong := next((x for x in texts if x is not None and not isinstance(x, str)), None)) is not None:
        raise UserError(f"{origin} holds {type(wrong).__name__} values, not texts: name another column")
    if not len(texts):
        raise UserError(f"{origin} has no rows")

    def encoded() -> Iterable[list[int]]:
        for start in range(0, len(texts), _BATCH):
            yield from tokenizer.encode_batch([text or "" for text in texts[start : start + _BATCH]])

    return Ragged(encoded())


def _usual(rows: Rows) -> list[str]:
    found = next((list(names) for names in _SENTENCES if set(names) <= set(rows.columns)), None)
    if found is None:
        raise UserError(
            f"{rows.origin} has no column of a usual name for sentences: set columns to one or two of "
            f"{', '.join(rows.columns)}"
        )
    return found


def _classes(path: str, values: list[Any], rows: Rows, label: str) -> tuple[Tensor, list[str]]:
    """(N,) int64 and the names. Values that the file does not name are sorted over all splits, so that all agree."""
    names = rows.classes.get(label)
    known = {x for x in values if x is not None}
    every = known if names is not None else set(open_rows(path, None).read([label])[label]) - {None}
    if all(isinstance(x, str) for x in every):
        names = sorted(every) if names is None else names
        if lost := known - set(names):
            raise UserError(f"{rows.origin} {label} holds {sorted(lost)[0]!r}, which is none of its classes")
        number: dict[Any, int] = {x: i for i, x in enumerate(names)}
    elif all(isinstance(x, int) for x in every):
        names = [str(x) for x in range(max(every) + 1)] if names is None else names
        if max(known, default=-1) >= len(names):
            raise UserError(f"{rows.origin} {label} holds class {max(known)}, but only {len(names)} classes are named")
        number = {x: max(int(x), -1) for x in known}
    else:
        raise UserError(
            f"{rows.origin} {label} holds values that are neither texts nor whole numbers: set label_column"
        )
    return torch.tensor([-1 if x is None else number[x] for x in values], dtype=torch.int64), list(names)
