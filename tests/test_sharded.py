"""FSDP2 on two gloo processes: what one process with the whole batch computes, and an ordinary method afterwards."""

import pytest
import torch
from ranks import WORLD, on_ranks, part
from test_two_ranks import SIZE, fixed_loss, made
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from training import TINY, rows, run

from ssl_lab.errors import UserError
from ssl_lab.nn.block import Block, Context
from ssl_lab.train import checkpoint
from ssl_lab.train.optim import Optim
from ssl_lab.train.sharded import gathered, like, restore_, shard_, whole

METHODS = ("mae", "dino", "causal_lm")
STEPS = 2
OPTIM = Optim(lr=1e-2, eps=1e-6, warmup=0.0)


def taught(method, rows_):
    """Losses and gradient norms of some steps of AdamW, with a teacher's and clipping where the method has them."""
    method.training_step = lambda rows, _: fixed_loss(method, rows)
    found = {}

    def go(shard=lambda method: None):
        shard(method)
        optimizer = OPTIM.build(method.param_groups(), 256)
        for step in range(STEPS):
            loss = method.training_step(rows_, 0)
            loss.backward()
            method.after_backward(0.5)
            grads = [p.grad for p in method.parameters() if p.grad is not None]
            found[f"{step}.norm"] = whole(torch.nn.utils.get_total_norm(grads))
            found[f"{step}.loss"] = loss.detach()
            OPTIM.update(optimizer, 0.5)
            optimizer.step()
            optimizer.zero_grad()
            method.after_step(0.5)
        return found

    return go


@torch.no_grad()
def looked_at(method):
    """What one rank gets from parameters in and outside of blocks, without the others."""
    block = next(m for m in method.modules() if isinstance(m, Block))
    x = torch.linspace(-1, 1, 4 * block["attn"].dim, dtype=torch.float64).view(1, 4, -1)
    return block(x, Context()).sum() + sum(p.square().sum() for p in method.parameters())


def sharded(name, rank):
    """The same on a part of the batch with a part of the weights, then as an ordinary method again."""
    method, mesh = made(name), init_device_mesh("cpu", (WORLD,))
    found = taught(method, part(rank, SIZE))(lambda method: shard_(method, mesh))
    blocks = [m for m in method.modules() if isinstance(m, Block)]
    assert blocks and all(isinstance(block, FSDPModule) for block in blocks)
    assert all(isinstance(p, DTensor) for p in method.parameters())
    held = sum(p.to_local().numel() for p in method.parameters())
    found["share"] = torch.tensor(held / sum(p.numel() for p in method.parameters()))
    names = [*method.state_dict()]
    with gathered(method):  # one rank alone: a collective would never come back
        if rank == 0:
            found["alone"] = looked_at(method)
    assert all(isinstance(p, DTensor) for p in method.parameters())
    restore_(method)
    assert type(method).__name__ != f"FSDP{type(method).__name__}" and not isinstance(blocks[0], FSDPModule)
    assert [*method.state_dict()] == names and not any(isinstance(p, DTensor) for p in method.parameters())
    found["after"] = looked_at(method)
    return found | {f"state.{key}": value.detach().clone() for key, value in method.state_dict().items()}


def work(rank):
    found = {name: sharded(name, rank) for name in METHODS}
    mesh = init_device_mesh("cpu", (WORLD,))
    uneven = nn.Module()
    uneven.weight = nn.Parameter(torch.arange(15.0).view(5, 3))
    uneven.training_step = lambda: None
    shard_(uneven, mesh)
    divided = like(torch.arange(15.0).view(5, 3) * 2, uneven.weight)
    scalar = nn.Module()
    scalar.scale = nn.Parameter(torch.zeros(()))
    with pytest.raises(UserError, match=r"cannot divide scale, a single number"):
        shard_(scalar, mesh)
    return found | {"uneven": {"like": whole(divided), "part": divided.to_local().shape[0]}}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of the two ranks found, by method."""
    return on_ranks(work, tmp_path_factory.mktemp("sharded"))


@pytest.mark.parametrize("name", METHODS)
def test_two_ranks_with_half_the_weights_compute_what_one_does(ranks, name):
    method = made(name)
    one = taught(method, slice(0, SIZE))()
    one |= {f"state.{key}": value for key, value in method.state_dict().items()}
    first, second = ranks[0][name], ranks[1][name]
    for key, value in one.items():
        left, right = first[key], second[key]
        if key.endswith(".loss"):
            left = right = (left + right) / 2
        torch.testing.assert_close(left, value, rtol=1e-7, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}")
        torch.testing.assert_close(left, right, rtol=0, atol=0)
    assert 0.45 < first["share"] < 0.65
    torch.testing.assert_close(first["alone"], first["after"], rtol=1e-12, atol=1e-12)


def test_parts_of_uneven_size_come_together_again(ranks):
    assert ranks[0]["uneven"]["part"] == 3 and ranks[1]["uneven"]["part"] == 2
    assert torch.equal(ranks[0]["uneven"]["like"], torch.arange(15.0).view(5, 3) * 2)


TWO = ["trainer.devices=2", "data.batch_size=4"]


def state(out):
    return checkpoint.read(checkpoint.find(out))


def test_runs_go_on_under_another_strategy_and_number_of_ranks(tmp_path):
    """Two steps sharded, two by one process, two sharded again: the end of one that was left alone, up to rounding."""
    words = [*TINY, "method=causal_lm", "data=captions", "data.rows=40", "optim.eps=1e-4", "duration=6steps"]
    words = [w for w in words if not w.startswith(("method=mae", "backbone=", "data=shapes", "data.t", "method.enc"))]
    words = [w for w in words if not w.startswith("method.decoder")]
    words += ["method.decoder.dim=16", "method.decoder.depth=2", "method.decoder.num_heads=2"]
    whole_, out = tmp_path / "whole", tmp_path / "out"
    assert run([*words, f"out={whole_}", "eval=[perplexity]"]) == 0
    fault = ("backward", 3)
    log = tmp_path / "log"
    assert run([*words, *TWO, "strategy=fsdp2", f"out={out}"], fault, log=log) != 0
    assert checkpoint.find(out).name == "step=2.ckpt", log.read_text()
    assert run([*words, f"out={out}"], fault) == -9
    assert checkpoint.find(out).name == "step=4.ckpt"
    assert run([*words, *TWO, "strategy=fsdp2", "eval=[perplexity]", f"out={out}"], log=log) == 0, log.read_text()
    one, other = state(whole_), state(out)
    assert one["global_step"] == other["global_step"] == 6
    for name, value in one["state_dict"].items():
        torch.testing.assert_close(other["state_dict"][name], value, rtol=1e-4, atol=1e-5)
    losses = [[float(row["train/loss"]) for row in rows(folder)] for folder in (whole_, out)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert (out / "last.safetensors").exists() and (out / "metrics.json").exists()
