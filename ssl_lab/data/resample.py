"""Crop, resize and flip a whole batch, each sample with its own box, as two batched matrix products.

Resizing is linear and separable: out = R @ image @ C^T, where row i of R holds the weights with which the input rows
make output row i. A crop and a flip only move those weights, so one pair of matrices per sample does all three, on
any device and without a loop over samples.
"""

import torch
from torch import Tensor


def resample(images: Tensor, box: Tensor, flip: Tensor, size: int, interpolation: str) -> Tensor:
    """(B, 3, H, W) uint8, (B, 4) boxes (top, left, height, width), (B,) bool flips -> (B, 3, size, size) float32.

    Values stay within 0..255: equal to torchvision's `resized_crop(antialias=True)` of a float image, the overshoot
    of bicubic clipped.
    """
    b, channels, height, width = images.shape
    rows = weights(box[:, 0], box[:, 2], height, size, interpolation)
    columns = weights(box[:, 1], box[:, 3], width, size, interpolation)
    columns = torch.where(flip[:, None, None], columns.flip(1), columns)
    x = images.float().reshape(b, channels * height, width) @ columns.transpose(1, 2)
    x = torch.matmul(rows[:, None], x.reshape(b, channels, height, size))
    return x.clamp_(0, 255) if interpolation == "bicubic" else x


def weights(start: Tensor, length: Tensor, side: int, size: int, interpolation: str) -> Tensor:
    """(B,) int64 starts and lengths of a span of `side` pixels -> (B, size, side) float32; each row sums to one.

    Shrinking widens the filter by the same factor (antialiasing); pixels outside the span get no weight.
    """
    pixel = torch.arange(side, device=start.device) + 0.5 - start[:, None]  # (B, side), seen from the span's start
    scale = (length / size)[:, None, None]
    centre = (torch.arange(size, device=start.device) + 0.5)[:, None] * scale
    distance = ((pixel[:, None] - centre) / scale.clamp(min=1)).abs_()
    w = _cubic(distance) if interpolation == "bicubic" else (1 - distance).clamp_(min=0)
    w = w * ((pixel > 0) & (pixel < length[:, None]))[:, None]
    return w / w.sum(2, keepdim=True)


def _cubic(x: Tensor) -> Tensor:
    """Keys' cubic convolution (1981) with a = -0.5, for distances x >= 0."""
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((2.5 - 0.5 * x) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0))
