"""A loss, gradient or input that is not finite never reaches weights, averages, teachers or queues."""

import pytest
import torch
from test_dist import TWO, finished
from training import TINY, _tensors, run

from ssl_lab.train.checkpoint import find, read, stored

POISON = """
from ssl_lab import dist
from ssl_lab.methods.{file} import {name}
class Poison({name}):
    def step(self, batch, progress):
        bad = self.global_step in {steps} and dist.rank() in {ranks}
        if bad and {inputs}:
            for key in ("image", "views"):
                if key in batch:
                    batch[key] = [v * float("nan") for v in batch[key]] if key == "views" else batch[key] * float("nan")
        out = super().step(batch, progress)
        if bad and not {inputs}:
            out.loss = {poison}
        return out
"""
LOSS = "out.loss * float('nan')"
GRADIENT = "out.loss + next(self.parameters()).sum().mul(0).sqrt()"  # its derivative at zero, under a finite loss
EVERY_STEP = ["save_steps=1", "keep_checkpoints=12", "ema=0.9"]


@pytest.fixture
def words(tmp_path, monkeypatch):
    """The command line of a run whose method goes wrong."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(*more, steps, method="mae", name="MAE", poison=LOSS, inputs=False, ranks=(0,)):
        code = POISON.format(file=method, name=name, steps=steps, poison=poison, inputs=inputs, ranks=ranks)
        (tmp_path / "poison.py").write_text(code)
        tiny = TINY if method == "mae" else [w for w in TINY if not w.startswith(("method=", "method.decoder"))]
        return [*tiny, f"method={method}", "method._target_=poison.Poison", *more, f"out={tmp_path / 'run'}"]

    return make


def state_at(out, step):
    """All tensors of a checkpoint: weights, average, optimizer."""
    saved = {int(path.stem.partition("=")[2]): path for path in stored(out / "checkpoints")}[step]
    whole = read(saved)
    return _tensors({key: whole.get(key) for key in ("state_dict", "current_model_state", "optimizer_states")})


def same(a, b):
    assert a.keys() == b.keys()
    differing = [name for name in a if not torch.equal(a[name], b[name])]
    assert not differing, differing[:5]


@pytest.mark.faults("C10", "NaN with skip_nonfinite=0: the run ends with the weights of before")
@pytest.mark.parametrize("poison", [LOSS, GRADIENT], ids=["loss", "gradient"])
def test_it_stops_before_the_optimizer(words, tmp_path, poison):
    assert run(words("skip_nonfinite=0", steps=[7], poison=poison), log=tmp_path / "log") == 2
    text = (tmp_path / "log").read_text()
    assert "at step 8: stopped before" in text and "data rows [" in text and "step=6.ckpt" in text
    assert find(tmp_path / "run").name == "step=6.ckpt"
    assert all(t.isfinite().all() for t in read(find(tmp_path / "run"))["state_dict"].values())


KEEPS = {  # methods with teachers, queues and centres, and what makes them small
    "mae": ("MAE", []),
    "moco": ("MoCo", ["method.head=[32,16]", "method.queue_size=32"]),
    "dino": ("DINO", ["method.head.prototypes=32", "method.head.hidden=32", "data.views.local.count=2"]),
    "dinov2": ("DINOv2", ["method.head.prototypes=32", "method.head.hidden=32", "data.views.local.count=2"]),
    "ijepa": ("IJEPA", ["method.predictor.dim=32", "method.predictor.depth=1", "method.predictor.num_heads=2"]),
}


@pytest.mark.faults("C10", "NaN in a loss or an input: no weight, average, teacher, queue changes")
@pytest.mark.parametrize("inputs", [False, True], ids=["loss", "input"])
@pytest.mark.parametrize("method", KEEPS)
def test_a_bad_step_changes_nothing(words, tmp_path, method, inputs):
    """A step after it does, so the run goes on; what was kept for the bad step has no part in that."""
    name, sizes = KEEPS[method]
    line = words(*EVERY_STEP, *sizes, "duration=5steps", steps=[3], method=method, name=name, inputs=inputs)
    assert run(line, log=tmp_path / "log") == 0, (tmp_path / "log").read_text()
    text = (tmp_path / "log").read_text()
    assert "at step 4: step left out, 1 of at most 3 in a row; data rows [" in text
    before, after, later = (state_at(tmp_path / "run", step) for step in (3, 4, 5))
    same(before, after)
    assert any(not torch.equal(after[key], later[key]) for key in after)
    assert all(value.isfinite().all() for value in later.values() if value.is_floating_point())


@pytest.mark.faults("C10", "NaN five times in a row: the run ends with the weights of before")
def test_five_in_a_row_end_the_run_with_the_weights_of_before(words, tmp_path):
    assert run(words(*EVERY_STEP, steps=[3, 4, 5, 6, 7]), log=tmp_path / "log") == 2
    text = (tmp_path / "log").read_text()
    assert text.count("step left out") == 3 and "at step 7, 4 in a row: stopped before" in text
    same(state_at(tmp_path / "run", 3), state_at(tmp_path / "run", 6))


def test_three_in_a_row_are_counted_anew_after_a_good_one(words, tmp_path):
    assert run(words("duration=9steps", steps=[1, 2, 3, 5, 6, 7]), log=tmp_path / "log") == 0
    assert (tmp_path / "log").read_text().count("3 of at most 3 in a row") == 2


@pytest.mark.faults("C10", "NaN in a batch norm: the run ends, which one is named")
def test_a_poisoned_batch_norm_cannot_be_left_out(words, tmp_path):
    resnet = ["backbone=timm", "method.encoder.name=resnet18", "method.mixup=null"]
    line = [w for w in words(steps=[3], method="supervised", name="Supervised", inputs=True) if "encoder." not in w]
    assert run([*line, *resnet], log=tmp_path / "log") == 2
    text = (tmp_path / "log").read_text()
    assert "at step 4, and encoder." in text and "running_mean with it: stopped" in text


@pytest.mark.faults("C10", "NaN on one rank: both leave it out, or both end")
@pytest.mark.slow
@pytest.mark.parametrize("skip", [0, 3])
def test_one_rank_speaks_for_both(words, tmp_path, skip, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    line = words(*EVERY_STEP, *TWO, f"skip_nonfinite={skip}", "duration=7steps", steps=[5], ranks=(1,))
    text = finished(line, code=0 if skip else 2)
    assert "rank 1" in text and "at step 6" in text
    if skip:
        same(state_at(tmp_path / "run", 5), state_at(tmp_path / "run", 6))
    assert all(t.isfinite().all() for t in read(find(tmp_path / "run"))["state_dict"].values())
