"""Networks on raw waveforms, as in wav2vec 2.0 (arXiv:2006.11477): strided convolutions, and positions by convolution.

Both know which samples are real, so that padding never changes a result.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_lab.errors import UserError


class ConvFeatures(nn.Module):
    """Waveforms (B, S) -> features (B, T, C) and the frames (B, T) bool that saw nothing but valid samples.

    Convolutions without padding, each followed by GELU. Frames that are not valid are 0. Weights begin as
    `nn.init.kaiming_normal_` makes them.

    Args:
        sampling_rate: samples per second.
        channels: C of every convolution.
        kernels: of the convolutions, in samples of what comes in.
        strides: likewise; together, with a rate of 16 kHz, a frame each 20 ms.
        norm: "group" = after the first convolution, each channel over the valid frames of its utterance (Base);
            "layer" = after each, each frame over its channels (Large).
        bias: of the convolutions; Large has it, Base has not.
        normalize: waveforms first get mean 0 and deviation 1 over their valid samples.

    Raises:
        UserError: not a stride for each kernel.
    """

    def __init__(
        self,
        sampling_rate: int = 16000,
        channels: int = 512,
        *,
        kernels: Sequence[int] = (10, 3, 3, 3, 3, 2, 2),
        strides: Sequence[int] = (5, 2, 2, 2, 2, 2, 2),
        norm: Literal["group", "layer"] = "group",
        bias: bool = False,
        normalize: bool = True,
    ) -> None:
        super().__init__()
        if len(kernels) != len(strides) or not kernels:
            raise UserError(f"{len(kernels)} kernels with {len(strides)} strides: name one stride for each kernel")
        self.sampling_rate, self.channels, self.normalize = sampling_rate, channels, normalize
        self.hop = math.prod(strides)
        self.receptive = 1 + sum((k - 1) * math.prod(strides[:i]) for i, k in enumerate(kernels))
        self.convs = nn.ModuleList(
            nn.Conv1d(channels if i else 1, channels, kernel, stride, bias=bias)
            for i, (kernel, stride) in enumerate(zip(kernels, strides, strict=True))
        )
        for conv in self.convs:
            assert isinstance(conv, nn.Conv1d)
            nn.init.kaiming_normal_(conv.weight)
        norms = [UtteranceNorm(channels)] if norm == "group" else [nn.LayerNorm(channels) for _ in kernels]
        self.norms = nn.ModuleList(norms)

    def forward(self, audio: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Audio (B, S) with the samples (B, S) bool that are real, padding at the end; all are by default.

        Raises:
            UserError: not (B, S), e.g. stereo.
        """
        if audio.dim() != 2:
            raise UserError(f"expected mono waveforms (B, S), not {tuple(audio.shape)}: mix channels down first")
        lengths = audio.new_full((len(audio),), audio.shape[1], dtype=torch.int64) if valid is None else valid.sum(1)
        if self.normalize:
            audio = _standardized(audio, lengths)
        audio = audio.to(self.convs[0].get_parameter("weight").dtype)  # after the norm, which few bits would spoil
        x = F.pad(audio, (0, max(0, self.receptive - audio.shape[1])))[..., None]
        for i, conv in enumerate(self.convs):
            assert isinstance(conv, nn.Conv1d)
            lengths = ((lengths - conv.kernel_size[0]).div(conv.stride[0], rounding_mode="floor") + 1).clamp(min=0)
            x = _convolved(x, conv)
            if i < len(self.norms):
                norm = self.norms[i]
                x = norm(x, lengths) if isinstance(norm, UtteranceNorm) else norm(x)
            x = F.gelu(x)
        real = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        return x.masked_fill(~real[..., None], 0), real

    def frames(self, samples: Tensor) -> Tensor:
        """How many frames so many samples give; 0 if they are fewer than a frame sees."""
        return ((samples - self.receptive).div(self.hop, rounding_mode="floor") + 1).clamp(min=0)


class UtteranceNorm(nn.Module):
    """Each channel with mean 0 and deviation 1 over the frames of its utterance that count, then a learned affine map.

    `nn.GroupNorm` with a group for each channel where all frames count; (B, T, C) and how many count (B,) -> (B, T, C).
    """

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim)), eps

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            exact = x.to(torch.promote_types(x.dtype, torch.float32))
            count = lengths.clamp(min=1)[:, None, None].to(exact.dtype)
            real = (torch.arange(x.shape[1], device=x.device) < lengths[:, None])[..., None].to(exact.dtype)
            mean = (exact * real).sum(1, keepdim=True) / count
            centred = exact - mean
            rate = ((centred * real).square().sum(1, keepdim=True) / count + self.eps).rsqrt()
            return (centred * (rate * self.weight) + self.bias).to(x.dtype)


class ConvPositions(nn.Module):
    """What a token's neighbourhood tells of its position: a grouped convolution over time, and GELU.

    (B, T, D) -> (B, T, D), to be added. The weight is `weight` with its length over all channels set to `gain`, for
    each place of the kernel (weight normalisation, arXiv:1602.07868).

    Args:
        dim: width D.
        kernel_size: tokens that it sees, the last of an even number of them before the middle.
        groups: of channels.
    """

    def __init__(self, dim: int, kernel_size: int = 128, groups: int = 16) -> None:
        super().__init__()
        if dim % groups:
            raise UserError(f"dim={dim} does not split into groups={groups} of channels: choose a divisor")
        self.kernel_size, self.groups = kernel_size, groups
        weight = torch.randn(dim, dim // groups, kernel_size) * (4 / (kernel_size * dim)) ** 0.5
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(torch.zeros(dim))
        self.gain = nn.Parameter(weight.norm(dim=(0, 1), keepdim=True))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens; those that are padding must be 0."""
        weight = self.weight * (self.gain / self.weight.norm(dim=(0, 1), keepdim=True))
        half = self.kernel_size // 2
        out = F.conv1d(x.transpose(1, 2), weight.to(x.dtype), self.bias.to(x.dtype), padding=half, groups=self.groups)
        return F.gelu(out[:, :, : x.shape[1]]).transpose(1, 2)


def _convolved(x: Tensor, conv: nn.Conv1d) -> Tensor:
    """(B, T, C) -> (B, T', C').

    On a CPU as an image of height 1 with channels last, which needs no transposes: forward and backward take a fifth
    (128 channels, bf16) to four fifths (512, fp32) of the time of `conv1d`.
    """
    x = x.transpose(1, 2)
    if x.device.type != "cpu":
        return conv(x).transpose(1, 2)
    image = F.conv2d(x.unsqueeze(2), conv.weight.unsqueeze(2), conv.bias, (1, conv.stride[0]))
    return image.squeeze(2).transpose(1, 2)


def _standardized(audio: Tensor, lengths: Tensor) -> Tensor:
    """(B, S) with mean 0 and variance 1 over the first `lengths` (B,) samples of each row, and 0 behind them."""
    real = torch.arange(audio.shape[1], device=audio.device) < lengths[:, None]
    count = lengths.clamp(min=1)[:, None]
    centred = (audio - audio.masked_fill(~real, 0).sum(1, keepdim=True) / count).masked_fill(~real, 0)
    return centred * (centred.square().sum(1, keepdim=True) / count + 1e-7).rsqrt()
