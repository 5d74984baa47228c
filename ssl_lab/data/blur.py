"""Gaussian blur of a batch, each sample with its own standard deviation, as small matrix products.

The sum over taps along one side is a product with a banded matrix. Cut into blocks of 32 outputs, all blocks share one
small dense matrix and most zeros are left out, which on a CPU beats both a convolution and a sum of shifted images.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK = 32  # outputs of one product
_NOTHING = 5.3  # standard deviations from which on a tap is below 1e-6 of the middle one


def blur(x: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """(B, 3, H, W) float -> the same, blurred with (B,) float32 `sigma` in pixels (on the CPU), edges reflected.

    Equal to torchvision's `gaussian_blur` with 2 `radius` + 1 taps; `radius` must be less than H and W.
    """
    n, channels, height, width = x.shape
    reach = min(radius, int(_NOTHING * float(sigma.max())) + 1)  # the taps beyond weigh nothing
    band = _band(taps(sigma, radius)[:, radius - reach : radius + reach + 1]).to(x.device)
    down, across = -(-height // _BLOCK), -(-width // _BLOCK)  # blocks
    padded = F.pad(x, (reach, reach, reach, reach), mode="reflect")
    if height % _BLOCK or width % _BLOCK:
        padded = F.pad(padded, (0, across * _BLOCK - width, 0, down * _BLOCK - height))
    x = band[:, None, None] @ padded.unfold(2, band.shape[2], _BLOCK).transpose(3, 4)  # (B, 3, down, 32, W')
    x = x.view(n, channels * down * _BLOCK, -1).unfold(2, band.shape[2], _BLOCK).transpose(1, 2)
    x = x @ band[:, None].transpose(2, 3)  # (B, across, lines, 32)
    x = x.view(n, across, channels, down * _BLOCK, _BLOCK).permute(0, 2, 3, 1, 4)
    return x.reshape(n, channels, down * _BLOCK, across * _BLOCK)[:, :, :height, :width]


def _band(weights: Tensor) -> Tensor:
    """(B, taps) -> (B, 32, 31 + taps): row i holds the taps from column i on."""
    count = weights.shape[1]
    shifted = weights.new_zeros(len(weights), _BLOCK, _BLOCK + count)
    shifted[:, :, :count] = weights[:, None]
    return shifted.view(len(weights), -1)[:, :-_BLOCK].view(len(weights), _BLOCK, _BLOCK + count - 1)


def taps(sigma: Tensor, radius: int) -> Tensor:
    """(B,) standard deviations -> (B, 2 radius + 1) weights that sum to one."""
    distance = torch.arange(-radius, radius + 1, device=sigma.device)
    weights = torch.exp(-0.5 * (distance / sigma[:, None]) ** 2)
    return weights / weights.sum(1, keepdim=True)
