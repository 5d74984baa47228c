"""FSDP2 on two gloo processes: what one process with the whole batch computes, and an ordinary method afterwards."""

import os
import socket
import sys

import pytest
import torch
from ranks import WORLD, on_ranks, part
from test_two_ranks import SIZE, fixed_loss, made
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from training import _processes, results, rows

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
WORDS += ["trainer.accelerator=cpu", "trainer.log_every_n_steps=1", "trainer.gradient_clip_val=1.0"]
ONE, TWO = ["data.batch_size=8"], ["data.batch_size=4", "trainer.devices=2", "strategy=fsdp2"]


def _process(words, env, log):
    os.environ.update(env)
    sys.path.insert(0, env["PYTHONPATH"])
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    from lightning.fabric.utilities.rank_zero import rank_zero_only as fabrics
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    from ssl_lab.cli.main import main

    rank_zero_only.rank = fabrics.rank = int(env.get("RANK", 0))  # read from the environment when it was imported
    torch.set_num_threads(1)
    sys.argv = ["ssl-lab", *words]
    sys.exit(main())


def finished(words, folder, ranks=1, code=0, **env):
    """Run a command line as torchrun would on every rank; all must end with `code`, or without 0 where that is None."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env |= {"PYTHONPATH": str(folder)}
    if ranks > 1:
        env |= {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GROUP_RANK": "0"}
        env |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    logs = [folder / f"log{rank}" for rank in range(ranks)]
    started = []
    for rank, log in enumerate(logs):
        mine = env | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {})
        started.append(_processes.Process(target=_process, args=(words, mine, str(log))))
        started[-1].start()
    for process in started:
        process.join(240)
        if process.is_alive():
            process.kill()
    text = "".join(log.read_text() for log in logs)
    codes = [process.exitcode for process in started]
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
    for name, value in one["state_dict"].items():
        torch.testing.assert_close(other["state_dict"][name], value, rtol=1e-4, atol=1e-5, msg=name)
    lines = [rows(folder) for folder in (straight, out)]
    for name in ("train/loss", "opt/grad_norm"):
        left, right = ([float(line[name]) for line in table] for table in lines)
        assert right == pytest.approx(left, rel=1e-4), name
    left, right = ([float(r["eval/perplexity/nats"]) for r in table if r["eval/perplexity/nats"]] for table in lines)
    assert len(left) > 1 and right[-len(left) :] == pytest.approx(left, rel=1e-4)
    left, right = (dict(r[3:] for r in results(folder)) for folder in (straight, out))
    assert right == pytest.approx(left, rel=1e-4)
    assert (out / "last.safetensors").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["ema=0.9"], "ema= keeps whole copies"),
        (["optim.name=muon"], "does not go with Muon"),
    ],
)
def test_what_cannot_be_divided_is_said(tmp_path, more, said):
    words = [w for w in WORDS if "_target_" not in w]
    assert said in finished([*words, *TWO, *more, f"out={tmp_path / 'out'}"], tmp_path, 2, 2)
