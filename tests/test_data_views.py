import pytest
import torch
import torchvision.transforms.v2.functional as F
from torchvision.transforms.v2 import InterpolationMode, RandomResizedCrop

from ssl_lab.data.crop import boxes, crop_into
from ssl_lab.data.resample import resample
from ssl_lab.data.views import STATS, Crop, Resize, normalize_
from ssl_lab.errors import UserError
from ssl_lab.rng import uniform


def pictures(count: int, height: int, width: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, height, width), generator=torch.Generator().manual_seed(0)).byte()


def draws(count: int) -> torch.Tensor:
    return uniform(0, torch.arange(count), 23)


def some_boxes(count: int, height: int, width: int, scale: tuple[float, float] = (0.05, 1.0)) -> torch.Tensor:
    return boxes(draws(count), torch.full((count,), height), torch.full((count,), width), scale, (3 / 4, 4 / 3))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("height", "width", "size"), [(32, 32, 32), (40, 64, 24), (20, 33, 48)])
def test_resample_equals_torchvision_per_sample(interpolation: str, height: int, width: int, size: int) -> None:
    images, box = pictures(24, height, width), some_boxes(24, height, width)
    flip = torch.arange(24) % 2 == 0
    got = resample(images, box, flip, size, interpolation)
    for image, (top, left, h, w), flipped, ours in zip(images, box.tolist(), flip, got, strict=True):
        mode = InterpolationMode(interpolation)
        want = F.resized_crop(image.float(), top, left, h, w, [size, size], interpolation=mode, antialias=True)
        want = want.clamp(0, 255).flip(-1) if flipped else want.clamp(0, 255)
        torch.testing.assert_close(ours, want, atol=2e-3, rtol=0)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("layout", ["planes", "pixels", "float"])
def test_a_single_crop_is_torchvisions_to_the_bit(interpolation: str, layout: str) -> None:
    mode = InterpolationMode(interpolation)
    for i, (image, box) in enumerate(zip(pictures(8, 90, 121), some_boxes(8, 90, 121).tolist(), strict=True)):
        stored = image.permute(1, 2, 0).contiguous().permute(2, 0, 1) if layout == "pixels" else image
        stored = stored.float() if layout == "float" else stored
        top, left, h, w = box
        want = F.resized_crop(stored, top, left, h, w, [50, 50], interpolation=mode, antialias=True).float()
        got = torch.empty(3, 50, 50)
        crop_into(got, stored, box, i % 2 == 0, interpolation)  # type: ignore[arg-type]
        assert torch.equal(got, (want.flip(-1) if i % 2 == 0 else want).clamp(0, 255))


def test_crop_of_a_list_equals_crop_of_a_batch_up_to_rounding() -> None:
    images, position = pictures(16, 30, 44) // 2 + 64, torch.arange(100, 116)  # away from 0 and 255: no clipping
    crop = Crop(24, stats="half")
    batch, single = crop(images, position, 3)["image"], crop(list(images), position, 3)["image"]
    assert (batch - single).abs().max() < 3 * 2 / 255  # two passes, each rounded to whole levels
    assert (batch - single).abs().mean() < 0.6 * 2 / 255


