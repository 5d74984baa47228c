"""From stored pixels to what a method sees: random crops for training, a plain resize for evaluation.

A view maps (images, position, seed) to the image keys of a batch. All it draws depends on (seed, position) alone, so
the same sample looks the same in a worker, in the main process and on the training device, in any batch.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torchvision.transforms.v2.functional as F
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode

from ssl_lab.data.blur import blur, blur_
from ssl_lab.data.colour import adjust_, grey, hue_place, jitter_, solarize_
from ssl_lab.data.crop import (
    BOX_DRAWS,
    Images,
    Interpolation,
    boxes,
    check_interpolation,
    check_range,
    crop,
    crop_into,
    in_batches,
    interleaved,
    middle,
    sides,
)
from ssl_lab.data.draws import Draws, View, draw
from ssl_lab.errors import UserError
from ssl_lab.rng import uniform
from ssl_lab.types import Batch

STATS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
_CHUNK = 1 << 18  # values done at once on a CPU, so that a chunk stays in its cache


class Views(Protocol):
    """`Samples.data` and (B,) int64 positions -> keys of a batch.

    For images (B, 3, H, W) uint8 or a list of (3, Hi, Wi) uint8 -> `image` or `views`; the views of text are in
    `ssl_lab/data/text_views.py`.
    """

    def __call__(self, data: Any, position: Tensor, seed: int, /) -> Batch: ...


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
        check_range("scale", scale, 0, 1)
        check_range("ratio", ratio, 0)
        self.interpolation, self.stats = check_interpolation(interpolation), check_stats(stats)

    def __call__(self, images: Images, position: Tensor, seed: int) -> Batch:
        u = uniform(seed, position.cpu(), BOX_DRAWS + 1)
        flip = u[:, -1] < self.hflip
        box = boxes(u, *sides(images), self.scale, self.ratio)
        return {"image": normalize_(crop(images, box, flip, self.size, self.interpolation), self.stats)}


class MultiView:
    """Several random views of each image -> `views`, V x (B, 3, size_v, size_v) float32, in the order of the arguments.

    `size` is the side in pixels of a view whose own size is 1; smaller shares of it are rounded to a multiple of
    `multiple_of`, for the patches. Every further argument is a `View`, under a name of your choice; those with the
    largest size (the global views) must come first.
    """

    def __init__(
        self,
        size: int,
        *,
        multiple_of: int = 16,
        interpolation: Interpolation = "bicubic",
        stats: str = "imagenet",
        **views: View,
    ):
        self.interpolation, self.stats = check_interpolation(interpolation), check_stats(stats)
        for name, view in views.items():
            if not isinstance(view, View):
                raise UserError(f"{name} is no View: beside size, multiple_of, interpolation and stats all are views")
        self.kinds = [(view, view.side(size, multiple_of)) for view in views.values() if view.count]
        self.sizes = [side for view, side in self.kinds for _ in range(view.count)]
        if not self.sizes:
            raise UserError("there are no views: set the count of at least one to 1 or more")
        if self.sizes != sorted(self.sizes, reverse=True):
            raise UserError(f"views have the sizes {self.sizes}: name those with the largest size first")

    def __call__(self, images: Images, position: Tensor, seed: int) -> Batch:
        """Images are uint8, or float32 in 0..255."""
        count, place, (height, width) = len(images), position.cpu(), sides(images)
        made: list[Tensor] = []
        single: list[_Kind] = []
        for number, (view, size) in enumerate(self.kinds):
            draws = draw(view, seed, number, place, height, width)
            out = torch.empty((view.count * count, 3, size, size), device=images[0].device)
            if in_batches(images, size):
                self._batch(images, draws, view.radius(size), out)
            else:
                single.append(_Kind(draws.rows(), view.radius(size), out))
            made += out.split(count)
        if single:
            several = len(made) > 1
            for i, image in enumerate(images):
                self._one(interleaved(image) if several else image, i, count, single)
        return {"views": made}

    def _batch(self, images: Tensor, draws: Draws, radius: int, out: Tensor) -> None:
        size = out.shape[-1]
        rows = torch.argsort(torch.where(draws.jitter, hue_place(draws.order), 4), stable=True)
        for part in rows.split(max(1, _CHUNK // (3 * size * size)) if out.device.type == "cpu" else len(images)):
            drawn, where = draws.take(part), part.to(out.device)
            x = crop(images.index_select(0, where % len(images)), drawn.box, drawn.flip, size, self.interpolation)
            recolour_(x, drawn, radius)
            out.index_copy_(0, where, normalize_(x, self.stats))

    def _one(self, image: Tensor, i: int, count: int, kinds: "list[_Kind]") -> None:
        """All views of image `i` of `count`: it stays in the cache, and so does each view until it is done."""
        for kind in kinds:
            for row in range(i, len(kind.out), count):
                drawn, x = kind.rows[row], kind.out[row]
                crop_into(x, image, drawn["box"], drawn["flip"], self.interpolation)
                recolour_one_(x, drawn, kind.radius)
                normalize_(x[None], self.stats)


class _Kind(NamedTuple):
    """Views drawn alike: numbers of each (view-major), taps of the blur on each side, where the pixels go."""

    rows: list[dict[str, Any]]
    radius: int
    out: Tensor


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
        self.mode = InterpolationMode(check_interpolation(interpolation))

    def __call__(self, images: Images, position: Tensor, seed: int) -> Batch:
        """`position` and `seed` are not needed: nothing is drawn."""
        out = self._fit(images) if isinstance(images, Tensor) else torch.stack([self._fit(x) for x in images])
        return {"image": normalize_(out.float(), self.stats)}

    def _fit(self, image: Tensor) -> Tensor:
        image = F.resize(middle(image), [self.resize], interpolation=self.mode, antialias=True)
        out: Tensor = F.center_crop(image, [self.size, self.size])
        return out


def recolour_(x: Tensor, draws: Draws, radius: int) -> None:
    """Jitter, grey, blur and solarise the samples of (B, 3, H, W) that drew it; jittered ones lie at the front."""
    count = int(draws.jitter.sum())
    jitter_(x[:count], draws.order[:count], draws.factors[:count])
    for name in ("grey", "blur", "solarize"):
        rows = getattr(draws, name).nonzero()[:, 0]
        if not len(rows):
            continue
        where = rows.to(x.device)
        some = x.index_select(0, where)
        if name == "grey":
            some = grey(some).expand_as(some)
        elif name == "blur":
            some = blur(some, draws.sigma[rows], radius)
        else:
            solarize_(some)
        x.index_copy_(0, where, some)


def recolour_one_(x: Tensor, one: dict[str, Any], radius: int) -> None:
    """The same for one large image (3, H, W) on a CPU, with plain numbers."""
    batch = x[None]
    for which in one["order"] if one["jitter"] else ():
        adjust_(batch, which, one["factors"][which])
    if one["grey"]:
        batch.copy_(grey(batch).expand_as(batch))
    if one["blur"]:
        blur_(x, one["sigma"], radius)
    if one["solarize"]:
        solarize_(batch)


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
