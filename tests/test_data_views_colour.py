"""Every operation on a batch equals torchvision's functional on each sample, given the same numbers."""

import itertools

import pytest
import torch
import torchvision.transforms.v2.functional as F
from torch import Tensor

from ssl_lab.data.blur import blur, blur_
from ssl_lab.data.colour import HUE, adjust_, grey, hue_place, jitter_, solarize_

THEIRS = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
ORDERS = torch.tensor(list(itertools.permutations(range(4))))


def pictures(count: int, size: int = 24) -> Tensor:
    """Random pixels, some of them with equal channels, black or white, as whole levels in float32."""
    x = torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(count)).float()
    x[:, :, 0] = x[:, :1, 0]  # grey
    x[:, 0, 1] = x[:, 1, 1]  # two equal channels
    x[:, 1, 2] = x[:, 2, 2]
    x[:, :, 3, :8], x[:, :, 3, 8:] = 0, 255
    return x


def close(ours: Tensor, theirs: Tensor) -> None:
    """Both in 0..255; 1e-5 of the range."""
    torch.testing.assert_close(ours, theirs, atol=2.5e-3, rtol=1e-5)


@pytest.mark.parametrize("shift", [0.0, 0.01, -0.01, 0.1, -0.1, 1 / 6, -1 / 6, 0.3, -0.3, 0.4999, 0.5, -0.5])
def test_hue_without_a_round_trip_equals_torchvisions(shift: float) -> None:
    x = pictures(4)
    want = torch.stack([F.adjust_hue(image / 255, shift) * 255 for image in x])
    adjust_(x, HUE, shift)
    close(x, want)


def test_hue_of_float64_pixels_is_exact_where_a_third_of_the_circle_exchanges_channels() -> None:
    x = pictures(2).double()
    before = x.clone()
    adjust_(x[:1], HUE, 1 / 3)
    adjust_(x[1:], HUE, -1 / 3)
    torch.testing.assert_close(x[0], before[0].roll(1, 0), atol=1e-10, rtol=0)
    torch.testing.assert_close(x[1], before[1].roll(-1, 0), atol=1e-10, rtol=0)


@pytest.mark.parametrize("strength", [0.4, 1.0])
def test_jitter_in_every_order_equals_torchvisions_chain(strength: float) -> None:
    x = pictures(len(ORDERS))
    noise = torch.rand(len(ORDERS), 4, generator=torch.Generator().manual_seed(3)) * 2 - 1
    factors = torch.cat([1 + strength * noise[:, :3], 0.5 * noise[:, 3:]], 1)
    want = []
    for image, order, factor in zip(x / 255, ORDERS.tolist(), factors.tolist(), strict=True):
        for which in order:
            image = THEIRS[which](image, factor[which])
        want.append(image * 255)
    rows = hue_place(ORDERS).argsort()
    ours = x[rows]
    jitter_(ours, ORDERS[rows], factors[rows])
    close(ours, torch.stack(want)[rows])
    for image, order, factor, theirs in zip(x, ORDERS.tolist(), factors.tolist(), want, strict=True):
        for which in order:
            adjust_(image[None], which, factor[which])
        close(image, theirs)


@pytest.mark.parametrize("which", range(3))
def test_one_factor_at_a_time_equals_torchvisions(which: int) -> None:
    x, value = pictures(6), torch.tensor([0.0, 0.3, 1.0, 1.2, 1.8, 1.0])
    factors = torch.ones(6, 4)
    factors[:, 3], factors[:, which] = 0, value
    want = torch.stack([THEIRS[which](image / 255, f) * 255 for image, f in zip(x, value.tolist(), strict=True)])
    jitter_(x, torch.arange(4).repeat(6, 1), factors)
    close(x, want)


def test_grey_and_solarize_equal_torchvisions() -> None:
    x = pictures(3)
    x[0, 0, 5, :4] = torch.tensor([127.0, 127.9, 128.0, 128.1])
    close(grey(x).expand_as(x), F.rgb_to_grayscale(x, 3))
    want = torch.stack([F.solarize(i / 255, 128 / 255) for i in x]) * 255
    solarize_(x)
    torch.testing.assert_close(x, want)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (96, 96), (40, 23), (17, 70)])
@pytest.mark.parametrize("radius", [1, 4, 8, 11])
def test_blur_equals_torchvisions(height: int, width: int, radius: int) -> None:
    x = torch.rand(5, 3, height, width, generator=torch.Generator().manual_seed(0)) * 255
    sigma = torch.tensor([0.1, 0.5, 1.0, 1.7, 2.0])
    taps = 2 * radius + 1
    want = [F.gaussian_blur(image, [taps, taps], [s, s]) for image, s in zip(x, sigma.tolist(), strict=True)]
    close(blur(x, sigma, radius), torch.stack(want))
    for image, s, theirs in zip(x, sigma.tolist(), want, strict=True):
        blur_(image, s, radius)
        close(image, theirs)


def test_blur_of_one_colour_leaves_it_and_mass_is_kept() -> None:
    flat = torch.full((2, 3, 33, 50), 200.0)
    torch.testing.assert_close(blur(flat, torch.tensor([0.3, 2.0]), 8), flat, atol=1e-3, rtol=0)
    point = torch.zeros(1, 3, 64, 64)
    point[:, :, 30, 40] = 255
    assert abs(float(blur(point, torch.tensor([1.5]), 8).sum()) - 3 * 255) < 0.02
