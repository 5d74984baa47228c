"""Runs with `tuning=...`: lean checkpoints, going on to the bit, evaluation, export, and two processes."""

import pytest
import torch
import torch.nn.functional as F
from ranks import on_ranks, part
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel
from training import rows, run, same_end

from ssl_lab.backbones.vit import ViT
from ssl_lab.cli.main import main
from ssl_lab.methods.supervised import Supervised
from ssl_lab.nn.lora import LoRA, fuse_
from ssl_lab.train import checkpoint
from ssl_lab.weights import io

WORDS = [
    "method=supervised", "backbone=vit", "data=shapes", "method.encoder.dim=32", "method.encoder.depth=2",
    "method.encoder.num_heads=2", "method.encoder.patch_size=8", "method.encoder.image_size=32", "data.image_size=32",
    "data.train.length=40", "data.test.length=16", "data.batch_size=8", "duration=6steps", "save_steps=2",
    "trainer.log_every_n_steps=1", "trainer.accelerator=cpu", "trainer.enable_progress_bar=false", "eval=[accuracy]",
    "tuning=lora", "tuning.rank=2", "tuning.dropout=0.1", "ema=0.9",
]  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    io.save(ViT(32, 2, 2, image_size=32, patch_size=8), path)
    return path


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    assert run([*WORDS, f"method.encoder.weights={base}", f"out={out}"], log=out.parent / "log") == 0
    return out


def test_a_checkpoint_holds_what_learned_and_knows_its_base(whole, base):
    content = checkpoint.read(checkpoint.find(whole))
    for state in ("state_dict", "current_model_state"):
        names = set(content[state])
        assert names == {
            "head.weight", "head.bias",
            *(f"encoder.blocks.{i}.attn.fn.qkv.lora_{x}" for i in range(2) for x in "ab"),
        }  # fmt: skip
    assert content["base"]["weights"] == [str(base)] and len(content["base"]["sha256"]) == 64
    size = checkpoint.find(whole).stat().st_size
    assert size < base.stat().st_size / 2
    assert "tuning     trains 0.000776 M of" in (whole.parent / "log").read_text()


def test_last_safetensors_has_the_updates_merged(whole, base):
    merged, before = load_file(whole / "last.safetensors"), load_file(base)
    assert merged.keys() == before.keys()
    changed = {name for name, value in merged.items() if not torch.equal(value, before[name])}
    assert changed == {f"blocks.{i}.attn.fn.qkv.weight" for i in range(2)}
    assert isinstance(io.build(whole), ViT)


def test_it_goes_on_to_the_bit(whole, base, tmp_path):
    words = [*WORDS, f"method.encoder.weights={base}", f"out={tmp_path / 'run'}"]
    assert run(words, ("backward", 4)) == -9
    assert run(words) == 0
    same_end(whole, tmp_path / "run")
    assert rows(whole)


def test_it_is_evaluated_and_exported_as_it_was_trained(whole, tmp_path, capsys):
    assert (
        main(["evaluate", f"ckpt={whole}", "eval=[accuracy]", "pictures=false", f"out={tmp_path}", "device=cpu"]) == 0
    )
    assert main(["export", f"ckpt={whole}", "to=timm", f"out={tmp_path / 'timm'}"]) == 0
    assert "opened again with timm" in capsys.readouterr().out


def test_other_starting_weights_are_refused(whole, base, tmp_path, capsys):
    kept = base.read_bytes()
    try:
        torch.manual_seed(6)
        io.save(ViT(32, 2, 2, image_size=32, patch_size=8), base)
        assert main(["export", f"ckpt={whole}", "to=timm", f"out={tmp_path / 'timm'}"]) == 2
        assert "tuned from other starting weights" in capsys.readouterr().err
    finally:
        base.write_bytes(kept)
    lean = whole / "checkpoints" / checkpoint.LAST
    assert main([*WORDS, f"method.encoder.weights={lean}", f"out={tmp_path / 'run'}"]) == 2
    assert "holds what was tuned alone" in capsys.readouterr().err


def test_what_cannot_be_merged_is_not_exported(base, tmp_path, capsys):
    words = [w for w in WORDS if not w.startswith(("tuning", "ema", "eval", "duration"))]
    words += ["tuning=adapter", "tuning.hidden=4", "eval=[]", "duration=1steps", f"method.encoder.weights={base}"]
    assert main([*words, f"out={tmp_path / 'run'}"]) == 0
    assert main(["export", f"ckpt={tmp_path / 'run'}", "to=timm"]) == 2
    assert "adapters beside the layers cannot be merged" in capsys.readouterr().err
    assert main([*words, "tuning.after=[cross]", f"out={tmp_path / 'other'}"]) == 2
    assert "nothing fits 'cross'; there are attn, mlp" in capsys.readouterr().err


def tuned() -> Supervised:
    torch.manual_seed(0)
    method = Supervised(ViT(32, 2, 4, image_size=32, patch_size=8), 4).double()
    LoRA(rank=2, targets=["q", "v", "fc*"])(method)
    for p in method.parameters():
        p.data.add_(0.1 * torch.randn(p.shape, dtype=torch.float64))
    return method


def learned(rows: slice, wrap=lambda module: module) -> dict[str, torch.Tensor]:
    method = tuned()
    g = torch.Generator().manual_seed(1)
    images, target = torch.randn(8, 3, 32, 32, generator=g, dtype=torch.float64), torch.arange(8) % 4
    network = wrap(method.encoder)
    method.head.requires_grad_(False)
    F.cross_entropy(method.head(network(images[rows]).pooled("cls")), target[rows]).backward()
    return {n: p.grad for n, p in method.named_parameters() if p.grad is not None}


def of_rank(rank: int) -> dict[str, torch.Tensor]:
    return learned(part(rank, 8), DistributedDataParallel)


def test_two_processes_learn_what_one_does(tmp_path):
    alone = learned(slice(0, 8))
    assert alone and all("lora" in name for name in alone)
    for found in on_ranks(of_rank, tmp_path):
        assert found.keys() == alone.keys()
        for name, grad in found.items():
            torch.testing.assert_close(grad, alone[name], rtol=0, atol=1e-12)


def test_fusing_a_method_leaves_plain_layers():
    method = fuse_(tuned().eval())
    assert not [n for n in method.state_dict() if "lora" in n]
