"""Sequences of unequal length as one batch: sentences and pairs of them, translations, questions on a text."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ssl_lab.data.tokenizer import Tokenizer, as_tokenizer
from ssl_lab.errors import UserError
from ssl_lab.types import Batch

IGNORE = -100  # a label that is not scored
_STEP = 8  # lengths are rounded up to a multiple of this: fewer shapes to compile, and kernels like it

Ragged = list[np.ndarray]  # B sequences of token ids, integers of any size


class PadSentences:
    """Sentences or pairs of them -> `tokens`, `types`, `valid` (B, L): [CLS] a [SEP], or [CLS] a [SEP] b [SEP].

    Where the tokenizer has no such tokens, there is none before a sentence, and end-of-text after it. What is longer
    than `max_length` loses its end, of a pair the longer one first (as in transformers). L is the longest of the batch
    rounded up to a multiple of 8, or `max_length` if `fixed`. The targets come with the samples.
    """

    def __init__(self, tokenizer: Tokenizer | str, *, max_length: int = 128, fixed: bool = False):
        self.tokenizer, self.max_length, self.fixed = as_tokenizer(tokenizer), max_length, fixed
        _check_length(max_length)

    def __call__(self, data: tuple[Ragged, ...], position: Tensor, seed: int) -> Batch:
        """Nothing is drawn."""
        tokens, types, valid = joined(list(zip(*data, strict=True)), self.tokenizer, self.max_length, self.fixed)
        return {"tokens": tokens, "types": types, "valid": valid}


class PadTranslations:
    """Pairs of a sentence and its translation -> `tokens`, `valid` (B, L) of the source, `labels` (B, T) of the target.

    Each ends with end-of-text, after at most `max_length` - 1 tokens. Labels are padded with -100; a decoder reads them
    shifted right. L and T are the longest of the batch rounded up to a multiple of 8, or `max_length` if `fixed`.

    Raises:
        UserError: the tokenizer has no end-of-text token.
    """

    def __init__(self, tokenizer: Tokenizer | str, *, max_length: int = 128, fixed: bool = False):
        self.tokenizer, self.max_length, self.fixed = as_tokenizer(tokenizer), max_length, fixed
        (self.eos,) = self.tokenizer.require("eos")
        _check_length(max_length)

    def __call__(self, data: tuple[Ragged, Ragged], position: Tensor, seed: int) -> Batch:
        """Nothing is drawn."""
        source, target = ([[*x[: self.max_length - 1].tolist(), self.eos] for x in side] for side in data)
        length = self.max_length if self.fixed else None
        tokens = padded(source, padding(self.tokenizer), length)
        valid = padded([[1] * len(x) for x in source], 0, length).bool()
        return {"tokens": tokens, "valid": valid, "labels": padded(target, IGNORE, length)}


class PadQuestions:
    """Windows of `Questions` -> `tokens`, `types`, `valid` (B, L) and `span` (B, 2): [CLS] question [SEP] text [SEP].

    `span` holds the places of the first and the last token of the answer in `tokens`, both 0 where the window does not
    hold all of it. L is the longest of the batch rounded up to a multiple of 8, or `max_length` if that is given.
    """

    def __init__(self, tokenizer: Tokenizer | str, *, max_length: int | None = None):
        self.tokenizer, self.max_length = as_tokenizer(tokenizer), max_length

    def __call__(self, data: tuple[Ragged, Ragged, Tensor], position: Tensor, seed: int) -> Batch:
        """Nothing is drawn."""
        questions, texts, span = data
        pairs = list(zip(questions, texts, strict=True))
        tokens, types, valid = joined(pairs, self.tokenizer, self.max_length, self.max_length is not None)
        return {"tokens": tokens, "types": types, "valid": valid, "span": span}


def joined(
    rows: Sequence[Sequence[np.ndarray]], tokenizer: Tokenizer, max_length: int | None, fixed: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Sentences or pairs with the special tokens around them -> tokens, types (int64) and valid (bool), all (B, L)."""
    before, after = around(tokenizer)
    tokens, types = [], []
    for row in rows:
        parts = [part.tolist() for part in row]
        if max_length is not None:
            _shorten(parts, max_length - len(before) - len(parts) * len(after))
        tokens.append(before + [x for part in parts for x in [*part, *after]])
        type_of = [[i] * (len(part) + len(after)) for i, part in enumerate(parts)]
        types.append([0] * len(before) + [x for part in type_of for x in part])
    length = max_length if fixed else None
    valid = padded([[1] * len(row) for row in tokens], 0, length).bool()
    return padded(tokens, padding(tokenizer), length), padded(types, 0, length), valid


def around(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Tokens before a sequence, and after each of its sentences."""
    after = tokenizer.eos if tokenizer.sep is None else tokenizer.sep
    return ([] if tokenizer.cls is None else [tokenizer.cls]), ([] if after is None else [after])


def padding(tokenizer: Tokenizer) -> int:
    """The token that fills up; where there is none for it, 0, which `valid` hides as well."""
    return tokenizer.pad or 0


def padded(rows: Sequence[Sequence[int]], value: int, length: int | None = None) -> Tensor:
    """(B, L) int64: sequences filled up with `value` to `length`, or to the longest, rounded up."""
    longest = max(map(len, rows), default=0)
    out = torch.full((len(rows), length or max(-(-longest // _STEP) * _STEP, _STEP)), value)
    for target, row in zip(out, rows, strict=True):
        target[: len(row)] = torch.tensor(row, dtype=torch.int64)
    return out


def _shorten(parts: list[list[int]], room: int) -> None:
    """Drop last tokens until one or two parts fit into `room`: of the longer part, and of both once they are alike."""
    if sum(map(len, parts)) > room:
        short, long = min(parts, key=len), parts[0] if len(parts) == 1 or len(parts[0]) > len(parts[1]) else parts[1]
        least = 0 if len(parts) == 1 else min(len(short), max(room, 0) // 2)
        del long[max(room - least, 0) :]
        if len(parts) == 2:
            del short[least:]


def _check_length(max_length: int) -> None:
    if max_length < _STEP:
        raise UserError(f"max_length is {max_length}: it must be at least {_STEP} tokens")
