"""A plan: bytes and FLOPs against what is counted by hand, arithmetic of fitting and of many devices, mistakes."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from omegaconf import DictConfig
from torch import nn

from ssl_lab.bench import plan
from ssl_lab.bench.devices import ACCELERATORS, accelerator
from ssl_lab.bench.flops import count
from ssl_lab.bench.probe import Probe, saved_bytes, state_bytes, tensor_bytes
from ssl_lab.bench.step import MethodStep
from ssl_lab.cli.catalog import conf_folder
from ssl_lab.cli.compose import compose
from ssl_lab.cli.main import main
from ssl_lab.cli.plan import _advice
from ssl_lab.cli.plan_work import work_elsewhere, work_here
from ssl_lab.cli.rehearsal import batch_of, batches_of, rehearsal
from ssl_lab.errors import UserError

WORK = plan.Work(
    params=1000,
    trained=600,
    gradient_bytes=2400,
    held=4000,
    state=4800,
    process=50,
    small=Probe(2, flops=200, saved=1300, inputs=20, seconds=0.3),
    large=Probe(4, flops=400, saved=2300, inputs=40, seconds=0.5),
)


def test_what_grows_with_the_batch_is_continued_on_a_line() -> None:
    assert [WORK.flops(16), WORK.saved(16), WORK.inputs(16)] == [1600, 8300, 160]
    assert WORK.seconds(16) == pytest.approx(1.7)


def test_memory_by_part_whole_and_sharded() -> None:
    whole, split = plan.memory(WORK, 4), plan.memory(WORK, 4, shards=4)
    assert (whole.weights, whole.gradients, whole.optimizer, whole.activations) == (4000, 2400, 4800, 2300)
    assert whole.total == 4000 + 2400 + 4800 + 2300 + 2 * 40 + 50
    assert split.total == (4000 + 2400 + 4800) / 4 + 2300 + 2 * 40 + 50


@pytest.mark.parametrize("room", [11_000, 12_000, 50_000, 1e7])
def test_the_largest_batch_is_the_last_that_fits(room: float) -> None:
    fits = plan.largest_batch(WORK, room)
    assert plan.memory(WORK, fits + 1).total > room
    assert fits == 0 or plan.memory(WORK, fits).total <= room


def test_rings_send_what_they_must() -> None:
    h100 = ACCELERATORS["h100"]
    size = 600 * 4
    assert plan.traffic_seconds(WORK, 2, h100) == pytest.approx(size / h100.within)
    far = plan.traffic_seconds(WORK, 64, h100)
    assert far == pytest.approx(2 * 7 / 8 * size / h100.within + 2 * 7 / 8 * size / 8 / h100.between)
    shares = [plan.speed(WORK, 4, n, h100, 0.4, half=True).efficiency for n in (1, 8, 64, 1024)]
    assert shares[0] == 1 and shares == sorted(shares, reverse=True)


def test_saved_tensors_are_counted_once_and_parameters_never() -> None:
    """Of tanh(x W) autograd keeps x for W and the output of tanh; the loss, its mean, nothing but a shape."""
    layer, x = nn.Linear(8, 16, bias=False), torch.rand(32, 8)
    assert saved_bytes(lambda: layer(x).tanh().mean().backward(), layer) == (32 * 8 + 32 * 16) * 4
    assert saved_bytes(lambda: (layer(x) * layer(x).detach()).mean().backward(), layer) == (32 * 8 + 32 * 16) * 4


def test_state_and_batches_in_bytes() -> None:
    layer = nn.Linear(8, 16)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.rand(1, 8)).sum().backward()
    optimizer.step()
    assert state_bytes(optimizer) == 2 * (8 * 16 + 16) * 4 + 2 * 4
    assert tensor_bytes({"image": torch.zeros(2, 3), "views": [torch.zeros(4, dtype=torch.uint8)], "n": 1}) == 28


def test_an_unknown_accelerator_names_those_there_are() -> None:
    with pytest.raises(UserError, match=r"gpu=h1000 is not listed; there are t4, .*h100"):
        accelerator("h1000")


QUICK = ["plan", "experiment=quickstart", "data.batch_size=8", "method.encoder.depth=2", "data.rows=64"]


def test_a_listed_gpu(tmp_path, capsys) -> None:
    """Parameters and FLOPs are those of the network; hours follow from them."""
    out = tmp_path / "plan.json"
    faster = ["compile=true", "float8=tensorwise"]
    assert main([*QUICK, *faster, "gpu=H100", "devices=16", "duration=1000steps", f"out={out}"]) == 0
    made, said = json.loads(out.read_text()), capsys.readouterr().out
    assert made["steps"] == 1000 and made["samples"] == 1000 * 8 * 16
    assert made["step_seconds"] - made["exposed_seconds"] == pytest.approx(made["flops"] * 8 / (989e12 * 0.4))
    assert made["hours"] == pytest.approx(made["step_seconds"] * 1000 / 3600)
    assert made["cost"] == pytest.approx(made["hours"] * 16 * 2.8)
    split = sum(made["memory"][part] for part in ("weights", "gradients", "optimizer"))
    assert made["divided"] == pytest.approx(sum(made["memory"].values()) - split * 15 / 16)
    assert re.search("fsdp2 .* a device: .* divided over 16", said)
    assert "compile and float8 left out of these figures" in said
    assert "16 x H100" in said and "simulated" in said and f"{made['params'] / 1e6:.3g}M" in said


def test_this_machine_is_timed(tmp_path, capsys) -> None:
    out = tmp_path / "plan.json"
    assert main([*QUICK, "duration=2epochs", f"out={out}"]) == 0
    made = json.loads(out.read_text())
    assert (
        made["steps"] == 16
        and made["cost"] is None
        and made["divided"] is None
        and made["scaling"] == []
        and made["step_seconds"] > 0
    )
    assert "timed here" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["gpu=abacus"], "gpu=abacus is not listed"),
        (["devices=8"], "devices=8 of this machine cannot be foretold"),
        (["out=."], "out=. is a folder: give the name of a file"),
        (["out=/dev/null/plan.json"], "out=/dev/null: File exists"),
        (["utilisation=1.5"], "utilisation is above 0 and at most 1"),
    ],
)
def test_mistakes(words, said, capsys) -> None:
    assert main([*QUICK, *words]) == 2
    assert said in capsys.readouterr().err


def test_what_does_not_fit_comes_with_what_would(tmp_path, capsys) -> None:
    huge = ["data.batch_size=100000", "trainer.precision=32-true", "checkpoint_blocks=false"]
    assert main([*QUICK, "gpu=t4", *huge]) == 0
    said = capsys.readouterr().out
    assert "it does not fit" in said and "trainer.accumulate_grad_batches=" in said and "checkpoint_blocks=true" in said


def test_the_batch_that_is_advised_makes_the_same_step(monkeypatch) -> None:
    monkeypatch.setattr(plan, "largest_batch", lambda *_: 30)
    monkeypatch.setattr(plan, "memory", lambda *_, **__: plan.Memory(0, 0, 0, 9, 0, 0))
    cfg = DictConfig({"checkpoint_blocks": True, "trainer": {"precision": "bf16-mixed"}, "devices": 1})
    advice = _advice(cfg, None, 64, 1, plan.Memory(0, 0, 0, 9, 0, 0), 8)
    assert "data.batch_size=16 trainer.accumulate_grad_batches=4" in advice[1]


@pytest.mark.parametrize(("lengths", "chosen"), [([4] * 30, 4), ([9, 1, *range(2, 30)], 9)])
def test_the_batch_that_stands_for_all_is_of_middling_size(lengths, chosen):
    class Data:
        batch_size = 8

        def train_dataloader(self):
            return ({"audio": torch.zeros(self.batch_size, length)} for length in lengths)

        def on_after_batch_transfer(self, batch, _):
            return batch

    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device="cpu"))
    training = SimpleNamespace(data=Data(), trainer=trainer)
    assert batch_of(training, 2)["audio"].shape == (2, chosen)
    assert training.data.batch_size == 8


def test_whole_batches_of_many_lengths(tmp_path):
    """FLOPs and time on average over the lengths that come, memory of the longest."""
    words = ["experiment=conformer_tones", "data.batch_size=8", "data.num_workers=0"]
    training = rehearsal(compose("plan", words, [conf_folder()]), str(tmp_path / "run"), 1)
    method = training.method
    batches = batches_of(training)
    sizes = [tensor_bytes(batch) for batch in batches]
    assert len(sizes) > 2 and sizes == sorted(sizes) and sizes[0] < sizes[-1]
    work = work_here(training, "32-true")
    steps = [MethodStep(method, batch, device=torch.device("cpu"), precision="32-true") for batch in batches]
    counted = [count(step.forward_backward, method) for step in steps]
    assert work.flops(8) == pytest.approx(sum(counted) / len(counted), rel=1e-3)
    assert work.inputs(8) == sizes[-1] and work.large.batch_size == 8
    assert work.seconds(8) == work.large.seconds > 0


def test_weights_and_gradients_in_half_precision(tmp_path):
    """Their bytes are those of the dtype that a step gives the method."""
    words = ["experiment=quickstart", "data.batch_size=8", "method.encoder.depth=2", "data.rows=64"]
    training = rehearsal(compose("plan", words, [conf_folder()]), str(tmp_path / "run"), 1)
    work = work_elsewhere(training, "bf16-true")
    assert work.gradient_bytes == 2 * work.trained
    assert work.held == sum(tensor_bytes(t) for t in (*training.method.parameters(), *training.method.buffers()))
    assert plan.memory(work, 8).gradients == 2 * work.trained
