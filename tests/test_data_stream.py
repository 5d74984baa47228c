from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from ssl_lab.data.batches import Loader, TrainBatches
from ssl_lab.data.module import DataModule
from ssl_lab.data.source import Samples
from ssl_lab.data.stream import batch_positions, eval_rows, rows_at
from ssl_lab.data.views import Crop, Resize
from ssl_lab.errors import UserError


class Noise:
    """Random 8 x 8 images whose first pixel is their row."""

    classes, unit = ["even", "odd"], "images"

    def __init__(self, length: int):
        self.images = torch.randint(0, 256, (length, 3, 8, 8), generator=torch.Generator().manual_seed(0)).byte()

    def __len__(self) -> int:
        return len(self.images)

    def read(self, rows: Sequence[int]) -> Samples:
        index = torch.tensor(rows)
        return Samples(self.images[index], index % 2, index)


class Broken(Noise):
    def read(self, rows: Sequence[int]) -> Samples:
        raise UserError("no image is readable")


def module(length: int = 37, **options: Any) -> DataModule:
    made: dict[str, Any] = {"batch_size": 4, "eval_views": Resize(8), "image_size": 8, "seed": 3, **options}
    return DataModule(Noise(length), Noise(10), Crop(8), **made)


def test_every_pass_visits_every_row_once_in_an_order_of_its_own() -> None:
    rows = rows_at(torch.arange(3 * 11), 0, 11).reshape(3, 11)
    assert torch.equal(rows.sort(1).values, torch.arange(11).expand(3, 11))
    assert not torch.equal(rows[0], rows[1]) and not torch.equal(rows[1], rows[2])
    assert not torch.equal(rows_at(torch.arange(11), 1, 11), rows[0])
    assert torch.equal(rows_at(torch.arange(8, 25), 0, 11), rows.flatten()[8:25])  # no history: any slice alone
    assert torch.equal(rows_at(torch.arange(5), 0, 1), torch.zeros(5, dtype=torch.int64))


def test_two_ranks_see_the_rows_and_views_of_one_process() -> None:
    source, crop = Noise(23), Crop(8)
    for number in range(9):
        one = TrainBatches(source, crop, 8, 5, 0, 1)(number)
        two = [TrainBatches(source, crop, 4, 5, rank, 2)(number) for rank in range(2)]
        for key in ("index", "position", "target", "image"):
            joined = torch.cat([x[key] for x in two])  # type: ignore[literal-required]
            torch.testing.assert_close(joined, one[key], atol=1e-5, rtol=0)  # type: ignore[literal-required]


def test_accumulation_only_cuts_the_step_into_parts() -> None:
    whole = torch.cat([batch_positions(n, 8) for n in range(3)])
    assert torch.equal(torch.cat([batch_positions(n, 4) for n in range(6)]), whole)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_starts_at_the_step_of_the_trainer(workers: int) -> None:
    data = module(num_workers=workers)
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        global_step=0, accumulate_grad_batches=2, world_size=1, global_rank=0
    )
    straight = [batch for batch, _ in zip(data.train_dataloader(), range(30), strict=False)]
    data.trainer.global_step = 12  # type: ignore[misc,union-attr]
    later = [batch for batch, _ in zip(data.train_dataloader(), range(6), strict=False)]
    for a, b in zip(straight[24:], later, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in ("image", "target", "index", "position"))  # type: ignore[literal-required]
    for first, there in ((0, straight), (3, straight[3:])):
        anew = next(iter(data.train_dataloader(first)))
        assert torch.equal(anew["position"], there[0]["position"]) and torch.equal(anew["image"], there[0]["image"])


