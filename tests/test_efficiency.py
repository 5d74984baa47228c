"""How well a run uses its device, in its log: work, peak of a card, and no bit changed by counting."""

import csv
import json

import pytest
import torch
from test_dist import PLAIN, TWO, finished
from torch import nn
from training import TINY

from ssl_lab.backbones.vit import ViT
from ssl_lab.bench import efficiency, flops
from ssl_lab.bench.efficiency import Efficiency, peak, shadow_of
from ssl_lab.bench.flops import count
from ssl_lab.bench.step import MethodStep
from ssl_lab.cli.catalog import conf_folder
from ssl_lab.cli.compose import compose
from ssl_lab.cli.main import main
from ssl_lab.cli.rehearsal import batch_of, rehearsal
from ssl_lab.errors import UserError
from ssl_lab.methods.base import Method
from ssl_lab.nn.attention import Attention
from ssl_lab.types import Step

SHORT = ["duration=4steps", "eval=[]", "baselines=false", "trainer.enable_progress_bar=false"]


def rows(out):
    with open(out / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def work(row, samples):
    """Of a step, from what is told of its rate."""
    return float(row["time/tflops_per_s"]) * 1e12 * samples / float(row["time/samples_per_s"])


@pytest.mark.parametrize("more", [[], ["trainer.accumulate_grad_batches=2"], ["checkpoint_blocks=true"]])
def test_the_work_of_a_step_is_that_of_bench(tmp_path, more):
    """Whatever is computed again earns nothing."""
    assert main([*TINY, *SHORT, *more, f"out={tmp_path / 'run'}"]) == 0
    assert main(["bench", *TINY, "rounds=1", "memory=false", "loop=false", f"out={tmp_path / 'bench.json'}"]) == 0
    counted = json.loads((tmp_path / "bench.json").read_text())["flops"]
    micro = 2 if "accumulate" in str(more) else 1
    for row in rows(tmp_path / "run"):
        assert work(row, 8 * micro) == pytest.approx(counted * micro, rel=1e-6)
        assert 0 < float(row["time/mfu"]) < 1


@pytest.mark.parametrize("method", ["mae", "moco", "dinov2", "supervised"])
def test_counting_changes_no_bit(tmp_path, monkeypatch, method):
    """Queues, teachers, running means and the batch, which Mixup writes into, are the shadow's own."""
    words = [*TINY[1:], f"method={method}"] if method != "mae" else TINY
    words = [word for word in words if method == "mae" or "decoder" not in word]
    assert main([*words, *SHORT, f"out={tmp_path / 'counted'}"]) == 0
    monkeypatch.setattr(Efficiency, "on_train_batch_start", lambda *_: None)
    assert main([*words, *SHORT, f"out={tmp_path / 'not'}"]) == 0
    assert "time/tflops_per_s" in rows(tmp_path / "counted")[0] and "time/tflops_per_s" not in rows(tmp_path / "not")[0]
    kept = [[(row["train/loss"], row["opt/grad_norm"]) for row in rows(tmp_path / name)] for name in ("counted", "not")]
    assert kept[0] == kept[1] and len(kept[0]) == 4
    ends = [torch.load(tmp_path / name / "checkpoints/step=4.ckpt") for name in ("counted", "not")]
    assert all(torch.equal(value, ends[1]["state_dict"][name]) for name, value in ends[0]["state_dict"].items())


class Small(Method):
    def __init__(self):
        super().__init__()
        self.net, self.frozen = nn.BatchNorm1d(3), nn.Linear(3, 3).requires_grad_(False)

    def step(self, batch, progress):
        return Step(self.frozen(self.net(batch)).sum())


def test_a_shadow_shares_weights_and_nothing_else():
    method = Small()
    shadow = shadow_of(method)
    assert shadow.net.weight.data_ptr() == method.net.weight.data_ptr() and not shadow.frozen.weight.requires_grad
    shadow.step(torch.randn(4, 3), 0.5).loss.backward()
    assert shadow.net.weight.grad is not None and method.net.weight.grad is None
    assert shadow.net.num_batches_tracked == 1 and method.net.num_batches_tracked == 0


def test_attention_has_the_same_work_by_any_kernel(monkeypatch):
    """Also on accelerators, whose own choices the counter may not see."""
    vit, image = ViT(dim=32, depth=1, num_heads=4, patch_size=4, image_size=32), torch.randn(2, 3, 32, 32)
    attention = next(m for m in vit.modules() if isinstance(m, Attention))
    used = []

    def work(kernel):
        attention.kernel = kernel
        flops = count(lambda: (used.append(attention.kernel), vit(image).tokens.sum().backward()), vit)
        assert attention.kernel == kernel
        return flops

    assert torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward in flops._known()
    assert len({work(kernel) for kernel in ("eager", "sdpa", "auto", "flash", "flex")}) == 1
    assert used == ["eager", "sdpa", "auto", "sdpa", "sdpa"]
    monkeypatch.setattr(nn.Module, "parameters", lambda self: iter([torch.empty(1, device="meta")]))
    assert work("auto") == work("eager") and used[-2:] == ["sdpa", "eager"]


def test_work_that_is_drawn_is_counted_on_average():
    """Half of the calls have a product of 2 x 8 x 8 x 8 = 1024; the random state stays."""
    a = torch.ones(8, 8)
    before = torch.get_rng_state()
    assert count(lambda: a @ a, nn.Identity(), draws=16) == 1024
    assert 0 < count(lambda: a @ a if torch.rand(()) < 0.5 else None, nn.Identity(), draws=64) < 1024
    calls = []
    count(lambda: calls.append(a @ a), nn.Identity(), draws=64)
    assert len(calls) == 2 and torch.equal(torch.get_rng_state(), before)


def test_features_that_are_kept_are_no_work(tmp_path, caplog):
    """A run tells the work of its later passes, a bench and a plan that of the first."""
    words = ["experiment=llava_shapes_clip", "data.train.length=64", "data.batch_size=4", "data.num_workers=0"]
    training = rehearsal(compose("train", words, [conf_folder()]), str(tmp_path / "run"), 1)
    method, batch = training.method, batch_of(training)
    later = efficiency._work(method, batch, training.trainer.precision_plugin)
    assert not method._kept and all(p.grad is None for p in method.parameters())
    assert "kept in memory" not in caplog.text  # that they are kept is for the run to say
    step = MethodStep(method, batch, device=torch.device("cpu"), precision="bf16-mixed")
    first = count(step.forward_backward, method, draws=4)
    vision = count(lambda: method.model.patches(batch["images"]), method)
    assert first == later + vision


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("Tesla T4", "t4"),
        ("NVIDIA A10", None),
    ],
)
def test_a_listed_card_is_known_by_its_name(monkeypatch, name, found):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(efficiency, "matmul_peak", lambda *_, **__: 1.0)
    card = efficiency.ACCELERATORS.get(found)
    for dtype, peaked in ((torch.bfloat16, card and card.half), (torch.float32, card and card.single)):
        assert peak.__wrapped__(torch.device("cuda"), dtype) == (peaked or 1.0)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("full"), TypeError("cannot pickle a socket\nand more"), UserError("a bad batch")]
)
def test_a_count_that_fails_is_no_end_of_a_run(tmp_path, monkeypatch, caplog, error):
    """What the user did wrong is told by the step itself, and once."""

    def fails(*_):
        raise error

    monkeypatch.setattr(efficiency, "count", fails)
    assert main([*TINY, *SHORT, f"out={tmp_path}"]) == 0
    assert "time/mfu" not in rows(tmp_path)[0]
    told = [r.getMessage() for r in caplog.records if "counted" in r.getMessage()]
    assert len(told) == (not isinstance(error, UserError))
    assert all(str(error).splitlines()[0] in line and "\n" not in line for line in told)


