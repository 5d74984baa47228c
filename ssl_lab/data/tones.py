"""The embedded world of sound: short words of tones and noise, generated from their index, without any file.

A word is a pattern in time: a tone that rises, falls or trembles, a burst or a train of noise. Its pitch, length,
timbre, depth, loudness and the noise around it are drawn independently of the word, so that neither its spectrum nor
its loudness tells it; what tells it is how it changes.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ssl_lab.data.audio import check_rate
from ssl_lab.data.audio_views import add_noise, check_span
from ssl_lab.data.source import Samples
from ssl_lab.errors import UserError
from ssl_lab.rng import fold, uniform

WORDS = ["rise", "fall", "peak", "dip", "hum", "trill", "buzz", "chime", "hiss", "knock"]
_DRAWS = 12
_SECONDS = (0.4, 0.8)
_PARTIALS = ((1.0, 1.0), (2.76, 0.6), (5.4, 0.3))  # of a struck bar: frequency and strength beside the first
_TOP = 0.45  # share of the sampling rate that no partial exceeds

Floats = np.ndarray


class Word(NamedTuple):
    """What is drawn for one word. Frequencies in Hz, `depth` in octaves, `level` the RMS, `snr` in dB."""

    kind: str
    samples: int
    pitch: float
    depth: float
    decay: float  # strength of each harmonic beside the one below it
    tremor: float  # how often a trill, a buzz or a knock beats in a second, within its own range: 0..1
    attack: float  # share of the word that it takes to begin, and to end
    level: float
    snr: float
    seed: int


class Tones:
    """`length` words of one split, made whenever they are read; classes are WORDS.

    `Samples.data` is a list of (Si,) float32. A word depends on (seed, split, index) and `sampling_rate` only: a longer
    set begins with the shorter one.

    Args:
        split: train or test.
        length: words.
        sampling_rate: in Hz.
        seed: of the world.
        snr: range in dB of the ratio of signal to white noise; None = no noise.
    """

    unit = "words"

    def __init__(
        self,
        split: Literal["train", "test"],
        length: int,
        *,
        sampling_rate: int = 8000,
        seed: int = 0,
        snr: Sequence[float] | None = (3.0, 30.0),
    ):
        if split not in ("train", "test"):
            raise UserError(f"tones has no split {split!r}: take train or test")
        if length < 1:
            raise UserError(f"{length} words are no data set: set length to at least 1")
        if snr is not None:
            check_span("snr", snr, "dB")
        self.length, self.sampling_rate, self.snr = length, check_rate(sampling_rate), snr
        self.classes = list(WORDS)
        self._seed = fold(seed, 0x70E5, split == "test")

    def __len__(self) -> int:
        return self.length

    @cached_property
    def lengths(self) -> Tensor:
        """(N,) int64: samples of each word."""
        return self._samples(uniform(self._seed, torch.arange(self.length), _DRAWS))

    def read(self, rows: Sequence[int]) -> Samples:
        """Words and which they are."""
        index = torch.tensor(rows, dtype=torch.int64)
        words = self.words(rows)
        clips = [render(word, self.sampling_rate) for word in words]
        return Samples(clips, torch.tensor([WORDS.index(word.kind) for word in words]), index)

    def transcripts(self, rows: Sequence[int]) -> list[str]:
        """The words."""
        return [word.kind for word in self.words(rows)]

    def words(self, rows: Sequence[int]) -> list[Word]:
        """What is drawn for each row."""
        u = uniform(self._seed, torch.tensor(rows, dtype=torch.int64), _DRAWS)
        samples = self._samples(u).tolist()
        low, high = self.snr or (np.inf, np.inf)
        return [
            Word(
                kind=WORDS[int(x[1] * len(WORDS))],
                samples=size,
                pitch=150 * 4 ** x[2],
                depth=0.5 + 0.7 * x[3],
                decay=0.3 + 0.5 * x[4],
                tremor=x[5],
                attack=0.05 + 0.1 * x[6],
                level=0.02 * 10 ** x[7],
                snr=low + (high - low) * x[8] if self.snr else np.inf,
                seed=fold(self._seed, 1, row),
            )
            for x, size, row in zip(u.tolist(), samples, rows, strict=True)
        ]

    def _samples(self, u: Tensor) -> Tensor:
        shortest, longest = _SECONDS
        return ((shortest + (longest - shortest) * u[:, 0]) * self.sampling_rate).long()


def render(word: Word, sampling_rate: int) -> Tensor:
    """(S,) float32 within [-1, 1]; the same word always gives the same samples."""
    time = np.arange(word.samples, dtype=np.float32) / np.float32(word.samples)
    found = _shape(word, time, sampling_rate)
    found *= np.float32(word.level / np.sqrt(np.square(found, dtype=np.float64).mean()))
    clip = torch.from_numpy(found.clip(-1, 1))
    return clip if word.snr == np.inf else add_noise(clip, word.snr, fold(word.seed, 1)).clamp_(-1, 1)


def _shape(word: Word, t: Floats, rate: int) -> Floats:
    """The word at the times `t` in 0..1 of its length, of any loudness. All arrays are (S,) float32."""
    seconds = word.samples / rate
    beats = np.float32(2 * np.pi * seconds) * t
    if word.kind in ("hiss", "knock"):
        noise = np.random.Generator(np.random.Philox(word.seed)).standard_normal(word.samples + 1, dtype=np.float32)
        if word.kind == "hiss":
            return np.diff(noise) * _fade(t, word.attack)
        place = (t * round(seconds * (4 + 4 * word.tremor))) % 1
        return noise[1:] * np.exp(-9 * place) * _fade(t, 0.02)
    if word.kind == "chime":
        heard = [(x, a) for x, a in _PARTIALS if x * word.pitch < _TOP * rate]
        found = sum((a * np.sin(beats * (word.pitch * x)) for x, a in heard), np.zeros_like(t))
        return found * np.exp(-5 * t) * _fade(t, 0.02)
    octaves = {
        "rise": t - 0.5,
        "fall": 0.5 - t,
        "peak": 0.5 - abs(2 * t - 1),
        "dip": abs(2 * t - 1) - 0.5,
        "trill": 0.3 * np.tanh(3 * np.sin(beats * (6 + 4 * word.tremor))),
    }.get(word.kind, np.zeros_like(t))
    frequency = word.pitch * np.exp2(word.depth * octaves)
    phase = np.cumsum(frequency, dtype=np.float64) * (2 * np.pi / rate) % (2 * np.pi)
    found = _harmonics(phase.astype(np.float32), word.decay, int(_TOP * rate / float(frequency.max())))
    if word.kind == "buzz":
        found *= 0.55 + 0.45 * np.tanh(2 * np.sin(beats * (20 + 15 * word.tremor)))
    return found * _fade(t, word.attack)


def _harmonics(phase: Floats, decay: float, count: int) -> Floats:
    """Sum over k = 1..min(count, 6) of decay^(k - 1) sin(k phase), each from the two before it."""
    before, now, twice = np.zeros_like(phase), np.sin(phase), 2 * np.cos(phase)
    found = now.copy()
    for k in range(1, min(count, 6)):
        before, now = now, twice * now - before
        found += decay**k * now
    return found


def _fade(t: Floats, share: float) -> Floats:
    """From 0 to 1 within `share` of the word, and back at its end."""
    edge = np.minimum(1, np.minimum(t, 1 - t) / share)
    return edge * edge * (3 - 2 * edge)