class Recorder(L.LightningModule):
    """Keeps what it is fed; its weights are the sum of it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.seen: list[dict[str, Tensor]] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.seen.append({key: value.clone() for key, value in batch.items()})
        return self.layer(batch["image"].mean().reshape(1)).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


def fit(recorder: L.LightningModule, data: DataModule, steps: int, accumulate: int, ckpt: Path | None) -> L.Trainer:
    trainer = L.Trainer(
        max_steps=steps, max_epochs=-1, accumulate_grad_batches=accumulate, accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(recorder, data, ckpt_path=ckpt, weights_only=True if ckpt else None)
    return trainer


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize(("workers", "accumulate"), [(0, 1), (0, 2), (2, 1), (2, 2)])
def test_a_resumed_run_is_fed_the_same_batches(tmp_path: Path, workers: int, accumulate: int, on_device: bool) -> None:
    if on_device and workers:
        pytest.skip("the place of the views and the number of workers do not meet")
    data = lambda: module(num_workers=workers, augment_on_device=on_device)  # noqa: E731
    straight, before, after = Recorder(), Recorder(), Recorder()
    fit(straight, data(), 9, accumulate, None)  # 9 steps x 4 x accumulate of 37 rows: the stop lies inside a pass
    fit(before, data(), 4, accumulate, None).save_checkpoint(tmp_path / "at4.ckpt")
    fit(after, data(), 9, accumulate, tmp_path / "at4.ckpt")
    assert len(straight.seen) == 9 * accumulate
    assert len(before.seen + after.seen) == len(straight.seen)
    for want, got in zip(straight.seen, before.seen + after.seen, strict=True):
        assert want["image"].dtype == torch.float32
        assert all(torch.equal(want[key], got[key]) for key in ("image", "target", "index", "position"))


def test_views_on_the_device_equal_those_in_the_worker(tmp_path: Path) -> None:
    worker, device = Recorder(), Recorder()
    fit(worker, module(), 3, 1, None)
    fit(device, module(augment_on_device=True), 3, 1, None)
    for a, b in zip(worker.seen, device.seen, strict=True):
        assert torch.equal(a["image"], b["image"]) and torch.equal(a["index"], b["index"])


class AsksTooEarly(Recorder):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        self.trainer.fit_loop.setup_data()  # as estimated_stepping_batches does, before the checkpoint is read
        return super().configure_optimizers()


def test_data_that_lost_step_stops_the_run(tmp_path: Path) -> None:
    fit(AsksTooEarly(), module(), 2, 1, None).save_checkpoint(tmp_path / "at2.ckpt")
    with pytest.raises(RuntimeError, match="belongs to step 0, but this is step 2"):
        fit(AsksTooEarly(), module(), 4, 1, tmp_path / "at2.ckpt")


def test_evaluation_is_finite_ordered_and_shared_by_the_ranks() -> None:
    data = module()
    for _ in range(2):
        batches = list(data.eval_loader("test"))
        assert [len(x["index"]) for x in batches] == [4, 4, 2]
        assert torch.cat([x["index"] for x in batches]).tolist() == list(range(10))
    assert torch.equal(batches[0]["image"], Resize(8)(Noise(10).images[:4], torch.arange(4), 0)["image"])
    assert torch.cat([x["index"] for x in data.eval_loader("train", limit=4)]).tolist() == [0, 9, 18, 27]
    shares = [eval_rows(10, None, rank, 4) for rank in range(4)]
    assert {len(x) for x in shares} == {3} and set(torch.cat(shares).tolist()) == set(range(10))
    assert set(torch.cat([eval_rows(2, None, rank, 4) for rank in range(4)]).tolist()) == {0, 1}


def test_loading_leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    next(iter(module().train_dataloader()))
    list(module().eval_loader("test"))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_mistake_in_a_worker_arrives_as_one_line(workers: int) -> None:
    with pytest.raises(UserError) as error:
        next(iter(Loader(TrainBatches(Broken(9), Crop(8), 4, 0, 0, 1), lambda: range(3), workers)))
    assert str(error.value) == "no image is readable"


def test_properties_and_mistakes() -> None:
    data = module()
    assert (data.num_train, data.classes, data.image_shape) == (37, ["even", "odd"], (3, 8, 8))
    with pytest.raises(UserError, match="batch_size"):
        module(batch_size=0)
    with pytest.raises(UserError, match="limit"):
        data.eval_loader("test", limit=0)
