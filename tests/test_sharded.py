"""FSDP2 on two gloo processes: what one process with the whole batch computes, and an ordinary method afterwards."""

import copy

import pytest
import torch
from ranks import WORLD, ended, logs, on_ranks, part, start_ranks
from test_two_ranks import METHODS, SIZE, fixed_loss, made
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from training import results, rows

from ssl_lab.dist import local
from ssl_lab.nn.block import Block, Context
from ssl_lab.train import checkpoint
from ssl_lab.train.optim import Optim
from ssl_lab.train.sharded import gathered, restore_, shard_
from ssl_lab.train.sharded_optim import adapt_, collected_state, like, load_state_, whole

STEPS = 2
CASES = [f"{name} adamw" for name in METHODS] + ["mae muon", "clip lars", "dino larc"]
FEW = ("mae muon", "dino adamw", "causal_lm adamw", "clip lars")  # in every run of the tests


def taught(method, rows_, optim, mesh=None):
    """Losses and gradient norms of some steps, with a teacher's and clipping where the method has them."""
    method.training_step = lambda rows, _: fixed_loss(method, rows)
    if mesh is not None:
        shard_(method, mesh)
    optimizer, found = optim.build(method.param_groups(), 256), {}
    if mesh is not None:
        adapt_(optimizer, mesh)
    for step in range(STEPS):
        loss = method.training_step(rows_, 0)
        loss.backward()
        method.after_backward(0.5)
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        found[f"{step}.norm"] = whole(torch.nn.utils.get_total_norm(grads))
        found[f"{step}.loss"] = loss.detach()
        optim.update(optimizer, 0.5)
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(0.5)
    return found


def optim(case):
    return Optim(name=case.split()[1], lr=1e-2, eps=1e-6, warmup=0.0)


@torch.no_grad()
def looked_at(method):
    """What one rank gets from parameters in and outside of blocks, without the others."""
    found = sum(p.square().sum() for p in method.parameters())
    if type(method).__name__.removeprefix("FSDP") in ("MAE", "DINO", "CausalLM"):  # a block that needs nothing else
        block = next(m for m in method.modules() if isinstance(m, Block))
        x = torch.linspace(-1, 1, 4 * block["attn"].dim, dtype=torch.float64).view(1, 4, -1)
        found = found + block(x, Context()).sum()
    return found


def sharded(case, rank):
    """The same on a part of the batch with a part of the weights, then as an ordinary method again."""
    method, mesh = made(case.split()[0]), init_device_mesh("cpu", (WORLD,))
    numbers = {name for name, p in method.named_parameters() if p.ndim == 0}
    found = taught(method, part(rank, SIZE), optim(case), mesh)
    blocks = [m for m in method.modules() if isinstance(m, Block)]
    assert blocks and all(isinstance(block, FSDPModule) for block in blocks)
    assert all(isinstance(p, DTensor) for name, p in method.named_parameters() if name not in numbers)
    held = sum(local(p).numel() for p in method.parameters())
    found["share"] = torch.tensor(held / sum(p.numel() for p in method.parameters()))
    names = [*method.state_dict()]
    with gathered(method):  # one rank alone: a collective would never come back
        if rank == 0:
            found["alone"] = looked_at(method)
    assert all(isinstance(p, DTensor) for name, p in method.named_parameters() if name not in numbers)
    restore_(method)
    assert type(method).__name__ != f"FSDP{type(method).__name__}" and not isinstance(blocks[0], FSDPModule)
    assert [*method.state_dict()] == names and not any(isinstance(p, DTensor) for p in method.parameters())
    found["after"] = looked_at(method)
    return found | {f"state.{key}": value.detach().clone() for key, value in method.state_dict().items()}


def few(rank):
    found = {case: sharded(case, rank) for case in FEW}
    mesh = init_device_mesh("cpu", (WORLD,))
    uneven = nn.Module()
    uneven.weight = nn.Parameter(torch.arange(15.0).view(5, 3))
    uneven.training_step = lambda: None
    shard_(uneven, mesh)
    divided = like(torch.arange(15.0).view(5, 3) * 2, uneven.weight)
    found["uneven"] = {"like": whole(divided), "part": divided.to_local().shape[0]}
    return found | {"states": [stored_and_loaded(name, mesh) for name in ("adamw", "sgd", "muon", "larc")]}


