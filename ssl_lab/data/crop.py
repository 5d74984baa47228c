"""Random boxes, and cutting them out: crop, antialiased resize and flip of a batch or of images one by one."""

import math
from collections.abc import Sequence
from typing import Literal, TypeGuard, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2.functional import center_crop

from ssl_lab.data.resample import resample
from ssl_lab.errors import UserError

Images = Tensor | list[Tensor]
Interpolation = Literal["bilinear", "bicubic"]

_TRIES = 10  # torchvision's number of draws before a crop falls back to the centre
BOX_DRAWS = 2 * _TRIES + 2
_LONGEST = 32  # times the shorter side
_SMALL = 64  # up to this side the matrix products of a batch beat one resize per image on a CPU


def boxes(u: Tensor, height: Tensor, width: Tensor, scale: Sequence[float], ratio: Sequence[float]) -> Tensor:
    """(B, >= 22) uniform draws, (B,) int64 image sides -> (B, 4) int64 crops: top, left, height, width.

    As torchvision draws them: the first of ten candidates that fits into the image, else the largest centred crop
    within `ratio`.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    area = (height * width)[:, None] * (scale[0] + (scale[1] - scale[0]) * u[:, :_TRIES])
    aspect = torch.exp(low + (high - low) * u[:, _TRIES : 2 * _TRIES])
    w, h = torch.sqrt(area * aspect).round().long(), torch.sqrt(area / aspect).round().long()
    fits = (w > 0) & (h > 0) & (w <= width[:, None]) & (h <= height[:, None])
    first = fits.int().argmax(1, keepdim=True)
    w, h, found = w.gather(1, first)[:, 0], h.gather(1, first)[:, 0], fits.any(1)
    top = (u[:, 2 * _TRIES] * (height - h + 1)).long()
    left = (u[:, 2 * _TRIES + 1] * (width - w + 1)).long()
    full_h = torch.minimum(height, (width / ratio[0]).round().long())
    full_w = torch.minimum(width, (height * ratio[1]).round().long())
    centred = torch.stack([(height - full_h) // 2, (width - full_w) // 2, full_h, full_w], 1)
    return torch.where(found[:, None], torch.stack([top, left, h, w], 1), centred)


def sides(images: Images) -> tuple[Tensor, Tensor]:
    """(B,) int64 heights and widths, on the CPU."""
    rows = [images.shape[-2:]] * len(images) if isinstance(images, Tensor) else [x.shape[-2:] for x in images]
    height, width = torch.tensor(rows).unbind(1)
    return height, width


def in_batches(images: Images, size: int) -> TypeGuard[Tensor]:
    """Whether the crops of `size` are best made for many images at once: on a device, or of small images."""
    return isinstance(images, Tensor) and (images.is_cuda or max(size, *images.shape[-2:]) <= _SMALL)


def crop(images: Images, box: Tensor, flip: Tensor, size: int, interpolation: Interpolation) -> Tensor:
    """Images, (B, 4) boxes and (B,) flips on the CPU -> (B, 3, size, size) float32 in 0..255.

    The pixels are those of torchvision's antialiased resize: of a float image in a batch, else of the image as it is,
    which rounds bytes to whole grey levels.
    """
    if in_batches(images, size):
        return resample(images, box.to(images.device), flip.to(images.device), size, interpolation)
    out = torch.empty((len(images), 3, size, size), device=images[0].device)
    for one, image, where, flipped in zip(out, images, box.tolist(), flip.tolist(), strict=True):
        crop_into(one, image, where, flipped, interpolation)
    return out


def middle(images: Tensor) -> Tensor:
    """Images (..., H, W) without the ends of a side that is more than 32 times the other.

    Resized whole, so that its shorter side fits, an image of 1 x 65,535 pixels would fill the memory.
    """
    height, width = images.shape[-2:]
    return center_crop(images, [min(height, _LONGEST * width), min(width, _LONGEST * height)])


def crop_into(out: Tensor, image: Tensor, box: Sequence[int], flip: bool, interpolation: Interpolation) -> None:
    """One image, as it is or `interleaved`, to (3, size, size) float32 `out`."""
    top, left, height, width = box
    image = interleaved(image[:, top : top + height, left : left + width])
    image = F.interpolate(image[None], out.shape[1:], mode=interpolation, antialias=True)[0, :3]
    out.copy_(image.flip(2) if flip else image)
    if interpolation == "bicubic" and image.dtype != torch.uint8:
        out.clamp_(0, 255)


def interleaved(image: Tensor) -> Tensor:
    """(3, H, W) bytes whose channels lie in planes -> (4, H, W), the channels of a pixel side by side, the last empty.

    The resize of bytes is twice as fast on these, and three planes are put into 32-bit words faster than into a row of
    bytes. Other images come back as they are.
    """
    if image.dtype != torch.uint8 or image.is_cuda or image.stride(0) == 1:
        return image
    words = image[2].int().mul_(1 << 16).add_(image[1], alpha=1 << 8).add_(image[0])  # little-endian
    return words.view(torch.uint8).view(*words.shape, 4).permute(2, 0, 1)


def check_range(name: str, span: Sequence[float], low: float, high: float = math.inf) -> None:
    """A `UserError` unless `span` is two numbers with low < first <= second <= high."""
    if len(span) != 2 or not low < span[0] <= span[1] <= high:
        limit = f"above {low}" + (f" and up to {high}" if high < math.inf else "")
        raise UserError(f"{name} is {list(span)}: give two numbers {limit}, the smaller one first")


def check_interpolation(name: Interpolation) -> Interpolation:
    """`name`, if it is known; else a `UserError` that says which are."""
    if name not in get_args(Interpolation):
        raise UserError(f"interpolation is {name!r}: set it to one of {', '.join(get_args(Interpolation))}")
    return name
