"""From clips to what a method hears: speed, crop, gain and noise for training, the clip itself for evaluation.

Like all views they map (`Samples.data`, position, seed) to keys of a batch, and what is drawn depends on (seed,
position) alone. Spectrograms are made from the samples on the training device, in the backbone.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ssl_lab.data.audio import check_rate
from ssl_lab.data.audio_speed import change_speed
from ssl_lab.data.audio_text import Transcribed
from ssl_lab.errors import UserError
from ssl_lab.rng import fold, uniform
from ssl_lab.types import Batch

Clips = list[Tensor] | Transcribed

_NOISE = 0xA015E  # keeps the noise apart from the other draws
_SLOWEST, _FASTEST = 0.25, 4.0


class WholeAudio:
    """Clips -> `audio` (B, S) float32, `audio_valid` (B, S) bool, and `labels` where there are transcripts.

    S is the longest of the batch rounded up to a multiple of `step`, and no less than `shortest`; what is shorter ends
    in zeros. Nothing is drawn.

    Args:
        sampling_rate: in Hz.
        seconds: a longer clip is cut to so much of its middle; None = whole clips.
        fixed: S is always `seconds`, for a model of one length.
        shortest: seconds; a shorter clip is followed by silence that counts as its own, so that none has too few
            frames for a model.
        step: seconds; few different lengths are compiled and planned for once each.

    Raises:
        UserError: lengths that are none, or a cut of clips with transcripts.
    """

    def __init__(
        self,
        sampling_rate: int,
        *,
        seconds: float | None = None,
        fixed: bool = False,
        shortest: float = 0.2,
        step: float = 0.1,
    ):
        self.sampling_rate, self.fixed = check_rate(sampling_rate), fixed
        for name, value in (("shortest", shortest), ("step", step)):
            if not 0 < value <= 60:
                raise UserError(f"{name} is {value}: give a length in seconds, such as 0.1")
        if seconds is not None and seconds < shortest:
            raise UserError(f"seconds is {seconds}: it must be at least shortest={shortest}, or null for whole clips")
        if fixed and seconds is None:
            raise UserError("fixed=true needs a length: set seconds")
        self.shortest, self.step = round(shortest * sampling_rate), max(1, round(step * sampling_rate))
        self.longest = None if seconds is None else round(seconds * sampling_rate)

    def __call__(self, data: Clips, position: Tensor, seed: int) -> Batch:
        """`position` and `seed` are not needed."""
        return self.batch([self.cut(clip, 0.5) for clip in self.clips_of(data)], data)

    def clips_of(self, data: Clips) -> list[Tensor]:
        """The clips, if they are any, and if they may be cut."""
        clips = data.clips if isinstance(data, Transcribed) else data
        if not isinstance(clips, list) or not clips or clips[0].dim() != 1:
            raise UserError("these views need sound: choose e.g. data=tones, data=audio or data=speech")
        if self.longest is not None and isinstance(data, Transcribed):
            raise UserError(
                "seconds cuts clips, and transcripts would not fit any more: set it to null, or take the clips alone "
                "with data.tokenizer=null"
            )
        return clips

    def cut(self, clip: Tensor, place: float) -> Tensor:
        """No more than `seconds` of a clip, from the beginning (`place` 0) to the end (1)."""
        if self.longest is None or len(clip) <= self.longest:
            return clip
        start = round(place * (len(clip) - self.longest))
        return clip[start : start + self.longest]

    def batch(self, clips: list[Tensor], data: Clips) -> Batch:
        """Clips of any length, filled up, with the labels of `data`."""
        own = torch.tensor([max(len(clip), self.shortest) for clip in clips])
        size = -(-int(own.max()) // self.step) * self.step
        if self.longest is not None:
            size = self.longest if self.fixed else min(size, self.longest)
        audio = torch.zeros(len(clips), size)
        for row, clip in zip(audio, clips, strict=True):
            row[: len(clip)] = clip
        batch: Batch = {"audio": audio, "audio_valid": torch.arange(size) < own[:, None]}
        if isinstance(data, Transcribed):
            batch.update(data.encode(data.transcripts))
        return batch


class AudioViews:
    """As `WholeAudio`, of clips that are changed at random: played at another speed, cut, made louder, with noise.

    Args:
        sampling_rate: in Hz.
        seconds: a longer clip is cut to so much, from anywhere in it; None = whole clips.
        fixed: as in `WholeAudio`, like the next two.
        shortest: seconds.
        step: seconds.
        speed: factors, of which one is drawn; 1 leaves a clip as it is.
        gain: range in dB of the change in loudness.
        snr: range in dB of the ratio of signal to white noise. The signal is the mean power of the clip, so silence
            gets no noise.
        noise_p: probability of noise.

    Raises:
        UserError: lengths, factors or ranges that are none, or a cut of clips with transcripts.
    """

    def __init__(
        self,
        sampling_rate: int,
        *,
        seconds: float | None = None,
        fixed: bool = False,
        shortest: float = 0.2,
        step: float = 0.1,
        speed: Sequence[float] = (0.9, 1.0, 1.1),
        gain: Sequence[float] = (-6.0, 6.0),
        snr: Sequence[float] = (10.0, 40.0),
        noise_p: float = 0.5,
    ):
        self.whole = WholeAudio(sampling_rate, seconds=seconds, fixed=fixed, shortest=shortest, step=step)
        if not speed or not all(_SLOWEST <= factor <= _FASTEST for factor in speed):
            raise UserError(f"speed is {list(speed)}: give factors from {_SLOWEST} to {_FASTEST}, [1.0] for none")
        for name, span in (("gain", gain), ("snr", snr)):
            check_span(name, span, "dB")
        if not 0 <= noise_p <= 1:
            raise UserError(f"noise_p is {noise_p}: a probability lies between 0 and 1")
        self.speed, self.gain, self.snr, self.noise_p = tuple(speed), tuple(gain), tuple(snr), noise_p

    def __call__(self, data: Clips, position: Tensor, seed: int) -> Batch:
        clips = self.whole.clips_of(data)
        position = position.cpu()
        draws = uniform(seed, position, 5).tolist()
        made = [
            self._one(clip, u, fold(seed, _NOISE, place))
            for clip, u, place in zip(clips, draws, position.tolist(), strict=True)
        ]
        return self.whole.batch(made, data)

    def _one(self, clip: Tensor, u: list[float], seed: int) -> Tensor:
        speed, place, gain, noisy, snr = u
        clip = self.whole.cut(change_speed(clip, self.speed[int(speed * len(self.speed))]), place)
        if noisy < self.noise_p:
            clip = add_noise(clip, self.snr[0] + (self.snr[1] - self.snr[0]) * snr, seed)
        return clip * 10 ** ((self.gain[0] + (self.gain[1] - self.gain[0]) * gain) / 20)


def add_noise(clip: Tensor, snr: float, seed: int) -> Tensor:
    """(S,) float32 with white noise `snr` dB below its mean power; the same `seed` gives the same noise."""
    power = np.square(clip.numpy(), dtype=np.float64).mean()  # torch's sums depend on the number of threads
    level = float(np.sqrt(power)) * 10 ** (-snr / 20)
    if not level:
        return clip
    return clip + level * torch.randn(len(clip), generator=torch.Generator().manual_seed(seed))


def check_span(name: str, span: Sequence[float], unit: str) -> None:
    """A `UserError` unless `span` is two numbers, the smaller one first."""
    if len(span) != 2 or not span[0] <= span[1]:
        raise UserError(f"{name} is {list(span)}: give two numbers in {unit}, the smaller one first")
