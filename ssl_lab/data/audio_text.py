"""Transcripts as labels, and what a source of speech hands to the views."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ssl_lab.data.text_pad import IGNORE, padded
from ssl_lab.data.tokenizer import Tokenizer, as_tokenizer
from ssl_lab.errors import UserError
from ssl_lab.types import Batch


class TranscriptEncoder:
    """Transcripts -> `labels` (B, L) int64: their tokens without any special one, then -100.

    L is the longest of the batch rounded up to a multiple of 8. With `end` the tokenizer's end token stands after each
    transcript, for a decoder that must learn when to stop; CTC needs none.

    Raises:
        UserError: the tokenizer has no end token, and one is asked for.
    """

    def __init__(self, tokenizer: Tokenizer | str, *, end: bool = False):
        self.tokenizer = as_tokenizer(tokenizer)
        if end and self.tokenizer.eos is None:
            raise UserError(
                "end=true needs a tokenizer with an end token: set data.tokenizer.special=[<pad>,</s>], or give one "
                "that has it"
            )
        self.end: list[int] = self.tokenizer.require("eos") if end else []

    def __call__(self, transcripts: Sequence[str]) -> Batch:
        """Nothing is drawn.

        Raises:
            UserError: a character that the tokenizer does not know.
        """
        try:
            rows = [[*row, *self.end] for row in self.tokenizer.encode_batch(list(transcripts))]
            return {"labels": padded(rows, IGNORE)}
        except UserError:
            self._blame(transcripts)
            raise

    def check(self, transcripts: Iterable[Sequence[str]], origin: str) -> None:
        """Look through all transcripts, given in parts, before a run begins.

        Raises:
            UserError: a character, or word, that the tokenizer does not know, with the transcript that has it.
        """
        for part in transcripts:
            try:
                self.tokenizer.require_known(part)
            except UserError:
                self._blame(part, f"{origin}: ")
                raise

    def _blame(self, transcripts: Sequence[str], origin: str = "") -> None:
        for text in transcripts:
            try:
                self.tokenizer.encode(text)
            except UserError as error:
                shown = text if len(text) <= 80 else f"{text[:77]}..."
                raise UserError(f"{origin}the transcript {shown!r} cannot be learned: {error}") from None


@dataclass(slots=True)
class Transcribed:
    """What the views take of clips with transcripts.

    `clips` are (Si,) float32; `transcripts` one text for each; `encode` makes labels of them.
    """

    clips: list[Tensor]
    transcripts: list[str]
    encode: TranscriptEncoder
