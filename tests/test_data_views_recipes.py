"""The recipes in conf/views: what they say, and that they follow data.image_size and the command line."""

import pytest
import torch
from torch import Tensor

from ssl_lab.cli import catalog
from ssl_lab.cli.check import check_targets
from ssl_lab.cli.compose import build, compose
from ssl_lab.data.batches import TrainBatches
from ssl_lab.data.module import DataModule
from ssl_lab.data.shapes import Shapes
from ssl_lab.data.views import MultiView, Resize
from ssl_lab.errors import UserError


def composed(name: str, *words: str):
    cfg = compose("train", ["method=mae", f"views@data.views={name}", *words], [catalog.conf_folder()])
    check_targets(cfg)
    return cfg


def recipe(name: str, *words: str) -> MultiView:
    return build(composed(name, *words).data.views)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("simclr", [224] * 2), ("moco_v1", [224] * 2), ("moco_v2", [224] * 2), ("byol", [224] * 2)]
    + [(name, [224] * 2 + [96] * 8) for name in ("dino", "dinov2")],
)
def test_sizes_at_224(name: str, sizes: list[int]) -> None:
    assert recipe(name, "data.image_size=224").sizes == sizes


def test_numbers_of_the_papers() -> None:
    (simclr, _), *_ = recipe("simclr").kinds
    assert (*simclr.jitter, simclr.jitter_p, simclr.grey_p, simclr.blur_p) == (0.8, 0.8, 0.8, 0.2, 0.8, 0.2, 0.5)
    assert tuple(simclr.scale) == (0.08, 1) and simclr.radius(224) == 11 and simclr.solarize_p == 0
    (v1, _), *_ = recipe("moco_v1").kinds
    assert (*v1.jitter, v1.jitter_p, v1.blur_p) == (0.4, 0.4, 0.4, 0.4, 1, 0) and tuple(v1.scale) == (0.2, 1)
    (v2, _), *_ = recipe("moco_v2").kinds
    assert (*v2.jitter, v2.jitter_p, v2.blur_p) == (0.4, 0.4, 0.4, 0.1, 0.8, 0.5) and tuple(v2.scale) == (0.2, 1)
    for name, scale, local in (
        ("byol", (0.08, 1), None),
        ("dino", (0.4, 1), (0.05, 0.4)),
        ("dinov2", (0.32, 1), (0.05, 0.32)),
    ):
        views = [view for view, _ in recipe(name).kinds]
        assert [(v.blur_p, v.solarize_p) for v in views] == [(1.0, 0), (0.1, 0.2), (0.5, 0)][: len(views)]
        assert {(*v.jitter, v.jitter_p, v.grey_p, v.hflip) for v in views} == {(0.4, 0.4, 0.2, 0.1, 0.8, 0.2, 0.5)}
        assert [tuple(v.scale) for v in views] == [scale, scale, local][: len(views)]
    crop = recipe("ijepa")
    assert crop.scale == (0.3, 1.0) and crop.hflip == 0


def test_the_command_line_reaches_every_view() -> None:
    assert recipe("dino", "data.image_size=32").sizes == [32] * 2 + [16] * 8
    assert recipe("dino", "data.image_size=32", "data.views.multiple_of=4").sizes[2] == 12
    assert recipe("dinov2", "data.image_size=224", "data.views.multiple_of=14").sizes[2] == 98
    assert recipe("dino", "data.views.local.count=0").sizes == [32] * 2
    assert [v.count for v, _ in recipe("dino", "data.views.local.count=3").kinds] == [1, 1, 3]
    assert [v.scale[0] for v, _ in recipe("dino", "data.views.first.scale=[.14,1]").kinds] == [0.14, 0.14, 0.05]
    assert recipe("simclr", "data.views.both.blur_p=0").kinds[0][0].blur_p == 0
    with pytest.raises(UserError, match=r"data\.views\.both\.blurp"):
        composed("simclr", "+data.views.both.blurp=0")


def test_views_on_the_device_are_those_of_a_worker() -> None:
    views, source = recipe("dino"), Shapes("train", length=40)
    kept = DataModule(source, source, views, batch_size=8, eval_views=Resize(32), augment_on_device=True, seed=3)
    stored = next(iter(kept.train_dataloader()))
    assert stored["image"].dtype == torch.uint8
    late = kept.on_after_batch_transfer(stored, 0)
    early = TrainBatches(source, views, 8, 3, 0, 1)(0)
    assert set(late) == set(early) == {"views", "target", "index", "position"}
    for a, b in zip(late["views"], early["views"], strict=True):
        assert isinstance(a, Tensor) and torch.equal(a, b)


def test_workers_send_the_same_views() -> None:
    views, source = recipe("byol"), Shapes("train", length=40)
    batches = []
    for workers in (0, 1):
        data = DataModule(source, source, views, batch_size=8, eval_views=Resize(32), num_workers=workers)
        batches.append(next(iter(data.train_dataloader())))
    for a, b in zip(*(batch["views"] for batch in batches), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
