"""From waveforms to log-mel filterbanks, on the device that trains and with exact masks."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ssl_lab.errors import UserError

Style = Literal["htk", "slaney", "kaldi"]
Window = Literal["hann", "hamming", "povey"]


class LogMel(nn.Module):
    """Waveforms (B, S) float -> log-mel energies (B, T, F) float32 and the frames (B, T) bool that are real.

    A frame is valid if its whole window lies in valid samples, so what follows an utterance never changes it; there are
    T = (S - window) // hop + 1 of them. Invalid frames are 0. float64 in gives float64 out. The tables stay float64
    whatever a model is cast to.

    Args:
        sampling_rate: samples per second.
        num_mels: mel bins F.
        style: which definition. "kaldi" (torchaudio.compliance.kaldi.fbank and the feature extractors of AST, Seamless
            and wav2vec2-BERT): each frame loses its mean and is pre-emphasised by 0.97, triangles are linear in mels.
            "htk" (torchaudio's MelSpectrogram): triangles linear in Hz. "slaney" (librosa): Slaney's mels, triangles of
            equal area.
        window: shape of the window, symmetric for "kaldi", else periodic; "povey" is a Hann window to the power 0.85.
        window_ms: its length in milliseconds.
        hop_ms: from one frame to the next, in milliseconds.
        band: lowest and highest frequency in Hz; None = half of the sampling rate.
        gain: factor on the samples; Kaldi's programs read 16-bit integers, that is 2 ** 15.
        floor: smallest energy before the logarithm; by default the epsilon of float32.
        norm: "utterance" = mean and deviation of each bin over the valid frames of its utterance (with the rule of
            Seamless: divisor n - 1, 1e-7 on the variance), "global" = by `mean` and `std`, or "none".
        mean: for "global", a number or one for each bin.
        std: likewise.

    Raises:
        UserError: more than a tenth of the bins see no frequency of the transform, or "global" without its numbers.
    """

    window: Tensor
    filters: Tensor
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        sampling_rate: int = 16000,
        num_mels: int = 80,
        *,
        style: Style = "kaldi",
        window: Window = "povey",
        window_ms: float = 25.0,
        hop_ms: float = 10.0,
        band: tuple[float, float | None] = (20.0, None),
        gain: float = 1.0,
        floor: float = 1.192092955078125e-07,
        norm: Literal["utterance", "global", "none"] = "utterance",
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if norm == "global" and (mean is None or std is None):
            raise UserError("norm=global needs the mean and std to normalise by: name both, or norm=utterance")
        self.sampling_rate, self.num_mels, self.style, self.norm = sampling_rate, num_mels, style, norm
        self.gain, self.floor = gain, floor
        self.length, self.hop = round(sampling_rate * window_ms / 1000), round(sampling_rate * hop_ms / 1000)
        self.transform = 2 ** math.ceil(math.log2(self.length))
        with torch.device("cpu"):  # numbers are looked at, also where weights have no memory
            filters = mel_filters(sampling_rate, num_mels, self.transform, style=style, band=band)
        empty = int((filters.amax(0) == 0).sum())
        if empty > num_mels / 10:  # AST's own 128 bins have one; it is the constant log(floor)
            raise UserError(
                f"{empty} of {num_mels} mel bins are narrower than the {sampling_rate / self.transform:.1f} Hz between "
                f"two frequencies of a {window_ms} ms window at {sampling_rate} Hz: choose a smaller num_mels"
            )
        tables = {"window": window_shape(window, self.length, periodic=style != "kaldi"), "filters": filters}
        tables |= {
            name: torch.as_tensor(value or 0.0, dtype=torch.float64) for name, value in (("mean", mean), ("std", std))
        }
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=False)

    def forward(self, audio: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Audio (B, S) with the samples (B, S) bool that are real, padding at the end; all are by default.

        Raises:
            UserError: not (B, S), e.g. stereo.
        """
        if audio.dim() != 2:
            raise UserError(f"expected mono waveforms (B, S), not {tuple(audio.shape)}: mix channels down first")
        samples = audio.new_full((len(audio),), audio.shape[1], dtype=torch.int64) if valid is None else valid.sum(1)
        features = self.energies(audio)
        at = torch.arange(features.shape[1], device=audio.device)
        real = at < self.frames(samples)[:, None]
        return self._normed(features, real[..., None]), real

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "LogMel":
        """As nn.Module, for `to` and its like, but the tables only change their place, not their dtype."""
        exact = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, table in exact.items():
            moved = self.get_buffer(name)
            if moved.dtype != table.dtype:
                setattr(self, name, table.to(moved.device))
        return self

    def frames(self, samples: Tensor) -> Tensor:
        """How many frames fit into so many samples; 0 if none does."""
        return ((samples - self.length).div(self.hop, rounding_mode="floor") + 1).clamp(min=0)

    def energies(self, audio: Tensor) -> Tensor:
        """(B, S) -> log energies (B, T, F) that are not normalised; an input without a whole frame gives T = 1."""
        with torch.autocast(audio.device.type, enabled=False):
            audio = audio if audio.dtype == torch.float64 else audio.float()
            audio = nn.functional.pad(audio, (0, max(0, self.length - audio.shape[1])))
            frames = (audio * self.gain).unfold(1, self.length, self.hop)
            if self.style == "kaldi":
                frames = frames - frames.mean(-1, keepdim=True)
                before = torch.cat([frames[..., :1], frames[..., :-1]], -1)
                frames = torch.sub(frames, before, alpha=0.97)
            spectrum = torch.fft.rfft(frames * self.window.to(audio.dtype), self.transform)
            power = spectrum.real.square() + spectrum.imag.square()
            return (power @ self.filters.to(audio.dtype)).clamp(min=self.floor).log()

    def _normed(self, features: Tensor, real: Tensor) -> Tensor:
        """Features (B, T, F), frames (B, T, 1)."""
        if self.norm == "utterance":
            count = real.sum(1, keepdim=True)
            features = features.masked_fill(~real, 0)
            features = features - features.sum(1, keepdim=True) / count.clamp(min=1)
            variance = features.masked_fill(~real, 0).square().sum(1, keepdim=True) / (count - 1).clamp(min=1)
            features = features * (variance + 1e-7).rsqrt()
        elif self.norm == "global":
            features = (features - self.mean.to(features.dtype)) / self.std.to(features.dtype)
        return features.masked_fill(~real, 0)


def window_shape(name: Window, length: int, *, periodic: bool) -> Tensor:
    """(length,) float64."""
    if name == "hamming":
        return torch.hamming_window(length, periodic, dtype=torch.float64)
    hann = torch.hann_window(length, periodic, dtype=torch.float64)
    return hann**0.85 if name == "povey" else hann


def mel_filters(
    sampling_rate: int,
    num_mels: int,
    transform: int,
    *,
    style: Style = "htk",
    band: tuple[float, float | None] = (0.0, None),
) -> Tensor:
    """Triangles (transform // 2 + 1, num_mels) float64 over the frequencies of a Fourier transform of that length."""
    low, high = torch.tensor([band[0], band[1] or sampling_rate / 2], dtype=torch.float64)
    corners = torch.linspace(float(_mels(low, style)), float(_mels(high, style)), num_mels + 2, dtype=torch.float64)
    at = torch.arange(transform // 2 + 1, dtype=torch.float64) * (sampling_rate / transform)
    if style == "kaldi":
        at = _mels(at, style)
    else:
        corners = _hertz(corners, style)
    width = corners.diff()
    rising = (at[:, None] - corners[:-2]) / width[:-1]
    falling = (corners[2:] - at[:, None]) / width[1:]
    filters = torch.minimum(rising, falling).clamp(min=0)
    return filters * (2 / (corners[2:] - corners[:-2])) if style == "slaney" else filters


_STEP = 27 / math.log(6.4)  # Slaney's mels per e-fold above 1000 Hz, which is mel 15


def _mels(hertz: Tensor, style: Style) -> Tensor:
    if style == "htk":
        return 2595 * (1 + hertz / 700).log10()
    if style == "kaldi":
        return 1127 * (1 + hertz / 700).log()
    return torch.where(hertz < 1000, hertz * 3 / 200, 15 + (hertz.clamp(min=1000) / 1000).log() * _STEP)


def _hertz(mels: Tensor, style: Style) -> Tensor:
    if style == "htk":
        return 700 * (10 ** (mels / 2595) - 1)
    if style == "kaldi":
        return 700 * ((mels / 1127).exp() - 1)
    return torch.where(mels < 15, mels * 200 / 3, 1000 * ((mels.clamp(min=15) - 15) / _STEP).exp())
