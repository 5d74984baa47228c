"""Passages for the prediction of the next sentence: pieces of documents, and pieces of others beside them."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch

from ssl_lab.data.source import Samples
from ssl_lab.data.text import stream
from ssl_lab.data.text_files import documents
from ssl_lab.data.tokenizer import Tokenizer, as_tokenizer
from ssl_lab.errors import UserError
from ssl_lab.rng import fold

_TRIES = 8  # rows that are tried for one of another document


class NextSentences:
    """Documents at `path` in passages of at most `length` - 3 tokens, which leaves room for [CLS], [SEP] and [SEP].

    `Samples.data` is (passages, others), two lists of B sequences (Li,) int32 for `MaskPairs`: `others` are passages of
    other documents (of any where there is but one), each chosen by its row alone. What is left of a document that is
    shorter than 2 tokens is dropped. `path`, `tokenizer`, `split`, `column` and errors as with `Blocks`.
    """

    unit = "passages"

    def __init__(
        self,
        path: str,
        tokenizer: Tokenizer | str,
        *,
        split: str = "train",
        length: int = 128,
        column: str | None = None,
    ):
        if length < 5:
            raise UserError(f"length is {length}: [CLS] a [SEP] b [SEP] needs at least 5 tokens")
        self.tokenizer = as_tokenizer(tokenizer)
        self.classes: list[str] = []
        self.length = length
        self._tokens, first = stream(documents(path, split, column), self.tokenizer, None)
        starts, ends, owners = [], [], []
        for owner, (start, end) in enumerate(pairwise([*first, len(self._tokens)])):
            cuts = np.arange(start, end, length - 3)
            starts.append(cuts)
            ends.append(np.minimum(cuts + length - 3, end))
            owners.append(np.full(len(cuts), owner))
        found = np.stack([np.concatenate([np.zeros(0, np.int64), *x]) for x in (starts, ends, owners)])
        self._passages = found[:, found[1] - found[0] > 1].astype(np.int64)
        if len(self) < 2:
            raise UserError(
                f"{path} holds {len(self)} passages of {length - 3} tokens in split {split}: give more text"
            )

    def __len__(self) -> int:
        return self._passages.shape[1]

    def read(self, rows: Sequence[int]) -> Samples:
        """Passages, and for each one from elsewhere."""
        index = torch.tensor(rows, dtype=torch.int64)
        data = [self._passage(row) for row in rows], [self._passage(self._other(row)) for row in rows]
        return Samples(data, torch.full((len(index),), -1), index)

    def _passage(self, row: int) -> np.ndarray:
        start, end, _ = self._passages[:, row]
        return self._tokens[start:end].astype(np.int32)

    def _other(self, row: int) -> int:
        """A row of another document, if one is found; never `row` itself nor the one after it."""
        owners, other = self._passages[2], (row + 2) % len(self) if len(self) > 2 else 1 - row
        for attempt in range(_TRIES):
            tried = fold(row, attempt) % len(self)
            if owners[tried] != owners[row]:
                return tried
            if tried not in (row, row + 1):
                other = tried
        return other
