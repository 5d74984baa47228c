"""Runs in float8: learning, resuming to the bit, what others load, mistakes, and weights divided over two ranks."""

import builtins
import math
import signal
from dataclasses import replace

import pytest
import torch
from ranks import WORLD, on_ranks
from test_float8 import TENSORWISE, converted, tiny
from torch.distributed.device_mesh import init_device_mesh
from training import TINY, rows, same_end

from ssl_lab.cli.catalog import conf_folder
from ssl_lab.cli.compose import compose
from ssl_lab.cli.train import Training
from ssl_lab.errors import UserError
from ssl_lab.evals.finetune import Classifier
from ssl_lab.nn.float8 import Float8
from ssl_lab.train import checkpoint
from ssl_lab.train.parallel import Parallel
from ssl_lab.train.sharded import restore_, shard_
from ssl_lab.train.signals import Interrupted, Signals

pytest.importorskip("torchao")


class Run:
    """A run of the command line that goes through all of it but for the device: products are emulated."""

    def __init__(self, out, *words, float8=TENSORWISE):
        out.mkdir(exist_ok=True)
        cfg = compose("train", [*TINY, "trainer.enable_progress_bar=false", f"out={out}", *words], [conf_folder()])
        self.training = Training(cfg, Signals(), first=True)
        self.training.method.parallel = replace(self.training.method.parallel, float8=float8)
        self.method = self.training.method

    def __call__(self):
        with torch.random.fork_rng():
            self.training.fit()
            self.training.finish()
        return self


def test_a_run_learns_resumes_to_the_bit_and_leaves_ordinary_weights(tmp_path, capsys):
    words = ["ema=0.9", "duration=40steps", "save_steps=10", "optim.lr=1e-2", "optim.scale_lr=none", "optim.warmup=0.1"]
    words += ["eval=[collapse]"]
    whole = Run(tmp_path / "whole", *words)()
    said = capsys.readouterr().out
    assert "tensorwise, 12 of 12 linear maps in blocks" in " ".join(said.split())
    assert "float8 without compile=true is slower" in said
    losses = [float(row["train/loss"]) for row in rows(tmp_path / "whole") if row["train/loss"]]
    assert all(map(math.isfinite, losses)) and sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert not converted(whole.method)

    half = Run(tmp_path / "half", *words)

    def told(progress):
        if half.method.global_step == 20:
            half.training.signals.received = signal.SIGTERM

    half.method.after_step = told
    with pytest.raises(Interrupted):
        half()
    assert len(converted(half.method)) == 12
    assert checkpoint.find(tmp_path / "half").name == "step=21.ckpt"
    Run(tmp_path / "half", *words)()
    same_end(tmp_path / "half", tmp_path / "whole")

    plain = Run(tmp_path / "plain", *words, float8=None)()
    state = checkpoint.read(checkpoint.find(tmp_path / "whole"))
    exact = checkpoint.read(checkpoint.find(tmp_path / "plain"))
    for kind in ("state_dict", "current_model_state"):
        assert list(state[kind]) == list(exact[kind])
    here, there = state["current_model_state"], exact["current_model_state"]
    assert any(not torch.equal(here[name], value) for name, value in there.items()), "it was not computed in float8"
    plain.method.load_state_dict(state["state_dict"])
    Run(tmp_path / "longer", *words, f"ckpt={tmp_path / 'whole'}", "duration=42steps", float8=None)()
    assert checkpoint.facts(checkpoint.find(tmp_path / "longer"))["step"] == 42


def test_fine_tuning_copies_train_as_any_program_would(tmp_path, monkeypatch):
    seen = []
    begin = Classifier.__init__
    monkeypatch.setattr(Classifier, "__init__", lambda self, e, *a: (seen.append(converted(e)), begin(self, e, *a))[1])
    words = ["duration=2steps", "eval=[finetune]", "eval.finetune.steps=2", "eval.finetune.every=1"]
    Run(tmp_path, *words)()
    assert len(seen) > 1 and not any(seen)


# ---- mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["float8=tensorwise"], "float8=tensorwise needs an NVIDIA GPU of compute capability 8.9 or more"),
        (["float8=rowwise"], "this run is on cpu: leave float8 out"),
        (["float8=fast"], "float8=fast: choose tensorwise, rowwise or null"),
        (["float8=true"], "float8=True: choose tensorwise, rowwise or null"),
    ],
)
def test_mistakes_are_told_before_training(tmp_path, words, message):
    with pytest.raises(UserError, match=message.replace(".", r"\.")) as told:
        Run(tmp_path / "out", *words)
    assert "\n" not in str(told.value)


def test_what_a_gpu_must_have(monkeypatch):
    vit, device = tiny(), torch.device("cuda", 0)
    capability = [(8, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda at: capability[0])
    with pytest.raises(UserError, match=r"8\.9 or more.*this one has 8\.0"):
        Float8().require(vit, device, "bf16-mixed")
    capability[0] = (8, 9)
    for precision in ("bf16-mixed", "bf16-true"):
        Float8().require(vit, device, precision)
    for precision in ("32-true", "16-mixed"):
        with pytest.raises(UserError, match=f"not trainer.precision={precision}: choose bf16-mixed"):
            Float8().require(vit, device, precision)
    with pytest.raises(UserError, match="float8=tensorwise: no block has a linear map"):
        Float8().require(tiny(40), device, "bf16-mixed")


def test_without_torchao_the_extra_is_named(monkeypatch):
    load = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("torchao"):
            raise ImportError(name)
        return load(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    for asked in (lambda: Float8().require(tiny(), torch.device("cuda"), "bf16-mixed"), lambda: Float8()(tiny())):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda at: (9, 0))
        with pytest.raises(UserError, match=r"float8=tensorwise needs torchao: pip install 'ssl-lab\[fp8\]'"):
            asked()


def test_another_setting_is_another_run(tmp_path):
    Run(tmp_path, "duration=2steps", float8=None)()
    saved = tmp_path / "config.yaml"
    saved.write_text(saved.read_text().replace("float8: null", "float8: tensorwise"))
    with pytest.raises(UserError, match="float8: tensorwise there, None here"):
        Run(tmp_path, "duration=2steps")


# ---- ranks


def sharded(rank):
    """Gradients of a divided network, and its names after it came together again."""
    vit = tiny()
    keys = list(vit.state_dict())
    Parallel(checkpoint_blocks=True, float8=TENSORWISE)(vit)
    vit.training_step = lambda images, _: loss(vit, images)
    shard_(vit, init_device_mesh("cpu", (WORLD,)))
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    value = vit.training_step(images, 0)
    value.backward()
    grads = {n: p.grad.full_tensor() for n, p in vit.named_parameters() if p.grad is not None}
    restore_(vit)
    return {"loss": value.detach(), "grads": grads, "keys": list(vit.state_dict()) == keys, "maps": len(converted(vit))}


def loss(vit, images):
    tokens = vit(images).tokens
    return (tokens * torch.randn(tokens.shape, generator=torch.Generator().manual_seed(1))).sum()


def test_divided_weights_compute_the_same(tmp_path):
    """Both ranks see the same images, so the mean of their gradients is that of one process."""
    found = on_ranks(sharded, tmp_path)
    vit = tiny()
    TENSORWISE(vit)
    value = loss(vit, torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    value.backward()
    for rank in found:
        assert rank["keys"] and rank["maps"] == 8
        torch.testing.assert_close(rank["loss"], value.detach())
        for name, p in vit.named_parameters():
            if p.grad is not None:
                torch.testing.assert_close(rank["grads"][name], p.grad, rtol=1e-4, atol=1e-4)
