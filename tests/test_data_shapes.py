import pytest
import torch

from ssl_lab.data.shapes import Shapes
from ssl_lab.data.shapes_layout import COLORS, SHAPES
from ssl_lab.errors import UserError


def test_a_scene_depends_on_seed_split_and_index_alone() -> None:
    short, long = Shapes("train", 20), Shapes("train", 150)
    a, b = short.read(range(20)), long.read(range(20))
    assert torch.equal(a.data, b.data) and torch.equal(a.targets, b.targets)
    assert torch.equal(long.scene(137).image, long.read([137]).data[0])
    for other in (Shapes("test", 20), Shapes("train", 20, seed=1)):
        assert not torch.equal(other.read(range(20)).data, a.data)


def test_rows_come_in_the_order_asked_for() -> None:
    shapes = Shapes("test", 30)
    samples = shapes.read([7, 3, 7])
    assert samples.rows.tolist() == [7, 3, 7]
    assert torch.equal(samples.data[0], samples.data[2])
    assert shapes.classes[int(samples.targets[1])] == shapes.scene(3).attributes["shape"]


@pytest.mark.parametrize("size", [32, 48])
def test_pictures_fill_the_range_and_classes_are_even(size: int) -> None:
    shapes = Shapes("train", 400, image_size=size)
    samples = shapes.read(range(400))
    assert samples.data.shape == (400, 3, size, size) and samples.data.dtype == torch.uint8
    assert samples.data.float().std() > 40
    counts = samples.targets.bincount(minlength=len(SHAPES))
    assert counts.min() > 25 and counts.max() < 80


def test_words_agree_with_the_scene() -> None:
    shapes = Shapes("train", 60)
    seen = set()
    for i in range(60):
        scene = shapes.scene(i)
        assert scene.attributes["shape"] == scene.objects[0].shape in SHAPES
        assert scene.attributes["color"] in COLORS
        assert scene.attributes["count"] == str(len(scene.objects))
        assert len(scene.captions) >= 3
        for caption in scene.captions:
            assert scene.attributes["shape"] in caption and scene.attributes["color"] in caption
        answers = dict(scene.questions)
        assert answers["what shape is the largest object?"] == scene.attributes["shape"]
        assert answers["how many objects are there?"] == scene.attributes["count"]
        for question, answer in scene.questions:
            if question.startswith("is there a "):
                assert (answer == "yes") == (question.split()[3] in [x.shape for x in scene.objects])
        seen.add(len(scene.objects))
    assert seen >= {1, 2, 3}


def test_the_target_says_nothing_about_color_and_place() -> None:
    shapes = Shapes("train", 2000)
    samples = shapes.read(range(2000))
    means = torch.stack([samples.data[samples.targets == c].float().mean((0, 2, 3)) for c in range(len(SHAPES))])
    assert (means - means.mean(0)).abs().max() < 14  # of 255; the spread of single images is about 60


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="length"):
        Shapes("train", 0)
    with pytest.raises(UserError, match="valid"):
        Shapes("valid", 3)  # type: ignore[arg-type]
