"""From stored pixels to what a method sees: random crops for training, a plain resize for evaluation.

A view maps (images, position, seed) to the image keys of a batch. All it draws depends on (seed, position) alone, so
the same sample looks the same in a worker, in the main process and on the training device, in any batch.
"""

import math
from collections.abc import Sequence
from typing import Literal, Protocol

import torch
import torchvision.transforms.v2.functional as F
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode

from ssl_lab.data.resample import resample
from ssl_lab.errors import UserError
from ssl_lab.rng import uniform
from ssl_lab.types import Batch

Images = Tensor | list[Tensor]
Interpolation = Literal["bilinear", "bicubic"]

STATS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
_SMALL = 64  # up to this side the matrix products of a batch beat one resize per image on a CPU
_TRIES = 10  # torchvision's number of draws before a crop falls back to the centre


class Views(Protocol):
    """(B, 3, H, W) uint8 or a list of (3, Hi, Wi) uint8, and (B,) int64 positions -> the image keys of a batch."""

    def __call__(self, images: Images, position: Tensor, seed: int) -> Batch: ...


class Crop:
    """Random resized crop (Szegedy et al., 2015), horizontal flip, normalisation -> `image` (B, 3, size, size) float32.

    `scale` is the range of the share of the area that is kept, `ratio` that of width / height, `hflip` the
    probability of a flip, `stats` the name of a mean and standard deviation (imagenet | clip | half). The draws follow
    torchvision's RandomResizedCrop and the pixels its antialiased resize. Images of several sizes, or large ones on a
    CPU, go through torchvision itself one by one, which rounds to whole grey levels.
    """

    def __init__(
        self,
        size: int,
        *,
        scale: Sequence[float] = (0.2, 1.0),
        ratio: Sequence[float] = (3 / 4, 4 / 3),
        hflip: float = 0.5,
        interpolation: Interpolation = "bicubic",
        stats: str = "imagenet",
    ):
        self.size, self.scale, self.ratio, self.hflip = size, tuple(scale), tuple(ratio), hflip
        self.interpolation: Interpolation = interpolation
        self.stats = check_stats(stats)

    def __call__(self, images: Images, position: Tensor, seed: int) -> Batch:
        u = uniform(seed, position, 2 * _TRIES + 3)
        flip = u[:, -1] < self.hflip
        if isinstance(images, Tensor) and (images.is_cuda or max(self.size, *images.shape[-2:]) <= _SMALL):
            height, width = (flip.new_full(flip.shape, n, dtype=torch.int64) for n in images.shape[-2:])
            box = boxes(u, height, width, self.scale, self.ratio)
            out = resample(images, box, flip, self.size, self.interpolation)
        else:
            sides = torch.tensor([x.shape[-2:] for x in images])
            rows = boxes(u, sides[:, 0], sides[:, 1], self.scale, self.ratio).tolist()
            out = torch.stack([self._one(*x) for x in zip(images, rows, flip.tolist(), strict=True)])
        return {"image": normalize_(out.float(), self.stats)}

    def _one(self, image: Tensor, box: list[int], flip: bool) -> Tensor:
        mode = InterpolationMode(self.interpolation)
        out: Tensor = F.resized_crop(image, *box, [self.size, self.size], interpolation=mode, antialias=True)
        return out.flip(-1) if flip else out


class Resize:
    """Shorter side to `size / crop_pct` pixels, centre crop, normalisation -> `image` (B, 3, size, size) float32."""

    def __init__(
        self,
        size: int,
        *,
        crop_pct: float = 1.0,
        interpolation: Interpolation = "bicubic",
        stats: str = "imagenet",
    ):
        self.size, self.resize, self.stats = size, math.floor(size / crop_pct), check_stats(stats)
        self.mode = InterpolationMode(interpolation)

    def __call__(self, images: Images, position: Tensor, seed: int) -> Batch:
        """`position` and `seed` are not needed: nothing is drawn."""
        out = self._fit(images) if isinstance(images, Tensor) else torch.stack([self._fit(x) for x in images])
        return {"image": normalize_(out.float(), self.stats)}

    def _fit(self, image: Tensor) -> Tensor:
        image = F.resize(image, [self.resize], interpolation=self.mode, antialias=True)
        out: Tensor = F.center_crop(image, [self.size, self.size])
        return out


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


def check_stats(name: str) -> str:
    """`name`, if it is one of STATS; else a `UserError` that says which there are."""
    if name not in STATS:
        raise UserError(f"no mean and deviation is known as {name!r}: set stats to one of {', '.join(STATS)}")
    return name


def normalize_(pixels: Tensor, stats: str) -> Tensor:
    """(B, 3, H, W) float pixels in 0..255 -> the named mean and deviation taken out, in place."""
    for channel, (mean, std) in enumerate(zip(*STATS[stats], strict=True)):  # numbers: no copy to the device
        pixels[:, channel].mul_(1 / (255 * std)).sub_(mean / std)
    return pixels
