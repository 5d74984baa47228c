"""Grids have the size they should, feature maps are deterministic and mean what they say."""

import pytest
import torch
from PIL import Image
from torch import nn

from ssl_lab.analysis.pictures import feature_maps, pca_map
from ssl_lab.errors import UserError
from ssl_lab.pictures import grid, save_png, side_by_side, unnormalize
from ssl_lab.types import Encoded


def image(value, size=8):
    return torch.full((3, size, size), value, dtype=torch.uint8)


def test_unnormalize_inverts_normalisation():
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    pixels = torch.randint(0, 256, (2, 3, 5, 4), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    m, s = (torch.tensor(v)[:, None, None] for v in (mean, std))
    assert torch.equal(unnormalize((pixels / 255 - m) / s, mean, std), pixels)
    assert unnormalize(torch.full((3, 1, 1), 99.0), mean, std).flatten().tolist() == [255] * 3


def test_a_grid_places_images_row_by_row_on_white():
    out = grid([image(0), image(50), image(100)], columns=2, scale=1)
    assert out.shape == (3, 2 * 10 + 2, 2 * 10 + 2) and out.dtype == torch.uint8
    assert out[:, 2:10, 2:10].eq(0).all() and out[:, 2:10, 12:20].eq(50).all() and out[:, 12:20, 2:10].eq(100).all()
    assert out[:, 12:, 12:].eq(255).all() and out[:, :2].eq(255).all()


@pytest.mark.parametrize(("size", "scale"), [(32, 4), (96, 1), (224, 1), (8, 16)])
def test_small_images_are_enlarged_by_whole_pixels(size, scale):
    picture = torch.randint(0, 256, (3, size, size), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    out = grid([picture], columns=1)
    assert out.shape == (3, size * scale + 4, size * scale + 4)
    first, last = slice(2, -2, scale), slice(1 + scale, -2, scale)  # corners of each enlarged pixel
    assert torch.equal(out[:, first, first], picture) and torch.equal(out[:, last, last], picture)


def test_labels_stand_above_their_columns():
    out = grid([image(0, 32), image(0, 32)], columns=2, labels=["input", ""])
    plain = grid([image(0, 32), image(0, 32)], columns=2)
    top = out.shape[1] - plain.shape[1]
    assert top > 10 and torch.equal(out[:, top:], plain)
    header = out[:, :top]
    assert (header[:, :, 2:130] < 128).any() and header[:, :, 132:].eq(255).all()
    grid([image(0)], columns=1, scale=1, labels=["far too long for eight pixels"])


def test_named_columns_side_by_side():
    a = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
    out = side_by_side({"a": a, "b": a + 1}, scale=2)
    assert out.shape[1] > 3 * 18 + 2 and out.shape[2] == 2 * 18 + 2
    assert out[:, -18:-2, 2:18].eq(0).all() and out[:, -18:-2, 20:36].eq(1).all()


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="one size"):
        grid([image(0), image(0, 9)], columns=2)
    with pytest.raises(ValueError, match="one size"):
        grid([], columns=2)
    with pytest.raises(ValueError, match="1 labels for 2"):
        grid([image(0)], columns=2, labels=["a"])


def test_png_round_trip(tmp_path):
    picture = torch.randint(0, 256, (3, 7, 5), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    save_png(tmp_path / "new" / "a.png", picture)
    read = torch.frombuffer(bytearray(Image.open(tmp_path / "new/a.png").tobytes()), dtype=torch.uint8)
    assert torch.equal(read.view(7, 5, 3).permute(2, 0, 1), picture)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.png"]


def test_pca_map_is_deterministic_and_blind_to_rotation_of_the_features():
    g = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 12, 5, generator=g) * torch.tensor([9.0, 5, 3, 0.1, 0.1])
    first = pca_map(tokens, 3, 4)
    assert first.shape == (2, 3, 3, 4) and first.dtype == torch.uint8
    assert torch.equal(first, pca_map(tokens, 3, 4))
    q, _ = torch.linalg.qr(torch.randn(5, 5, generator=g))
    turned = pca_map(tokens @ q, 3, 4).int()
    for a, b in zip(first.int().transpose(0, 1), turned.transpose(0, 1)):  # a sign may turn with the axes
        assert (a - b).abs().max() <= 1 or (255 - a - b).abs().max() <= 1


def test_pca_map_shows_the_strongest_direction_as_red():
    tokens = torch.zeros(1, 4, 6)
    tokens[0, :, 2] = torch.tensor([0.0, 1, 1, 3])
    out = pca_map(tokens, 2, 2)
    assert out[0, 0].flatten().argsort().tolist()[0] == 0 and out[0, 0].flatten().argmax() == 3
    assert out[0, 0].flatten()[1] == out[0, 0].flatten()[2]
    assert out[0, 1:].eq(128).all()  # nothing varies there
    assert pca_map(torch.ones(1, 4, 2), 2, 2).eq(128).all()


def test_feature_maps_have_the_size_of_the_image():
    class Net(nn.Module):
        def __init__(self, extra=0):
            super().__init__()
            self.extra = extra

        def forward(self, x):
            tokens = nn.functional.unfold(x, 4, stride=4).transpose(1, 2)
            return Encoded(torch.cat([tokens, tokens[:, : self.extra]], 1), tokens[:, :0])

    x = torch.randn(2, 3, 8, 16, generator=torch.Generator().manual_seed(0))
    out = feature_maps(Net(), x)
    assert out.shape == x.shape and out.dtype == torch.uint8
    assert torch.equal(out[:, :, ::4, ::4].repeat_interleave(4, 2).repeat_interleave(4, 3), out)
    with pytest.raises(UserError, match="9 tokens of Net form no grid on images of 8 x 16"):
        feature_maps(Net(1), x)
