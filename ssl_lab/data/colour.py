"""Colour operations on float images in 0..255, in place: of a batch with a strength for each sample, or of one image.

They equal torchvision's functionals of the same name on float images, with few passes over memory: no round trip
through hue, saturation and value, and no clamp where nothing can leave the range.
"""

import torch
from torch import Tensor

TOP = 255.0
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
_LUMA = (0.2989, 0.587, 0.114)  # ITU-R BT.601, with the digits that torchvision and PIL use


def adjust_(x: Tensor, which: int, factor: float) -> None:
    """One operation with one factor (of the hue: its shift) on all of (B, 3, H, W)."""
    if which == HUE:
        swaps, after, before, rest = _turn(factor)
        if swaps:
            x.copy_(x.roll(swaps, 1))
        _hue_(x, after, before, rest)
        return
    if factor == 1:
        return
    if which == BRIGHTNESS:
        x.mul_(factor)
    elif which == CONTRAST:
        mean = grey(x.mean((2, 3), keepdim=True)).mul_(1 - factor)
        x.mul_(factor).add_(mean)
    else:
        other = grey(x)
        x.mul_(factor).add_(other, alpha=1 - factor)
    if factor > 1:  # else a weighted mean of values within the range
        x.clamp_(0, TOP)


def jitter_(x: Tensor, order: Tensor, factors: Tensor) -> None:
    """Brightness, contrast, saturation and hue on (B, 3, H, W), in the order that (B, 4) int64 `order` gives.

    `factors` (B, 4) float32 are those of the four operations; both lie on the CPU. Samples must be sorted by
    `hue_place`, so that those with an operation before the hue, and those with it after, lie side by side.
    """
    if not len(x):
        return
    place = hue_place(order)
    others = order[order != HUE].view(-1, 3)
    factor = factors.gather(1, others)
    parts = [_Blend(x, factor[:, k], others[:, k]) for k in range(3)]
    starts = [int((place <= k).sum()) for k in range(3)]
    for blend, start in zip(parts, starts, strict=True):
        blend(slice(start, None))
    _hues_(x, factors[:, HUE])
    for blend, stop in zip(parts, starts, strict=True):
        blend(slice(0, stop))


def hue_place(order: Tensor) -> Tensor:
    """(B, 4) int64 orders -> (B,) int64: how many operations come before the hue."""
    return (order == HUE).int().argmax(1)


class _Blend:
    """x <- f x + (1 - f) other, where other is 0 (brightness), the mean grey (contrast) or the grey (saturation)."""

    def __init__(self, x: Tensor, factor: Tensor, which: Tensor):
        self.x, self.idle, self.clamps = x, bool((factor == 1).all()), bool((factor > 1).any())
        self.factor, self.amount = _column(factor, x), _column((1 - factor) * (which != BRIGHTNESS), x)
        self.contrast = _column(which == CONTRAST, x)

    def __call__(self, part: slice) -> None:
        """Do so on a part of the samples."""
        x = self.x[part]
        if self.idle or not len(x):
            return
        luma = grey(x)
        other = torch.where(self.contrast[part], luma.mean((2, 3), keepdim=True), luma)
        x.mul_(self.factor[part]).add_(other.mul_(self.amount[part]))
        if self.clamps:
            x.clamp_(0, TOP)


def _hues_(x: Tensor, shift: Tensor) -> None:
    """Turn the hue of each sample by its own (B,) shift: `_turn` for tensors, and `_hue_`."""
    swaps = (3 * shift).round().clamp_(-1, 1)
    for swap in (-1, 1):
        rows = (swaps == swap).nonzero()[:, 0].to(x.device)
        if len(rows):
            x.index_copy_(0, rows, x.index_select(0, rows).roll(swap, 1))
    d = 6 * shift - 2 * swaps
    inner, ones = 1 - 2 * d.abs(), torch.ones_like(d)
    after, before = torch.where(d >= 0, ones, inner), torch.where(d >= 0, inner, ones)
    _hue_(x, _column(after, x), _column(before, x), _column(1 - d.abs(), x))


def _turn(shift: float) -> tuple[int, float, float, float]:
    """Shift of the hue in [-0.5, 0.5] circles -> thirds of it, then weights of two channels and of V + m in `_hue_`."""
    swaps = max(-1, min(1, round(3 * shift)))
    d = 6 * shift - 2 * swaps
    inner = 1 - 2 * abs(d)
    return (swaps, 1.0, inner, 1 - d) if d >= 0 else (swaps, inner, 1.0, 1 + d)


def _hue_(x: Tensor, after: Tensor | float, before: Tensor | float, rest: Tensor | float) -> None:
    """Turn the hue of (B, 3, H, W) by a sixth of the circle or less.

    Along the circle of hues, each channel climbs linearly from the smallest value m of the pixel to its largest V
    within a sixth, stays there for two sixths, and falls likewise. Turned by d in [0, 1] sixths, red is thus again a
    clamped linear function of the pixel,

        R' = clamp(R - G - (1 - 2 d) B + (1 - d) (V + m), m, V),

    green and blue follow by cyclic exchange, and a turn backwards exchanges G and B. A turn by two sixths exchanges the
    channels themselves.
    """
    r, g, b = x.split(1, 1)
    low, high = torch.minimum(r, g), torch.maximum(r, g)
    torch.minimum(low, b, out=low)
    torch.maximum(high, b, out=high)
    out = x + (low + high).mul_(rest)
    y = x * after if isinstance(after, Tensor) or after != 1 else x
    out[:, :2].sub_(y[:, 1:])
    out[:, 2:].sub_(y[:, :1])
    y = x * before if isinstance(before, Tensor) or before != 1 else x
    out[:, 1:].sub_(y[:, :2])
    out[:, :1].sub_(y[:, 2:])
    torch.clamp(out, low, high, out=x)


def grey(x: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, 1, H, W): the luma of each pixel."""
    return (x[:, :1] * _LUMA[0]).add_(x[:, 1:2], alpha=_LUMA[1]).add_(x[:, 2:], alpha=_LUMA[2])


def solarize_(x: Tensor, threshold: float = 128.0) -> None:
    """Invert all values from `threshold` on."""
    bright = torch.ge(x, threshold, out=torch.empty_like(x))  # as 0 and 1: selecting is slow on a CPU
    x.add_((x * -2).add_(TOP).mul_(bright))


def _column(values: Tensor, x: Tensor) -> Tensor:
    """(B,) on the CPU -> (B, 1, 1, 1) on the device of `x`."""
    return values.to(x.device)[:, None, None, None]
