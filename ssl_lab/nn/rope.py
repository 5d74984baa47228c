"""Rotary position embedding for text, audio (1-D) and image grids (2-D) (RoFormer, arXiv:2104.09864).

Channels are paired by halves, (i, i + Dh/2). A table (cos, sin) holds the angle of a pair for both of its channels, and
its sin is negative in the first half: turning is then x * cos + (x with halves swapped) * sin.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Rope = tuple[Tensor, Tensor]
Scaling = Callable[[Tensor, float], tuple[Tensor, float]]  # (frequencies (Dh/2), base) -> frequencies, factor on both


def rope_1d(positions: Tensor, head_dim: int, *, base: float = 10000.0, scaling: Scaling | None = None) -> Rope:
    """Table for integer or float positions: (L,) gives (L, Dh) float32, (B, L) gives (B, 1, L, Dh).

    `scaling` stretches a trained table to longer texts, see `LinearScaling`, `NTKScaling`, `YaRN`, `Llama3Scaling`.
    """
    frequency, factor = frequencies(head_dim, base, positions.device), 1.0
    if scaling is not None:
        frequency, factor = scaling(frequency, base)
    cos, sin = _table(positions.float()[..., None] * frequency)
    if factor != 1.0:
        cos, sin = cos * factor, sin * factor
    return (cos[:, None], sin[:, None]) if positions.dim() == 2 else (cos, sin)


def frequencies(head_dim: int, base: float, device: torch.device | str | None = None) -> Tensor:
    """(Dh/2,) float32 radians per position: base ** (-2 i / Dh)."""
    return 1.0 / base ** (torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)


@dataclass(frozen=True)
class LinearScaling:
    """Position interpolation (arXiv:2306.15595): position m stands where m / factor did."""

    factor: float

    def __call__(self, frequency: Tensor, base: float) -> tuple[Tensor, float]:
        return frequency / self.factor, 1.0


@dataclass(frozen=True)
class NTKScaling:
    """A larger base, such that the slowest pair is slowed by `factor` and the fastest not at all (arXiv:2309.00071)."""

    factor: float

    def __call__(self, frequency: Tensor, base: float) -> tuple[Tensor, float]:
        dim = 2 * len(frequency)
        return frequencies(dim, base * self.factor ** (dim / (dim - 2)), frequency.device), 1.0


@dataclass(frozen=True)
class YaRN:
    """Slow pairs are interpolated, fast ones kept, and scores sharpened (arXiv:2309.00071, equations 17 to 23).

    Args:
        factor: how many times longer texts become.
        original_length: positions of the training before.
        beta_fast: pairs that turn more often than this over the original length are kept.
        beta_slow: pairs that turn less often are interpolated fully.
        attention_factor: on cos and sin; 0.1 ln(factor) + 1 by default.
        truncate: round the bounds of the ramp to whole pairs.
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def __call__(self, frequency: Tensor, base: float) -> tuple[Tensor, float]:
        dim = 2 * len(frequency)
        low, high = (self._pair(turns, dim, base) for turns in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        pair = torch.arange(len(frequency), device=frequency.device, dtype=torch.float32)
        slow = ((pair - low) / (high - low if high != low else 0.001)).clamp(0, 1)
        factor = yarn_mscale(self.factor) if self.attention_factor is None else self.attention_factor
        return frequency / self.factor * slow + frequency * (1 - slow), factor

    def _pair(self, turns: float, dim: int, base: float) -> float:
        """Index of the pair that makes so many turns over the original length."""
        return dim * math.log(self.original_length / (turns * 2 * math.pi)) / (2 * math.log(base))


def yarn_mscale(factor: float, weight: float = 1.0) -> float:
    """0.1 * weight * ln(factor) + 1: YaRN's factor on cos and sin; DeepSeek puts its square on the scores instead."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


@dataclass(frozen=True)
class Llama3Scaling:
    """LLaMA 3.1 (arXiv:2407.21783): waves longer than original_length / low are slowed by `factor`, between that and
    original_length / high ever less, shorter ones kept.
    """

    factor: float = 8.0
    low: float = 1.0
    high: float = 4.0
    original_length: int = 8192

    def __call__(self, frequency: Tensor, base: float) -> tuple[Tensor, float]:
        turns = self.original_length / (2 * math.pi / frequency)
        kept = ((turns - self.low) / (self.high - self.low)).clamp(0, 1)
        return (1 - kept) * frequency / self.factor + kept * frequency, 1.0


def rope_2d(height: int, width: int, head_dim: int, *, base: float = 100.0, device: torch.device | None = None) -> Rope:
    """Table (height * width, Dh) for a grid: half of the frequencies follow the row, half the column.

    Positions are patch centres scaled to [-1, 1] times pi, so a table means the same at another resolution.
    """
    if head_dim % 4:
        raise ValueError(f"2-D RoPE needs a head width divisible by 4, not {head_dim}")
    frequency = base ** -(torch.arange(0, head_dim, 4, device=device, dtype=torch.float32) / head_dim * 2)
    y = ((torch.arange(height, device=device) + 0.5) / height * 2 - 1) * torch.pi
    x = ((torch.arange(width, device=device) + 0.5) / width * 2 - 1) * torch.pi
    rows, columns = torch.meshgrid(y, x, indexing="ij")
    return _table(torch.cat([rows.reshape(-1, 1) * frequency, columns.reshape(-1, 1) * frequency], -1))


def _table(angle: Tensor) -> Rope:
    """Angles (..., Dh/2) -> cos and sin (..., Dh)."""
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotate (B, H, L, Dh) by cos and sin (L | B x 1 x L, Dh). The last rows rotate when the table is shorter.

    Leading tokens without a position (class, registers) stay as they are. Computed in float32 as the references do,
    but in the dtype of x where a CPU trains.
    """
    cos, sin = rope
    prefix = x.shape[-2] - cos.shape[-2]
    if prefix:
        return torch.cat([x[..., :prefix, :], rotate(x[..., prefix:, :], rope)], -2)
    if x.device.type == "cpu" and x.requires_grad and not torch.compiler.is_compiling():
        out: Tensor = _Rotate.apply(x, cos, sin)
        return out
    wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    turned = torch.addcmul(wide * cos, wide.roll(x.shape[-1] // 2, -1), sin)
    return turned if turned.dtype == x.dtype else turned.to(x.dtype)


class _Rotate(torch.autograd.Function):
    """The rotation in training on a CPU, in the dtype of x as transformers does, and contiguous for the products.

    Its derivative is the rotation by the opposite angle, which needs nothing of x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos.to(x.dtype), sin.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = (table.to(grad.dtype) for table in ctx.saved_tensors)
        return _turned(grad, cos, -sin), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """One contiguous tensor: half by half, four passes over halves without a copy of x.

    In half precision passes over halves of a head are no faster than whole ones, and where half a head does not fill
    the processor's vectors (18 channels) four times as slow: there both orders of the halves are copied, then whole.
    """
    half = x.shape[-1] // 2
    if x.dtype in (torch.bfloat16, torch.float16):
        x = x.contiguous()
        swapped = torch.cat([x[..., half:], x[..., :half]], -1)
        return (x * cos).addcmul_(swapped, sin)
    out = x.new_empty(x.shape)
    (first, second), into = x.split(half, -1), out.split(half, -1)
    cos, sin = cos[..., :half], sin[..., half:]
    torch.mul(first, cos, out=into[0]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=into[1]).addcmul_(first, sin)
    return out


def from_interleaved(weight: Tensor, head_dim: int, rotary: int | None = None) -> Tensor:
    """Rows (H * Dh, ...) of a query or key projection that pairs channels (2i, 2i + 1), reordered to pair halves.

    `rotary`: only so many channels at the end of each head are rotated (all by default).
    """
    rotary = rotary or head_dim
    order = torch.arange(head_dim, device=weight.device)
    order[-rotary:] = order[-rotary:].view(-1, 2).t().flatten()
    return weight.unflatten(0, (-1, head_dim))[:, order].flatten(0, 1)
