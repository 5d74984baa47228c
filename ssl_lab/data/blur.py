"""Gaussian blur as matrix products: of a batch, each sample with its own standard deviation, or of one large image."""

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK = 32  # outputs of one product of a large image
_NOTHING = 5.3  # standard deviations from which on a tap is below 1e-6 of the middle one


def blur(x: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """(B, C, H, W) float32 -> the same, blurred with (B,) float32 `sigma` in pixels (on the CPU), edges reflected.

    Equal to torchvision's `gaussian_blur` with 2 `radius` + 1 taps; `radius` must be less than H and W.
    """
    n, channels, height, width = x.shape
    weights = taps(sigma, radius).to(x.device)
    x = x.reshape(n, channels * height, width) @ _dense(weights, width).transpose(1, 2)
    return _dense(weights, height)[:, None] @ x.view(n, channels, height, width)


def blur_(x: Tensor, sigma: float, radius: int) -> None:
    """The same for one contiguous (C, H, W) float32 on a CPU, in place.

    All outputs of a sum over taps that lie in one block of 32 share one small matrix, and most zeros of the banded
    matrix are left out: this beats both a convolution and a sum of shifted images.
    """
    channels, height, width = x.shape
    reach = min(radius, int(_NOTHING * sigma) + 1)  # the taps beyond weigh nothing
    weights = taps(torch.tensor([sigma]), radius)[0, radius - reach : radius + reach + 1]
    block = min(_BLOCK, height, width)
    span = block + 2 * reach
    band = F.pad(weights, (0, block)).repeat(block)[: block * span].view(block, span)  # row i holds them from i on
    padded = F.pad(x, (reach, reach, reach, reach), mode="reflect")
    across = x.new_empty(channels, height + 2 * reach, width)
    lines, sums = padded.view(-1, width + 2 * reach), across.view(-1, width)
    for start in [*range(0, width - block, block), width - block]:
        torch.mm(lines[:, start : start + span], band.t(), out=sums[:, start : start + block])
    whole = height // block
    for plane, out in zip(across, x, strict=True):
        windows = plane.as_strided((whole, span, width), (block * width, width, 1))
        torch.bmm(band.expand(whole, -1, -1), windows, out=out[: whole * block].view(whole, block, width))
        if height % block:
            torch.mm(band, plane[height - block :], out=out[height - block :])


def taps(sigma: Tensor, radius: int) -> Tensor:
    """(B,) standard deviations -> (B, 2 radius + 1) weights that sum to one."""
    distance = torch.arange(-radius, radius + 1, device=sigma.device)
    weights = torch.exp(-0.5 * (distance / sigma[:, None]) ** 2)
    return weights / weights.sum(1, keepdim=True)


def _dense(weights: Tensor, side: int) -> Tensor:
    """(B, taps) -> (B, side, side): row i holds the taps around i, those outside folded back at the edges."""
    radius = weights.shape[1] // 2
    place = torch.arange(side, device=weights.device)
    column = (place[:, None] + torch.arange(-radius, radius + 1, device=weights.device)).abs()
    column = side - 1 - (side - 1 - column).abs()
    matrix = weights.new_zeros(len(weights), side, side)
    return matrix.scatter_add_(2, column.expand(len(weights), -1, -1), weights[:, None].expand(-1, side, -1))