def stored_and_loaded(name, mesh):
    """Whether an optimizer of parameters with and without dimensions goes on from its stored state as it would have."""

    def begun(scale, weight):
        module = nn.Module()
        module.scale, module.weight = nn.Parameter(scale), nn.Parameter(weight)
        module.training_step = lambda: (module.weight.sin() * module.scale).square().sum()
        shard_(module, mesh)
        optimizer = Optim(name=name, warmup=0.0).build(module.named_parameters(), 256)
        adapt_(optimizer, mesh)
        return module, optimizer

    def step(module, optimizer):
        module.training_step().backward()
        optimizer.step()
        optimizer.zero_grad()
        return [module.scale.detach().clone(), whole(module.weight)]

    straight = begun(torch.tensor(0.5), torch.arange(15.0).view(5, 3))
    middle, kept = step(*straight), [copy.deepcopy(collected_state(straight[1]))]
    torch.distributed.broadcast_object_list(kept)  # as a file would
    again = begun(*(each.clone() for each in middle))
    load_state_(again[1], kept[0])
    ends = step(*straight), step(*again)
    return all(torch.equal(a, b) and not torch.equal(a, m) for a, b, m in zip(*ends, middle, strict=True))


def rest(rank):
    return {case: sharded(case, rank) for case in CASES if case not in FEW}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of the two ranks found, by case."""
    return on_ranks(few, tmp_path_factory.mktemp("sharded"))


@pytest.fixture(scope="module")
def more_ranks(tmp_path_factory):
    return on_ranks(rest, tmp_path_factory.mktemp("sharded"), minutes=20)


@pytest.mark.parametrize("case", [c if c in FEW else pytest.param(c, marks=pytest.mark.slow) for c in CASES])
def test_two_ranks_with_half_the_weights_compute_what_one_does(request, case):
    first, second = (found[case] for found in request.getfixturevalue("ranks" if case in FEW else "more_ranks"))
    method = made(case.split()[0])
    one = taught(method, slice(0, SIZE), optim(case))
    one |= {f"state.{key}": value for key, value in method.state_dict().items()}
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


def test_optimizers_go_on_from_their_stored_state(ranks):
    assert ranks[0]["states"] == ranks[1]["states"] == [True] * 4


DYING = """
import os, signal
from ssl_lab.methods.causal_lm import CausalLM
class Dying(CausalLM):
    def step(self, batch, progress):
        if os.environ.get("DIE") == str(self.global_step):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(batch, progress)
"""
WORDS = ["method=causal_lm", "method._target_=dying.Dying", "data.rows=40", "duration=6steps", "save_steps=2"]
WORDS += ["method.decoder.dim=16", "method.decoder.depth=2", "method.decoder.num_heads=2", "optim.eps=1e-4"]
WORDS += ["ema=0.9", "trainer.accelerator=cpu", "trainer.log_every_n_steps=1", "trainer.gradient_clip_val=1.0"]
ONE, TWO = ["data.batch_size=8"], ["data.batch_size=4", "trainer.devices=2", "strategy=fsdp2"]


def finished(words, folder, ranks=1, code=0, **env):
    """Run a command line on every rank; all must end with `code`, or without 0 where that is None."""
    started = start_ranks(words, folder, ranks, **env)
    codes, text = ended(started), logs(folder)
    assert codes == [code] * ranks or (code is None and all(codes)), (codes, text)
    return text


def test_runs_go_on_under_another_strategy_and_number_of_ranks(tmp_path):
    """Two steps divided, two by one process, two divided again: the end of one that was left alone, up to rounding."""
    (tmp_path / "dying.py").write_text(DYING)
    straight, out = tmp_path / "straight", tmp_path / "out"
    judged = ["eval=[perplexity]", "eval.perplexity.every=5"]
    finished([*WORDS, *ONE, *judged, f"out={straight}"], tmp_path)
    finished([*WORDS, *TWO, f"out={out}"], tmp_path, 2, None, DIE="3")
    assert checkpoint.find(out).name == "step=2.ckpt"
    finished([*WORDS, *ONE, f"out={out}"], tmp_path, 1, -9, DIE="5")
    assert checkpoint.find(out).name == "step=4.ckpt"
    finished([*WORDS, *TWO, *judged, f"out={out}"], tmp_path, 2)
    one, other = (checkpoint.read(checkpoint.find(folder)) for folder in (straight, out))
    assert one["global_step"] == other["global_step"] == 6
    assert one["optimizer_states"][0].keys() == other["optimizer_states"][0].keys()
    for kind in ("state_dict", "current_model_state"):
        for name, value in one[kind].items():
            torch.testing.assert_close(other[kind][name], value, rtol=1e-4, atol=1e-5, msg=f"{kind} {name}")
    lines = [rows(folder) for folder in (straight, out)]
    for name in ("train/loss", "opt/grad_norm"):
        left, right = ([float(line[name]) for line in table] for table in lines)
        assert right == pytest.approx(left, rel=1e-4), name
    left, right = ([float(r["eval/perplexity/nats"]) for r in table if r["eval/perplexity/nats"]] for table in lines)
    assert len(left) > 1 and right[-len(left) :] == pytest.approx(left, rel=1e-4)
    left, right = (dict(r[3:] for r in results(folder)) for folder in (straight, out))
    assert right == pytest.approx(left, rel=1e-4)
    assert (out / "last.safetensors").exists()
