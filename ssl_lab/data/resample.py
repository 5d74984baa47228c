"""Crop, resize and flip a whole batch, each sample with its own box, as two batched matrix products.

Resizing is linear and separable: out = R @ image @ C^T, where row i of R holds the weights with which the input rows
make output row i. A crop and a flip only move those weights, so one pair of matrices per sample does all three, on
any device and without a loop over samples.
"""

import torch
from torch import Tensor

_CHUNK = 1 << 18  # values done at once on a CPU, so that all between input and output stays in its cache


def resample(images: Tensor, box: Tensor, flip: Tensor, size: int, interpolation: str) -> Tensor:
    """(B, 3, H, W) uint8, (B, 4) boxes (top, left, height, width), (B,) bool flips -> (B, 3, size, size) float32.

    Values stay within 0..255: equal to torchvision's `resized_crop(antialias=True)` of a float image, the overshoot
    of bicubic clipped.
    """
    out = images.new_empty((*images.shape[:2], size, size), dtype=torch.float32)
    step = max(1, _CHUNK // (3 * max(size, *images.shape[2:]) ** 2)) if images.device.type == "cpu" else len(images)
    for start in range(0, len(images), step):
        part = slice(start, start + step)
        out[part] = _resample(images[part], box[part], flip[part], size, interpolation)
    return out


def _resample(images: Tensor, box: Tensor, flip: Tensor, size: int, interpolation: str) -> Tensor:
    b, channels, height, width = images.shape
    if height == width:
        both = weights(box[:, :2].T.reshape(-1), box[:, 2:].T.reshape(-1), height, size, interpolation)
        rows, columns = both[:b], both[b:]
    else:
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
    scale = length / size
    stretch = scale.clamp(min=1)[:, None]
    pixel = torch.arange(side, device=start.device) + 0.5 - start[:, None]  # (B, side), seen from the span's start
    pixel = torch.where((pixel > 0) & (pixel < length[:, None]), pixel / stretch, torch.inf)
    centre = (torch.arange(size, device=start.device) + 0.5) * scale[:, None] / stretch  # (B, size)
    distance = (pixel[:, None] - centre[:, :, None]).abs_()
    w = _cubic(distance) if interpolation == "bicubic" else distance.neg_().add_(1).clamp_(min=0)
    return w.div_(w.sum(2, keepdim=True))


def _cubic(distance: Tensor) -> Tensor:
    """Twice Keys' cubic convolution kernel (1981) with a = -0.5, for distances >= 0, with few passes over memory.

    With q = max(2 - d, 0) and p = max(1 - d, 0) its two pieces are q^2 (q - 1) / 2 and, added below 1, p^2 (1 - 2p).
    """
    q = distance.neg_().add_(2).clamp_(min=0)
    w = q - 1
    p = w.clamp(min=0)
    w.mul_(q).mul_(q)
    return w.sub_((p - 0.5).mul_(p).mul_(p), alpha=4)
