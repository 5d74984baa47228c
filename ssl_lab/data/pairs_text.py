"""Captions as token rows, and what a source of images with captions hands to the views."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ssl_lab.data.text_pad import padded, padding
from ssl_lab.data.tokenizer import Tokenizer, as_tokenizer
from ssl_lab.errors import UserError
from ssl_lab.types import Batch

log = logging.getLogger(__name__)

_SAMPLE = 5000  # captions whose lengths are looked at


class CaptionEncoder:
    """Texts -> `tokens` (B, L) int64 and `valid` (B, L) bool: [begin] words [end], then padding.

    Begin and end are the tokenizer's bos and eos tokens, or [CLS] and [SEP] where it has those; a begin may be lacking.
    A text that is too long loses its last words and keeps the end. L is `context_length`, or with `fixed=False` the
    longest of the batch rounded up to a multiple of 8.

    Attributes:
        cut: texts that were too long so far, in this process.

    Raises:
        UserError: no end token, or a context of fewer than 3 tokens.
    """

    def __init__(self, tokenizer: Tokenizer | str, context_length: int = 77, *, fixed: bool = True):
        self.tokenizer, self.context_length, self.fixed = as_tokenizer(tokenizer), context_length, fixed
        if context_length < 3:
            raise UserError(
                f"context_length is {context_length}: a caption needs at least 3 tokens, with begin and end"
            )
        begin = self.tokenizer.bos if self.tokenizer.bos is not None else self.tokenizer.cls
        end = self.tokenizer.eos if self.tokenizer.eos is not None else self.tokenizer.sep
        if end is None:
            raise UserError("captions need a tokenizer with an end token, <|endoftext|> or [SEP]; this one has none")
        self.begin, self.end = ([] if begin is None else [begin]), end
        self.cut = 0

    def __call__(self, texts: Sequence[str]) -> Batch:
        """Nothing is drawn."""
        room = self.context_length - len(self.begin) - 1
        rows: list[list[int]] = []
        for ids in self.tokenizer.encode_batch(list(texts)):
            self.cut += len(ids) > room
            rows.append([*self.begin, *ids[:room], self.end])
        length = self.context_length if self.fixed else None
        tokens = padded(rows, padding(self.tokenizer), length)[:, : self.context_length]
        lengths = torch.tensor([len(row) for row in rows])
        return {"tokens": tokens, "valid": torch.arange(tokens.shape[1]) < lengths[:, None]}

    def report(self, captions: Sequence[str], total: int, origin: str) -> int:
        """Warn if some of these captions, of `total` that there are, are too long; gives their number.

        Raises:
            UserError: more than half of them are.
        """
        lengths = [len(ids) + len(self.begin) + 1 for ids in self.tokenizer.encode_batch(list(captions))]
        long = sum(length > self.context_length for length in lengths)
        if not long:
            return 0
        of = f"{len(lengths):,} captions" + (f" (a sample of {total:,} images' captions)" if total else "")
        found = f"{origin}: {long:,} of {of} are longer than context_length={self.context_length}"
        longest = f"the longest takes {max(lengths)} tokens"
        if 2 * long > len(lengths):
            raise UserError(f"{found}; {longest}: set data.train.context_length={max(lengths)}, or shorten them")
        log.warning("%s and lose their end; %s", found, longest)
        return long


@dataclass(slots=True)
class Captioned:
    """What the views take of images with captions.

    `images` as in `Samples`; `captions` holds for each image one text or several; `encode` makes tokens of texts.
    """

    images: Any
    captions: list[list[str]]
    encode: CaptionEncoder


def spread(length: int, per_image: int = 1) -> range:
    """Evenly spaced rows whose captions are looked at, of so many."""
    wanted = max(1, _SAMPLE // per_image)
    return range(0, length, max(1, -(-length // wanted)))
