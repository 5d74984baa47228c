"""Images as rows of colours: the palette is exact k-means, every pixel becomes its nearest colour."""

import pytest
import torch

from ssl_lab.data.pixels import Pixels, assign, palette
from ssl_lab.data.source import Samples
from ssl_lab.errors import UserError


class Images:
    """Random images whose colours gather around four."""

    classes, unit = [], "images"
    centres = torch.tensor([[250, 10, 10], [10, 250, 10], [10, 10, 250], [200, 200, 200]])

    def __init__(self, count=20, noise=5):
        g = torch.Generator().manual_seed(0)
        kind = torch.randint(0, 4, (count, 8, 8), generator=g)
        pixels = self.centres[kind] + torch.randint(-noise, noise + 1, (count, 8, 8, 3), generator=g)
        self.images = pixels.clamp(0, 255).to(torch.uint8).permute(0, 3, 1, 2).contiguous()

    def __len__(self):
        return len(self.images)

    def read(self, rows):
        return Samples(self.images[rows], torch.full((len(rows),), -1), torch.tensor(rows))


def test_the_palette_finds_the_colours_and_is_the_same_with_any_threads():
    found = palette(Images(), 4)
    order = torch.cdist(found.float(), Images.centres.float()).argmin(1)
    assert sorted(order.tolist()) == [0, 1, 2, 3]
    assert (found - Images.centres[order]).abs().max() <= 2
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)
    try:
        assert torch.equal(palette(Images(), 4), found)
    finally:
        torch.set_num_threads(threads)


def test_every_pixel_goes_to_its_nearest_colour_exactly():
    g = torch.Generator().manual_seed(1)
    pixels, colours = torch.randint(0, 256, (500, 3), generator=g), torch.randint(0, 256, (40, 3), generator=g)
    nearest, distance = assign(pixels, colours)
    naive = (pixels[:, None] - colours[None]).square().sum(-1)
    assert torch.equal(distance, naive.min(1).values)
    assert torch.equal(naive.gather(1, nearest[:, None])[:, 0], distance)


def test_k_means_serves_better_than_its_beginning_and_uses_every_colour():
    source = Images(noise=60)
    pixels = source.images.permute(0, 2, 3, 1).reshape(-1, 3).long()
    first, last = (palette(source, 16, steps=n) for n in (0, 20))
    assert assign(pixels, last)[1].sum() < 0.8 * assign(pixels, first)[1].sum()
    assert len(assign(pixels, last)[0].unique()) == 16


def test_rows_are_raster_order_behind_a_start_token():
    source = Images()
    view = Pixels(8, palette(source, 4), hflip=0.0)
    batch = view(source.images[:3], torch.arange(3), 0)
    assert view.vocab_size == 5 and batch["tokens"].shape == batch["labels"].shape == (3, 64)
    assert (batch["tokens"][:, 0] == 4).all() and torch.equal(batch["tokens"][:, 1:], batch["labels"][:, :-1])
    assert (view.image(batch["labels"]).int() - source.images[:3].int()).abs().max() <= 12
    flipped = Pixels(8, view.palette, hflip=1.0)(source.images[:3], torch.arange(3), 0)
    assert torch.equal(flipped["labels"].view(3, 8, 8).flip(2), batch["labels"].view(3, 8, 8))
    small = Pixels(4, view.palette)(list(source.images[:3]), torch.arange(3), 0)
    assert small["labels"].shape == (3, 16)
    line = Pixels(256, view.palette)([torch.zeros(3, 1, 60_000, dtype=torch.uint8)], torch.arange(1), 0)
    assert line["labels"].shape == (1, 256 * 256)  # whole, it would need 12 GB


def test_flips_depend_on_seed_and_position_alone():
    source, at = Images(), torch.arange(20)
    view = Pixels(8, palette(source, 4))
    whole = view(source.images, at, 7)["labels"]
    assert torch.equal(view(source.images[5:9], at[5:9], 7)["labels"], whole[5:9])
    assert not torch.equal(view(source.images, at, 8)["labels"], whole)


def test_too_few_colours_are_named():
    with pytest.raises(UserError, match="colours=300"):
        palette(Images(1), 300)