def test_boxes_lie_inside_and_follow_torchvision() -> None:
    count = 4000
    box = some_boxes(count, 48, 64, (0.2, 1.0))
    top, left, height, width = box.unbind(1)
    assert box.min() >= 0 and (top + height <= 48).all() and (left + width <= 64).all()
    torch.manual_seed(0)
    theirs = [RandomResizedCrop.get_params(torch.empty(3, 48, 64), [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(count)]
    want = torch.tensor(theirs).double()
    for column in range(4):
        ours = box[:, column].double()
        spread = want[:, column].std()
        assert (ours.mean() - want[:, column].mean()).abs() < 0.1 * spread
        assert (ours.std() / spread - 1).abs() < 0.06


def test_boxes_that_never_fit_become_the_largest_centred_crop() -> None:
    for height, width in ((10, 100), (100, 10)):
        box = boxes(draws(1), torch.tensor([height]), torch.tensor([width]), (1.0, 1.0), (3 / 4, 4 / 3))
        theirs = RandomResizedCrop.get_params(torch.empty(3, height, width), [1.0, 1.0], [3 / 4, 4 / 3])
        assert box.tolist() == [list(theirs)]


def test_a_sample_depends_on_seed_and_position_alone() -> None:
    images, position, crop = pictures(12, 32, 32), torch.arange(12) * 7, Crop(32)
    whole = crop(images, position, 5)["image"]
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    torch.rand(10)  # the global state of randomness is of no matter
    torch.testing.assert_close(crop(images[order], position[order], 5)["image"], whole[order], atol=1e-5, rtol=0)
    torch.testing.assert_close(crop(images[3:4], position[3:4], 5)["image"], whole[3:4], atol=1e-5, rtol=0)
    assert not torch.equal(crop(images, position, 6)["image"], whole)
    assert not torch.equal(crop(images, position + 1, 5)["image"], whole)


def test_flip_happens_as_often_as_asked() -> None:
    images = torch.zeros(400, 3, 8, 8, dtype=torch.uint8)
    images[..., 4:] = 255
    crop = Crop(8, scale=(1, 1), ratio=(1, 1), stats="half")
    right = crop(images, torch.arange(400), 0)["image"][:, 0, 0, -1] > 0
    assert 160 < int(right.sum()) < 240
    still = Crop(8, scale=(1, 1), ratio=(1, 1), hflip=0, stats="half")(images, torch.arange(400), 0)["image"]
    torch.testing.assert_close(still, normalize_(images.float(), "half"), atol=1e-4, rtol=0)


def test_resize_equals_torchvision_and_leaves_the_right_size_alone() -> None:
    images, position = pictures(3, 40, 60), torch.arange(3)
    got = Resize(28, crop_pct=0.875, stats="half")(images, position, 0)["image"]
    want = F.center_crop(F.resize(images, [32], interpolation=InterpolationMode.BICUBIC, antialias=True), [28, 28])
    torch.testing.assert_close(got, F.normalize(want.float() / 255, [0.5] * 3, [0.5] * 3), atol=1e-5, rtol=0)
    listed = Resize(28, crop_pct=0.875, stats="half")(list(images), position, 0)["image"]
    torch.testing.assert_close(got, listed)
    same = pictures(2, 32, 32)
    assert torch.equal(Resize(32)(same, position[:2], 0)["image"], normalize_(same.float(), "imagenet"))
    assert same.dtype == torch.uint8  # the stored pixels are not touched


def test_a_very_long_image_loses_its_ends_before_it_is_resized() -> None:
    position, long = torch.arange(1), torch.zeros(1, 3, 2, 60_001, dtype=torch.uint8)
    long[..., 29_000:31_000] = 255
    for images in (long, long.transpose(2, 3), list(long)):
        image = Resize(256)(images, position, 0)["image"]  # whole it would need 6 GB
        assert image.shape == (1, 3, 256, 256) and image.amin() > 2
    row = pictures(1, 4, 100)
    want = F.center_crop(F.resize(row, [8], interpolation=InterpolationMode.BICUBIC, antialias=True), [8, 8])
    assert torch.equal(Resize(8)(row, position, 0)["image"], normalize_(want.float(), "imagenet"))


@pytest.mark.parametrize("name", list(STATS))
def test_normalize_takes_the_named_mean_and_deviation(name: str) -> None:
    images = pictures(2, 4, 4)
    want = F.normalize(images.float() / 255, *map(list, STATS[name]))
    torch.testing.assert_close(normalize_(images.float(), name), want, atol=1e-5, rtol=1e-5)


def test_an_unknown_name_of_statistics_is_answered_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="imagenet, clip, half"):
        Crop(32, stats="imagenette")
