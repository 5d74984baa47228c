"""Images as rows of tokens (iGPT, Chen et al., 2020): every pixel becomes the nearest colour of a palette."""

import torch
import torchvision.transforms.v2.functional as F
from torch import Tensor

from ssl_lab.data.crop import middle
from ssl_lab.data.source import Source
from ssl_lab.errors import UserError
from ssl_lab.rng import fold, uniform
from ssl_lab.types import Batch

_CHUNK = 1 << 16  # pixels whose distances to all colours are held at once


def palette(
    source: Source, colours: int = 512, *, images: int = 500, pixels: int = 1 << 16, steps: int = 20, seed: int = 0
) -> Tensor:
    """The `colours` that stand for those of `source` best: k-means, (colours, 3) int64 RGB in 0..255.

    Centres are rounded to whole numbers after every step, so that all arithmetic is exact and the palette is the same
    on every machine and with any number of threads. A colour without pixels moves to the pixel that is worst served.

    Args:
        source: of images.
        colours: of the palette.
        images: of the source that are looked at, evenly spread.
        pixels: of these images, drawn at random.
        steps: of k-means at most.
        seed: of the draws.

    Raises:
        UserError: fewer different colours than wanted.
    """
    count = min(images, len(source))
    data = source.read([i * len(source) // count for i in range(count)]).data
    seen = torch.cat([image.flatten(1).T for image in data]).long()
    generator = torch.Generator().manual_seed(fold(seed, 0x1697))
    seen = seen[torch.randperm(len(seen), generator=generator)[:pixels]]
    different = seen.unique(dim=0)
    if colours < 2 or len(different) < colours:
        raise UserError(
            f"colours={colours}, and the pixels that were looked at have {len(different)}: take at least 2 and not more"
        )
    centres = _spread(seen, colours, generator)
    for _ in range(steps):
        nearest, distance = assign(seen, centres)
        size = torch.bincount(nearest, minlength=colours)
        total = torch.zeros_like(centres).index_add_(0, nearest, seen)
        moved = (2 * total + size[:, None]).div(2 * size.clamp(min=1)[:, None], rounding_mode="floor")
        empty = size == 0
        moved[empty] = seen[distance.argsort(descending=True, stable=True)[: int(empty.sum())]]
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres


def _spread(pixels: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Different pixels to begin with, each drawn by its squared distance to those before (k-means++, Arthur, 2007)."""
    place = int(torch.randint(len(pixels), (), generator=generator))
    centres, nearest = [pixels[place]], (pixels - pixels[place]).square().sum(1)
    for u in torch.rand(count - 1, generator=generator, dtype=torch.float64).tolist():
        sums = nearest.cumsum(0)
        place = int(torch.searchsorted(sums, int(u * int(sums[-1])), right=True))
        centres.append(pixels[place])
        nearest = nearest.minimum((pixels - pixels[place]).square().sum(1))
    return torch.stack(centres)


def assign(pixels: Tensor, colours: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels (N, 3) and colours (C, 3), whole numbers in 0..255 -> nearest colour (N,) int64 and squared distance (N,).

    All products and sums are whole numbers below 2^24, which float32 holds exactly.
    """
    c = colours.float()
    nearest, distance = [], []
    for part in pixels.float().split(_CHUNK):
        found = (c.square().sum(1) - 2 * part @ c.T).min(1)
        nearest.append(found.indices)
        distance.append((found.values + part.square().sum(1)).long())
    return torch.cat(nearest), torch.cat(distance)


class Pixels:
    """Images -> `tokens` and `labels` (B, size * size) int64: colours in raster order.

    Each is to be told from those before; the first token is one more than the largest colour and no label.

    Args:
        size: side in pixels.
        palette: (C, 3) colours, see `palette`.
        hflip: probability of a horizontal flip.
    """

    def __init__(self, size: int, palette: Tensor, *, hflip: float = 0.5):
        self.size, self.palette, self.hflip = size, palette, hflip
        self.vocab_size = len(palette) + 1

    def __call__(self, images: Tensor | list[Tensor], position: Tensor, seed: int) -> Batch:
        small = torch.stack([self._resized(image) for image in images])
        flip = uniform(seed, position.cpu(), 1)[:, 0] < self.hflip
        small = torch.where(flip.to(small.device)[:, None, None, None], small.flip(3), small)
        rows = small.permute(0, 2, 3, 1).reshape(-1, 3)
        labels = assign(rows, self.palette.to(rows.device))[0].view(len(small), -1)
        start = torch.full_like(labels[:, :1], self.vocab_size - 1)
        return {"tokens": torch.cat([start, labels[:, :-1]], 1), "labels": labels}

    def image(self, tokens: Tensor) -> Tensor:
        """Colours (B, size * size) back to (B, 3, size, size) uint8."""
        return self.palette[tokens].to(torch.uint8).unflatten(1, (self.size, self.size)).permute(0, 3, 1, 2)

    def _resized(self, image: Tensor) -> Tensor:
        if image.shape[1:] == (self.size, self.size):
            return image
        return F.center_crop(F.resize(middle(image), [self.size], antialias=True), [self.size, self.size])
