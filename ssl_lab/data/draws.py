"""What one random view is made of, and its numbers for each sample: box, flip, colours, blur.

All numbers come from (seed, position) and are made on the CPU, so that they are the same ones on every device.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ssl_lab.data.crop import BOX_DRAWS, boxes, check_range
from ssl_lab.errors import UserError
from ssl_lab.rng import fold, uniform

_DRAWS = BOX_DRAWS + 14  # of one view
_SIGMAS = 4  # a Gaussian cut off there has lost 6e-5 of its mass


@dataclass(frozen=True)
class View:
    """The recipe of one view, or of `count` views that are drawn alike; operations come in the order of the fields.

    Attributes:
        size: side in pixels, or, up to 1, share of the side that `MultiView` is given.
        scale: range of the share of the image's area that the crop keeps.
        ratio: range of the crop's width / height.
        count: views of this kind; 0 leaves it out.
        hflip: probability of a horizontal flip.
        jitter: strengths of brightness, contrast, saturation (factor in [max(0, 1 - s), 1 + s]) and hue (shift in
            [-s, s] of the full circle, s <= 0.5), in a random order.
        jitter_p: probability of the jitter as a whole.
        grey_p: probability of three equal channels.
        blur_p: probability of a Gaussian blur.
        blur_sigma: range of its standard deviation in pixels.
        blur_kernel: its odd number of taps, or, below 1, share of the view's side (made odd); None = as many as the
            widest sigma needs, as in PIL, whose radius is the sigma.
        solarize_p: probability that levels from 128 on are inverted.
    """

    size: float = 1.0
    scale: Sequence[float] = (0.2, 1.0)
    ratio: Sequence[float] = (3 / 4, 4 / 3)
    count: int = 1
    hflip: float = 0.5
    jitter: Sequence[float] = (0.0, 0.0, 0.0, 0.0)
    jitter_p: float = 1.0
    grey_p: float = 0.0
    blur_p: float = 0.0
    blur_sigma: Sequence[float] = (0.1, 2.0)
    blur_kernel: float | None = None
    solarize_p: float = 0.0

    def __post_init__(self) -> None:
        check_range("scale", self.scale, 0, 1)
        check_range("ratio", self.ratio, 0)
        check_range("blur_sigma", self.blur_sigma, 0)
        for name in ("hflip", "jitter_p", "grey_p", "blur_p", "solarize_p"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}: a probability lies between 0 and 1")
        if len(self.jitter) != 4 or min(self.jitter) < 0 or self.jitter[3] > 0.5:
            raise UserError(
                f"jitter is {list(self.jitter)}: give four strengths from 0 on, of brightness, contrast, saturation "
                "and, up to 0.5, hue"
            )
        if self.count < 0:
            raise UserError(f"count is {self.count}: it must be 0 (none) or more")
        if self.size <= 0 or (self.size > 1 and self.size != int(self.size)):
            raise UserError(f"size is {self.size}: give whole pixels, or a share of data.image_size up to 1")
        kernel = self.blur_kernel
        if kernel is not None and (kernel <= 0 or (kernel >= 1 and kernel % 2 != 1)):
            raise UserError(f"blur_kernel is {kernel}: give an odd number of taps, or a share of the side below 1")

    def side(self, whole: int, multiple_of: int) -> int:
        """Side in pixels where 1 stands for `whole`; a share below 1 is rounded to a multiple of `multiple_of`."""
        if self.size > 1:
            return int(self.size)
        return whole if self.size == 1 else max(1, round(whole * self.size / multiple_of)) * multiple_of

    def radius(self, side: int) -> int:
        """Taps of the blur on each side of a pixel, less than `side` as a reflection needs it."""
        kernel = self.blur_kernel
        if kernel is None:
            taps = math.ceil(_SIGMAS * self.blur_sigma[1])
        else:
            taps = int(kernel if kernel >= 1 else kernel * side) // 2
        return min(taps, side - 1)


@dataclass(frozen=True, slots=True)
class Draws:
    """Numbers of a batch, on the CPU."""

    box: Tensor  # (B, 4) int64: top, left, height, width
    flip: Tensor  # (B,) bool
    jitter: Tensor  # (B,) bool
    order: Tensor  # (B, 4) int64: which of brightness, contrast, saturation, hue comes first, second, ...
    factors: Tensor  # (B, 4) float32, of brightness, contrast, saturation, and the shift of the hue
    grey: Tensor  # (B,) bool
    blur: Tensor  # (B,) bool
    sigma: Tensor  # (B,) float32
    solarize: Tensor  # (B,) bool

    def take(self, rows: Tensor) -> "Draws":
        """Those of some rows."""
        return Draws(*(getattr(self, field.name)[rows] for field in fields(self)))

    def rows(self) -> list[dict[str, Any]]:
        """The same numbers sample by sample, as plain numbers and lists."""
        columns = {field.name: getattr(self, field.name).tolist() for field in fields(self)}
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def draw(view: View, seed: int, number: int, position: Tensor, height: Tensor, width: Tensor) -> Draws:
    """(B,) int64 positions and image sides, on the CPU -> numbers of recipe `number`: B for each of its views in turn.

    They follow torchvision's RandomResizedCrop, RandomHorizontalFlip, ColorJitter in RandomApply, RandomGrayscale,
    GaussianBlur in RandomApply and RandomSolarize.
    """
    u = uniform(fold(seed, number), position, view.count * _DRAWS)
    u = u.view(-1, view.count, _DRAWS).transpose(0, 1).reshape(-1, _DRAWS)
    height, width = height.repeat(view.count), width.repeat(view.count)
    flip, jitter, grey, blur, sigma, solarize = u[:, BOX_DRAWS : BOX_DRAWS + 6].unbind(1)
    strength = torch.tensor(view.jitter, dtype=torch.float64)
    low, high = (1 - strength).clamp(min=0), 1 + strength
    low[3], high[3] = -strength[3], strength[3]
    smallest, largest = view.blur_sigma
    return Draws(
        box=boxes(u, height, width, view.scale, view.ratio),
        flip=flip < view.hflip,
        jitter=jitter < (view.jitter_p if max(view.jitter) else 0),
        order=u[:, BOX_DRAWS + 6 : BOX_DRAWS + 10].argsort(1),
        factors=(low + (high - low) * u[:, BOX_DRAWS + 10 :]).float(),
        grey=grey < view.grey_p,
        blur=blur < view.blur_p,
        sigma=(smallest + (largest - smallest) * sigma).float(),
        solarize=solarize < view.solarize_p,
    )