@pytest.mark.parametrize("kernel", ["auto", "sdpa", "eager"])
def test_a_checkpointed_network_is_counted_in_the_memory_of_its_steps(kernel):
    """As much work as without, and no more kept than by a step: its blocks stay checkpointed."""
    vit = ViT(dim=32, depth=6, num_heads=4, patch_size=4, image_size=64)
    image = torch.randn(2, 3, 64, 64)
    peaks, kept = {}, []

    def call():
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            loss = vit(image).tokens.sum()
        peaks[vit.blocks[0].checkpointing] = sum(kept)
        loss.backward()

    for module in vit.modules():
        if isinstance(module, Attention):
            module.kernel = kernel
    plain = count(call, vit)
    for block in vit.blocks:
        block.checkpointing = True
    assert count(call, vit) == plain == count(call, vit)
    assert peaks[True] < peaks[False] / 4
    assert not any(r._forward_hooks or r._forward_pre_hooks for block in vit.blocks for r in block.values())


def test_two_ranks_count_by_themselves(tmp_path):
    """Each its own part; together they are as fast as the log says, and twice one rank's work is the step's."""
    finished([*PLAIN, *TWO, *SHORT, f"out={tmp_path / 'two'}"])
    finished([*PLAIN, *SHORT, f"out={tmp_path / 'one'}"])
    two, one = (rows(tmp_path / name)[-1] for name in ("two", "one"))
    assert 2 * work(two, 8) == pytest.approx(work(one, 8), rel=1e-3)


def test_divided_weights_are_not_counted(tmp_path):
    finished([*PLAIN, *TWO, *SHORT, "strategy=fsdp2", f"out={tmp_path}"])
    assert "time/mfu" not in rows(tmp_path)[-1] and "time/samples_per_s" in rows(tmp_path)[-1]
