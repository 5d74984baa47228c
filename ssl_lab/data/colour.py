"""Colour operations on a batch of float images in 0..255, each sample with its own strength, in place.

They equal torchvision's functionals of the same name on float images, with few passes over memory: no round trip
through hue, saturation and value, and no clamp where nothing can leave the range.
"""

from itertools import pairwise

import torch
from torch import Tensor

TOP = 255.0
_LUMA = (0.2989, 0.587, 0.114)  # ITU-R BT.601, with the digits that torchvision and PIL use
_HUE = 3  # its number among brightness, contrast, saturation, hue


def jitter_(x: Tensor, order: Tensor, factors: Tensor) -> None:
    """Brightness, contrast, saturation and hue on (B, 3, H, W), in the order that (B, 4) int64 `order` gives.

    `factors` (B, 4) float32 are those of the four operations; both lie on the CPU. Samples that lie side by side and
    have their hue shifted at the same place of the order are done together, so sort them by `hue_place` beforehand.
    """
    place = hue_place(order)
    for step in range(4):
        starts = [0, *((place[1:] == step) != (place[:-1] == step)).nonzero()[:, 0].add(1).tolist(), len(x)]
        for start, stop in pairwise(starts):
            part = slice(start, stop)
            if start < stop and place[start] == step:
                hue_(x[part], factors[part, _HUE])
            elif start < stop:
                _linear_(x[part], order[part, step], factors[part])


def hue_place(order: Tensor) -> Tensor:
    """(B, 4) int64 orders -> (B,) int64: how many operations come before the hue."""
    return (order == _HUE).int().argmax(1)


def _linear_(x: Tensor, which: Tensor, factors: Tensor) -> None:
    """x <- f x + (1 - f) other, where other is 0 (brightness), the mean grey (contrast) or the grey (saturation)."""
    factor = factors.gather(1, which[:, None])[:, 0]
    if (factor == 1).all():
        return
    amount = 1 - factor
    saturation, contrast = which == 2, which == 1
    f, a = _column(factor, x), _column(amount, x)
    if saturation.any():
        other = grey(x)
        if not saturation.all():
            if contrast.any():
                other = torch.where(_column(contrast, x), other.mean((2, 3), keepdim=True), other)
            a = _column(amount * (which > 0), x)
        x.mul_(f).add_(other.mul_(a))
    elif contrast.any():
        means = x.mean((2, 3), keepdim=True)
        x.mul_(f).add_(grey(means).mul_(_column(amount * contrast, x)))
    else:
        x.mul_(f)
    if (factor > 1).any():  # else a weighted mean of values within the range
        x.clamp_(0, TOP)


def hue_(x: Tensor, shift: Tensor) -> None:
    """Turn the hue of (B, 3, H, W) by (B,) `shift` in [-0.5, 0.5] circles.

    Along the circle of hues, each channel climbs linearly from the smallest value m of the pixel to its largest V
    within a sixth, stays there for two sixths, and falls likewise. Turned by d in [0, 1] sixths, red is thus again a
    clamped linear function of the pixel,

        R' = clamp(R - G - (1 - 2 d) B + (1 - d) (V + m), m, V),

    green and blue follow by cyclic exchange, and a turn backwards exchanges G and B. Two whole sixths exchange the
    channels themselves.
    """
    sixths = 6 * shift
    swaps = (sixths / 2).round().clamp(-1, 1)  # what is left lies within one sixth
    if swaps.any():
        for turn in (-1, 1):
            rows = (swaps == turn).nonzero()[:, 0].to(x.device)
            if len(rows):
                x[rows] = x[rows].roll(turn, 1)
    d = sixths - 2 * swaps
    size, ahead = d.abs(), d >= 0
    after = _column(torch.where(ahead, torch.ones_like(d), 1 - 2 * size), x)
    before = _column(torch.where(ahead, 1 - 2 * size, torch.ones_like(d)), x)
    r, g, b = x.split(1, 1)
    low, high = torch.minimum(r, g), torch.maximum(r, g)
    torch.minimum(low, b, out=low)
    torch.maximum(high, b, out=high)
    rest = (low + high).mul_(_column(1 - size, x))
    out = x + rest
    y = x * after
    out[:, :2].sub_(y[:, 1:])
    out[:, 2:].sub_(y[:, :1])
    torch.mul(x, before, out=y)
    out[:, 1:].sub_(y[:, :2])
    out[:, :1].sub_(y[:, 2:])
    torch.clamp(out, low, high, out=x)


def grey(x: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, 1, H, W): the luma of each pixel."""
    return (x[:, :1] * _LUMA[0]).add_(x[:, 1:2], alpha=_LUMA[1]).add_(x[:, 2:], alpha=_LUMA[2])


def solarize(x: Tensor, threshold: float = 128.0) -> Tensor:
    """The same with all values from `threshold` on inverted."""
    return (x * -2).add_(TOP).mul_(torch.ge(x, threshold, out=torch.empty_like(x))).add_(x)


def _column(values: Tensor, x: Tensor) -> Tensor:
    """(B,) on the CPU -> (B, 1, 1, 1) on the device of `x`."""
    return values.to(x.device)[:, None, None, None]
