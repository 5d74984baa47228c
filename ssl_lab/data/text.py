"""A corpus as rows of equal length, for language models of every kind."""

import logging
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from ssl_lab.data.source import Samples
from ssl_lab.data.text_files import documents
from ssl_lab.data.tokenizer import Tokenizer, as_tokenizer
from ssl_lab.errors import UserError

log = logging.getLogger(__name__)

_PIECE = 1 << 16  # characters that are encoded in one go
_BATCH = 64  # such pieces that are encoded at once
_WINDOW = 200  # characters around a cut that are compared


class Blocks:
    """The texts at `path`, tokenized once into one stream and cut into rows of `length` + 1 tokens.

    Each row begins `stride` tokens after the one before it: `length` (the default) covers the text once, since the last
    token of a row is the first of the next; 1 gives every place where a row can begin, as nanoGPT draws them. Documents
    follow each other without padding, each closed by the tokenizer's end-of-text token or [SEP], if any.

    `Samples.data` is (tokens, segments), both (B, length + 1) int64; segments number the documents within a row from 0.

    Args:
        path: a .txt file, a folder of them, a parquet or .jsonl file or a folder of them, a data set of the hub, or
            `captions`; see `ssl_lab.data.text_files.documents`.
        tokenizer: a tokenizer, or the path of one.
        split: train, or what is held out: test, val, valid, validation, dev.
        length: tokens that a model sees.
        stride: tokens from row to row; None = `length`.
        column: where the text of a table stands; None = found by its name.

    Raises:
        UserError: nothing at `path`, or less text than one row.
    """

    unit = "sequences"

    def __init__(
        self,
        path: str,
        tokenizer: Tokenizer | str,
        *,
        split: str = "train",
        length: int = 256,
        stride: int | None = None,
        column: str | None = None,
    ):
        for name, value in (("length", length), ("stride", length if stride is None else stride)):
            if value < 1:
                raise UserError(f"{name} is {value}: it must be at least 1 token")
        self.tokenizer = as_tokenizer(tokenizer)
        self.classes: list[str] = []
        self.length, self.stride = length, stride or length
        end = self.tokenizer.sep if self.tokenizer.eos is None else self.tokenizer.eos
        self._tokens, self._first = stream(documents(path, split, column), self.tokenizer, end)
        if len(self._tokens) <= length:
            raise UserError(
                f"{path} has {len(self._tokens)} tokens in split {split}, fewer than one row of length + 1 = "
                f"{length + 1}: set a smaller length, or give more text"
            )
        log.info("%s: %s tokens in %s documents", path, f"{len(self._tokens):,}", f"{len(self._first):,}")

    @property
    def num_tokens(self) -> int:
        """Tokens of the split, those that end documents included."""
        return len(self._tokens)

    def __len__(self) -> int:
        return (len(self._tokens) - self.length - 1) // self.stride + 1

    def read(self, rows: Sequence[int]) -> Samples:
        """Rows of the stream with the documents that their tokens belong to; there are no targets."""
        index = np.asarray(rows, dtype=np.int64)
        places = index[:, None] * self.stride + np.arange(self.length + 1)
        tokens = torch.from_numpy(self._tokens[places].astype(np.int64))
        if len(self._first) == 1:
            segments = torch.zeros_like(tokens)
        else:
            document = np.searchsorted(self._first, places, side="right")
            segments = torch.from_numpy(document - document[:, :1])
        return Samples((tokens, segments), torch.full((len(index),), -1), torch.from_numpy(index))


def stream(texts: Iterable[str], tokenizer: Tokenizer, end: int | None) -> tuple[np.ndarray, np.ndarray]:
    """All tokens (N,) in the smallest type that holds them, and (documents,) int64 where documents begin.

    Each document is followed by the token `end`; one without a token is left out.
    """
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32
    parts: list[np.ndarray] = []
    lengths: list[int] = []
    for batch in _batches(_pieces(texts, tokenizer)):
        encoded = tokenizer.encode_batch([piece for piece, _ in batch])
        for ids, (_, begins) in zip(encoded, batch, strict=True):
            if begins:
                _close(parts, lengths, end, dtype)
                lengths.append(0)
            parts.append(np.asarray(ids, dtype=dtype))
            lengths[-1] += len(ids)
    _close(parts, lengths, end, dtype)
    first = np.cumsum([0, *lengths])[:-1].astype(np.int64)
    return np.concatenate([np.zeros(0, dtype), *parts]), first


def _close(parts: list[np.ndarray], lengths: list[int], end: int | None, dtype: type) -> None:
    """End the last document, or forget it."""
    if lengths and lengths[-1] == 0:
        lengths.pop()
    elif lengths and end is not None:
        parts.append(np.asarray([end], dtype=dtype))
        lengths[-1] += 1


def _pieces(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[tuple[str, bool]]:
    """Texts in pieces of bounded length that have the tokens of the whole, and whether each begins a document."""
    for text in texts:
        start, begins = 0, True
        while start < len(text):
            end = _cut(text, start + _PIECE, tokenizer)
            yield text[start:end], begins
            start, begins = end, False


def _cut(text: str, near: int, tokenizer: Tokenizer) -> int:
    """The first line end or space from `near` on where a cut changes no token, as its surroundings show."""
    tried, place = 0, near
    while place < len(text) and tried < 32:
        if text[place].isspace() or text[place - 1].isspace():
            before, after = text[place - _WINDOW : place], text[place : place + _WINDOW]
            whole, left, right = tokenizer.encode_batch([before + after, before, after])
            if whole == left + right:
                return place
            tried += 1
        place += 1
    return len(text)  # a tokenizer that no cut suits, or the end


def _batches(pieces: Iterator[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    batch: list[tuple[str, bool]] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece[0])
        if characters >= _BATCH * _PIECE:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
