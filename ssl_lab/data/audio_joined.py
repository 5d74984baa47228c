"""Connected speech made of single words: recordings of a labelled source, joined with pauses between them."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from ssl_lab.data.audio_text import Transcribed, TranscriptEncoder
from ssl_lab.data.audio_views import add_noise, check_span
from ssl_lab.data.source import Samples, Source
from ssl_lab.data.tokenizer import Tokenizer
from ssl_lab.errors import UserError
from ssl_lab.rng import fold, uniform

_DRAWS, _NOISE = 0x10B1, 0x10B2


class Words(Source, Protocol):
    """Clips of single words, such as `Clips` and `Tones`."""

    sampling_rate: int

    def transcripts(self, rows: Sequence[int]) -> list[str]:
        """The word at each of these rows."""
        ...


class Joined:
    """`length` utterances, each of several words of `source`, with a pause before, between and after them.

    How many words, which ones and how long the pauses are follows from (seed, row), so that a row is always the same
    utterance. It is made of rows of `source` alone: a source of test recordings gives test utterances. The transcript
    joins the words with blanks. `Samples.data` is a `Transcribed`, or without a `tokenizer` a list of (Si,) float32;
    there are no classes.

    Args:
        source: of single words, with classes or transcripts.
        length: utterances.
        tokenizer: of the transcripts, or its path; None = clips alone.
        words: fewest and most words of an utterance.
        pause: range in seconds.
        snr: range in dB of white noise over words and pauses; None = pauses are silent.
        seed: of the choice.
        end: transcripts end with the tokenizer's end token, as a decoder needs it.

    Raises:
        UserError: numbers that are none, a source of something else than words, or a word with a character that the
            tokenizer does not know.
    """

    unit = "utterances"

    def __init__(
        self,
        source: Words,
        length: int,
        tokenizer: Tokenizer | str | None = None,
        *,
        words: Sequence[int] = (1, 7),
        pause: Sequence[float] = (0.05, 0.4),
        snr: Sequence[float] | None = None,
        seed: int = 0,
        end: bool = False,
    ):
        if length < 1:
            raise UserError(f"{length} utterances are no data set: set length to at least 1")
        check_span("words", words, "words")
        check_span("pause", pause, "seconds")
        if snr is not None:
            check_span("snr", snr, "dB")
        if min(words) < 1 or min(pause) < 0:
            raise UserError(
                f"words={list(words)}, pause={list(pause)}: an utterance has words, and no pause is below 0"
            )
        if not hasattr(source, "transcripts"):
            raise UserError(f"utterances are joined of words, and the source holds {source.unit}: choose data=digits")
        self.source, self.length, self.snr = source, length, snr
        self.sampling_rate = source.sampling_rate
        self.classes: list[str] = []
        self._seed = fold(seed, _NOISE)
        u = uniform(fold(seed, _DRAWS), torch.arange(length), 2 + 2 * words[1])
        self._counts = words[0] + (u[:, 0] * (words[1] - words[0] + 1)).long()
        self._words = (u[:, 1 : 1 + words[1]] * len(source)).long()  # (N, most words) rows of the source
        seconds = pause[0] + (pause[1] - pause[0]) * u[:, 1 + words[1] :]
        self._pauses = (seconds * self.sampling_rate).long()  # (N, most words + 1) samples
        self.encode = None if tokenizer is None else TranscriptEncoder(tokenizer, end=end)
        if self.encode is not None:
            known = sorted(set(source.classes) or set(source.transcripts(range(min(len(source), 10_000)))))
            self.encode.check([[*known, " "]], "the source of words")

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Of the transcripts."""
        return None if self.encode is None else self.encode.tokenizer

    def __len__(self) -> int:
        return self.length

    @cached_property
    def lengths(self) -> Tensor:
        """(N,) int64: samples of each utterance, to batch alike by; only words where the source does not know more."""
        of_word: Tensor | None = getattr(self.source, "lengths", None)
        if of_word is None:
            return self._counts
        place = torch.arange(self._pauses.shape[1])
        words = (of_word[self._words] * (place[:-1] < self._counts[:, None])).sum(1)
        return words + (self._pauses * (place <= self._counts[:, None])).sum(1)

    def rows_of(self, row: int) -> list[int]:
        """The rows of the source that an utterance is made of."""
        found: list[int] = self._words[row, : int(self._counts[row])].tolist()
        return found

    def transcripts(self, rows: Sequence[int]) -> list[str]:
        """The words of each of these rows, joined with blanks."""
        return [" ".join(self.source.transcripts(self.rows_of(row))) for row in rows]

    def read(self, rows: Sequence[int]) -> Samples:
        """Utterances at `rows`."""
        words = [self.rows_of(row) for row in rows]
        samples = self.source.read([word for found in words for word in found])
        clips: list[Tensor] = samples.data.clips if isinstance(samples.data, Transcribed) else samples.data
        texts = self.source.transcripts(samples.rows.tolist())  # of what was really read
        made, transcripts, start = [], [], 0
        for row, found in zip(rows, words, strict=True):
            end = start + len(found)
            made.append(self._join(clips[start:end], self._pauses[row].tolist(), row))
            transcripts.append(" ".join(texts[start:end]))
            start = end
        data: Any = made if self.encode is None else Transcribed(made, transcripts, self.encode)
        return Samples(data, torch.full((len(rows),), -1), torch.tensor(rows, dtype=torch.int64))

    def _join(self, clips: Sequence[Tensor], pauses: Sequence[int], row: int) -> Tensor:
        parts = [torch.zeros(pauses[0])]
        for clip, pause in zip(clips, pauses[1:], strict=False):
            parts += [clip, torch.zeros(pause)]
        joined = torch.cat(parts)
        if self.snr is None:
            return joined
        (u,) = uniform(fold(self._seed, 0), torch.tensor([row]), 1)[0].tolist()
        return add_noise(joined, self.snr[0] + (self.snr[1] - self.snr[0]) * u, fold(self._seed, 1, row))
