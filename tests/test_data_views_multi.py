"""MultiView: the same views in any batch and on any kind of input, drawn as torchvision draws them."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torchvision.transforms.v2.functional as F
from torch import Tensor
from torchvision.transforms.v2 import ColorJitter, GaussianBlur, InterpolationMode

from ssl_lab.data.draws import draw
from ssl_lab.data.views import MultiView, View, normalize_
from ssl_lab.errors import UserError

RICH: dict[str, Any] = {
    "jitter": (0.8, 0.8, 0.8, 0.2),
    "jitter_p": 0.8,
    "grey_p": 0.2,
    "blur_p": 0.5,
    "solarize_p": 0.3,
}


def pictures(count: int, height: int = 32, width: int = 32) -> Tensor:
    return torch.randint(0, 256, (count, 3, height, width), generator=torch.Generator().manual_seed(1)).byte()


def multicrop(size: int = 32, **change: Any) -> MultiView:
    views = {"first": View(scale=(0.4, 1), **RICH), "local": View(size=0.43, scale=(0.05, 0.4), count=3, **RICH)}
    return MultiView(size, **{"multiple_of": 4, **views, **change})


def make(views: MultiView, images: Any, position: Tensor, seed: int = 5) -> list[Tensor]:
    return views(images, position, seed)["views"]


def by_torchvision(image: Tensor, view: View, kind: int, row: int, position: int, seed: int, size: int) -> Tensor:
    """One view of one float image (3, H, W) in 0..255, operation by operation, not normalised."""
    height, width = (torch.tensor([n]) for n in image.shape[1:])
    d = draw(view, seed, kind, torch.tensor([position]), height, width).take(torch.tensor([row]))
    top, left, h, w = d.box[0].tolist()
    x = F.resized_crop(image, top, left, h, w, [size, size], interpolation=InterpolationMode.BICUBIC, antialias=True)
    x = x.clamp(0, 255) / 255
    x = F.horizontal_flip(x) if d.flip else x
    if d.jitter:
        for which in d.order[0].tolist():
            change = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)[which]
            x = change(x, float(d.factors[0, which]))
    x = F.rgb_to_grayscale(x, 3) if d.grey else x
    if d.blur:
        x = F.gaussian_blur(x, [2 * view.radius(size) + 1] * 2, [float(d.sigma)] * 2)
    return (F.solarize(x, 128 / 255) if d.solarize else x) * 255


def far_apart(ours: Tensor, theirs: Tensor, tolerance: float) -> float:
    """Share of pixels that differ by more; solarising is not continuous, so a few may."""
    return float(((ours - theirs).abs() > tolerance).float().mean())


def test_views_equal_a_chain_of_torchvisions_functionals() -> None:
    images, position, views = pictures(24, 40, 52), torch.arange(1000, 1024), multicrop(stats="half")
    got = make(views, images, position)
    assert [x.shape[-1] for x in got] == [32, 12, 12, 12]
    drawn = [(view, kind, row) for kind, (view, _) in enumerate(views.kinds) for row in range(view.count)]
    for recipe, ours in zip(drawn, got, strict=True):
        want = [
            by_torchvision(image.float(), *recipe, place, 5, ours.shape[-1])
            for image, place in zip(images, position.tolist(), strict=True)
        ]
        assert far_apart(ours, normalize_(torch.stack(want), "half"), 1e-4) < 2e-4


@pytest.mark.parametrize(("height", "width", "size"), [(32, 32, 32), (80, 100, 70)])
def test_views_depend_on_seed_and_position_alone(height: int, width: int, size: int) -> None:
    images, position, views = pictures(40, height, width), torch.arange(40) * 7, multicrop(size)
    whole = make(views, images, position)
    assert all(torch.equal(a, b) for a, b in zip(whole, make(views, images, position), strict=True))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    torch.rand(3)  # the global state of randomness is of no matter
    for rows in (order, order[:7], order[:1]):
        for got, want in zip(make(views, images[rows], position[rows]), whole, strict=True):
            assert far_apart(got, want[rows], 2e-5) < 1e-4
    assert not torch.equal(make(views, images, position, 6)[0], whole[0])
    assert not torch.equal(make(views, images, position + 1)[0], whole[0])
    assert not torch.equal(whole[1], whole[2])  # views of one kind differ


def test_a_chunk_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    images, position, views = pictures(30), torch.arange(30), multicrop()
    whole = make(views, images, position)
    monkeypatch.setattr("ssl_lab.data.views._CHUNK", 4 * 3 * 32 * 32)
    for got, want in zip(make(views, images, position), whole, strict=True):
        assert far_apart(got, want, 2e-5) < 1e-4


def test_float_pixels_and_lists_give_the_views_of_bytes() -> None:
    images, position = pictures(12), torch.arange(12)
    views = multicrop(stats="half")
    bytes_, floats = make(views, images, position), make(views, images.float(), position)
    for a, b in zip(bytes_, floats, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    gentle = MultiView(16, first=View(hflip=0.5, jitter=(0.4, 0.4, 0.4, 0.1), grey_p=0.2), stats="half")
    smooth = F.gaussian_blur(images, [9, 9], [2.0, 2.0])  # a list goes through whole levels: nothing is near 0 or 255
    for a, b in zip(make(gentle, smooth, position), make(gentle, list(smooth), position), strict=True):
        assert (a - b).abs().mean() < 1.5 * 2 / 255 and (a - b).abs().max() < 8 * 2 / 255


def test_images_of_several_sizes() -> None:
    images = [pictures(1, 30 + 5 * i, 70 - 4 * i)[0] for i in range(6)]
    got = make(multicrop(), images, torch.arange(6))
    assert [tuple(x.shape) for x in got] == [(6, 3, 32, 32)] + [(6, 3, 12, 12)] * 3
    alone = make(multicrop(), images[4:5], torch.tensor([4]))
    for a, b in zip(got, alone, strict=True):
        assert far_apart(a[4:5], b, 2e-5) < 1e-3


def test_the_stored_pixels_are_not_touched() -> None:
    for images in (pictures(6), pictures(6).float(), pictures(6, 80, 80).float()):
        before = images.clone()
        make(MultiView(images.shape[-1], only=View(scale=(1, 1), ratio=(1, 1), **RICH)), images, torch.arange(6))
        assert torch.equal(images, before)


def test_draws_follow_torchvision() -> None:
    count = 20000
    view = View(jitter=(0.8, 1.5, 0.2, 0.1), jitter_p=0.8, grey_p=0.2, blur_p=0.5, solarize_p=0.1, blur_sigma=(0.1, 2))
    side = torch.full((count,), 32)
    d = draw(view, 0, 3, torch.arange(count), side, side)
    shares = {"flip": 0.5, "jitter": 0.8, "grey": 0.2, "blur": 0.5, "solarize": 0.1}
    for name, share in shares.items():
        assert abs(float(getattr(d, name).float().mean()) - share) < 4 * (share * (1 - share) / count) ** 0.5, name
    pairs = torch.stack([getattr(d, name).float() for name in shares]).corrcoef() - torch.eye(5)
    assert pairs.abs().max() < 4.5 / count**0.5  # drawn apart from each other
    theirs = ColorJitter(0.8, 1.5, 0.2, 0.1)
    ranges = (theirs.brightness, theirs.contrast, theirs.saturation, theirs.hue)
    for column, (low, high) in zip([*d.factors.T, d.sigma], [*ranges, GaussianBlur(3, (0.1, 2)).sigma], strict=True):
        uniformity(column, low, high)
    orders = (d.order * torch.tensor([64, 16, 4, 1])).sum(1).unique(return_counts=True)[1]
    assert len(orders) == 24 and (orders / count * 24 - 1).abs().max() < 0.15


def uniformity(values: Tensor, low: float, high: float) -> None:
    """Kolmogorov-Smirnov: the largest gap between the share below a value and the uniform one."""
    ranks = (values.double().sort()[0] - low) / (high - low)
    assert ranks[0] >= 0 and ranks[-1] <= 1 + 1e-6
    assert (ranks - torch.linspace(0, 1, len(ranks), dtype=torch.float64)).abs().max() < 1.95 / len(ranks) ** 0.5


def test_sizes_follow_the_whole_side_and_the_patch() -> None:
    local = View(size=0.4286, count=8)
    for size, multiple_of, want in (
        (224, 16, 96),
        (224, 14, 98),
        (96, 16, 48),
        (32, 16, 16),
        (32, 4, 12),
        (16, 16, 16),
    ):
        assert MultiView(size, multiple_of=multiple_of, first=View(), local=local).sizes == [size] + 8 * [want]
    assert MultiView(224, first=View(), local=View(size=50)).sizes == [224, 50]
    assert MultiView(224, first=View(), local=View(count=0)).sizes == [224]
    assert View(blur_kernel=0.1).radius(224) == 11 and View(blur_kernel=9).radius(224) == 4
    assert View().radius(224) == 8 and View().radius(6) == 5


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"scale": (1.0, 0.2)}, "scale"),
        ({"scale": (0.0, 1.0)}, "scale"),
        ({"scale": (0.2, 1.5)}, "scale"),
        ({"ratio": (1.3,)}, "ratio"),
        ({"blur_sigma": (0.0, 2.0)}, "blur_sigma"),
        ({"jitter": (0.4, 0.4, 0.4)}, "jitter"),
        ({"jitter": (0.4, 0.4, 0.4, 0.6)}, "jitter"),
        ({"grey_p": 1.2}, "grey_p"),
        ({"count": -1}, "count"),
        ({"size": 33.5}, "size"),
        ({"blur_kernel": 8}, "blur_kernel"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(change: dict[str, Sequence[float]], word: str) -> None:
    with pytest.raises(UserError, match=word):
        View(**change)  # type: ignore[arg-type]


def test_a_multiview_that_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match="no View"):
        MultiView(32, first=View(), local={"count": 2})  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no views"):
        MultiView(32, first=View(count=0))
    with pytest.raises(UserError, match="largest"):
        MultiView(32, local=View(size=16), first=View())
    with pytest.raises(UserError, match="bilinear, bicubic"):
        MultiView(32, first=View(), interpolation="nearest")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="imagenet, clip, half"):
        MultiView(32, first=View(), stats="none")
