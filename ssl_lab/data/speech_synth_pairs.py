"""Images with captions that are also spoken: for towers of three modalities."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from ssl_lab.data.audio import check_rate
from ssl_lab.data.pair_views import PairViews
from ssl_lab.data.pairs_text import Captioned
from ssl_lab.data.source import Samples, Source
from ssl_lab.data.speech_synth import Voice
from ssl_lab.data.views import Views
from ssl_lab.errors import UserError
from ssl_lab.rng import fold, uniform
from ssl_lab.types import Batch

log = logging.getLogger(__name__)

_SPOKEN = 0x590  # keeps the choice of the spoken caption apart from that of the written one
_READ = 4096  # rows whose captions are looked at together
_FULL = 32768.0  # full scale of 16 bits


class Captions(Source, Protocol):
    """A source of images with captions, such as `ShapesPairs` and `Pairs`."""

    def captions(self, rows: Sequence[int]) -> list[list[str]]:
        """All captions of each of these rows."""
        ...


@dataclass(slots=True)
class Spoken:
    """What the views take: images with captions, and for each row its spoken captions, (S,) int16 each."""

    pairs: Captioned
    clips: list[list[Tensor]]


class SpokenPairs:
    """The rows of a source of captioned images with some of their captions spoken.

    All different captions are spoken when the first row is read, in alphabetical order, each by every voice of `voice`,
    and kept in memory as 16-bit samples; rows with the same caption share it. What else the source can do, this can.

    Args:
        source: of images with captions.
        voice: says texts.
        sampling_rate: in Hz.
        captions: of each row, its first so many; None = all.
        most: different texts that are spoken at most: more would be slow and fill the memory.

    Raises:
        UserError: a source without captions, or with too many.
    """

    def __init__(
        self,
        source: Captions,
        voice: Voice,
        *,
        sampling_rate: int = 16000,
        captions: int | None = 1,
        most: int = 50_000,
    ) -> None:
        if not hasattr(source, "captions") or getattr(source, "encode", None) is None:
            raise UserError(f"captions are spoken, and the source holds {source.unit} without: give pairs, a tokenizer")
        if captions is not None and captions < 1:
            raise UserError(f"captions={captions}: at least 1 of each image is spoken, or all of them with null")
        self.source, self.voice, self.sampling_rate = source, voice, check_rate(sampling_rate)
        self.count, self.most = captions, most
        self.classes, self.unit = source.classes, source.unit

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "source":  # not there yet while one is copied
            raise AttributeError(name)
        return getattr(self.source, name)

    def __len__(self) -> int:
        return len(self.source)

    def read(self, rows: Sequence[int]) -> Samples:
        """As the source, `Samples.data` being a `Spoken`."""
        said = self._said
        samples = self.source.read(rows)
        texts = self.spoken(samples.rows.tolist())
        clips = [[clip for text in own for clip in said[text]] for own in texts]
        return Samples(Spoken(samples.data, clips), samples.targets, samples.rows)

    def spoken(self, rows: Sequence[int]) -> list[list[str]]:
        """The captions of each of these rows that are spoken."""
        return [captions[: self.count] for captions in self.source.captions(rows)]

    @cached_property
    def _said(self) -> dict[str, list[Tensor]]:
        texts = set[str]()
        for start in range(0, len(self), _READ):
            rows = range(start, min(start + _READ, len(self)))
            texts.update(text for own in self.spoken(list(rows)) for text in own)
        if len(texts) > self.most:
            raise UserError(
                f"{len(texts):,} different captions are too many to be spoken: set captions to a smaller number, take "
                f"fewer rows, or raise most={self.most:,}"
            )
        listed = sorted(texts)
        said = dict(zip(listed, self.voice.say(listed, self.sampling_rate), strict=True))
        total = sum(len(clip) for clips in said.values() for clip in clips)
        log.info("%s spoken: %.1f minutes, %d MiB", f"{len(listed):,} captions", total / self.sampling_rate / 60,
                 2 * total >> 20)  # fmt: skip
        return said


class SpokenViews:
    """`Spoken` -> the keys of `pairs`, and `audio` (B, S) float32, `audio_valid` (B, S) bool of one spoken caption.

    Which one is drawn by (seed, position), apart from the written one; in evaluation the first.

    Args:
        pairs: of images and written captions.
        audio: of sound, such as `AudioViews`.
        draw: whether a spoken caption is drawn, or else the first is taken.
    """

    def __init__(self, pairs: PairViews, audio: Views, *, draw: bool = True) -> None:
        self.pairs, self.audio, self.draw, self.stats = pairs, audio, draw, pairs.stats

    def __call__(self, data: Spoken, position: Tensor, seed: int) -> Batch:
        if not isinstance(data, Spoken):
            raise UserError("these views need spoken captions: choose e.g. data=shapes_spoken")
        batch = self.pairs(data.pairs, position, seed)
        draws = [0.0] * len(data.clips)
        if self.draw:
            draws = uniform(fold(seed, _SPOKEN), position.cpu(), 1)[:, 0].tolist()
        chosen = [clips[min(int(u * len(clips)), len(clips) - 1)] for u, clips in zip(draws, data.clips, strict=True)]
        sound = self.audio([clip.to(torch.float32) / _FULL for clip in chosen], position, seed)
        batch["audio"], batch["audio_valid"] = sound["audio"], sound["audio_valid"]
        return batch
