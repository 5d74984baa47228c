"""Pairs on two gloo processes: three ways to gather and the chunked loss give the gradients of one process."""

import functools

import pytest
import torch
from parity import gap, gradients
from ranks import WORLD, on_ranks, part
from test_clip import SIZE, batch, clip
from torch import nn

from ssl_lab.losses.pairs import clip_loss
from ssl_lab.methods.clip import CLIP
from ssl_lab.methods.siglip import SigLIP

KINDS = {
    "local": (CLIP, {"gather": "local"}),
    "global": (CLIP, {"gather": "global"}),
    "detached": (CLIP, {"gather": "detached"}),
    "cached": (CLIP, {"chunk": 2}),
    "whole": (SigLIP, {"loss_chunk": None}),
    "chunked": (SigLIP, {"loss_chunk": 2}),
    "one chunk": (SigLIP, {"loss_chunk": 100, "chunk": 2}),
}


class Loss(nn.Module):
    def __init__(self, method):
        super().__init__()
        self.method = method

    def forward(self, given):
        return self.method.step(given, 0.5).loss


def share(rank):
    return {key: value[part(rank, SIZE)] for key, value in batch().items()}


def points():
    draws = torch.randn(2, SIZE, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return nn.functional.normalize(draws, dim=-1)


def open_clip_losses():
    """Of open_clip by mode; empty where it is not installed."""
    try:
        from open_clip.loss import ClipLoss
    except ImportError:
        return {}
    ranks = {"rank": torch.distributed.get_rank(), "world_size": WORLD}
    return {
        "detached": ClipLoss(**ranks),
        "global": ClipLoss(gather_with_grad=True, **ranks),
        "local": ClipLoss(local_loss=True, gather_with_grad=True, **ranks),
    }


def alone(loss, rank):
    """Loss and gradients with respect to the own points and the scale, not averaged."""
    a, b = (each[part(rank, SIZE)].clone().requires_grad_() for each in points())
    scale = torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
    value = loss(a, b, scale)
    value.backward()
    return {"loss": value.detach(), "a": a.grad, "b": b.grad, "scale": scale.grad}


def work(rank):
    found = {}
    for name, (cls, options) in KINDS.items():
        net = torch.nn.parallel.DistributedDataParallel(Loss(clip(cls, **options)))
        loss = net(share(rank))
        loss.backward()
        found[name] = loss.detach(), gradients(net.module.method)
    for mode, theirs in open_clip_losses().items():
        ours = alone(lambda a, b, s, mode=mode: clip_loss([a, b], s, gather=mode), rank)
        unit = functools.partial(nn.functional.normalize, dim=1)
        found[f"open_clip {mode}"] = ours, alone(lambda a, b, s, theirs=theirs: theirs(unit(a), unit(b), s), rank)
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return on_ranks(work, tmp_path_factory.mktemp("ranks"))


@pytest.mark.faults("C17", "two ranks, each method: loss and gradients of one process")
@pytest.mark.parametrize("name", KINDS)
def test_two_ranks_equal_one_process(ranks, name):
    cls, options = KINDS[name]
    method = clip(cls, **options)
    loss = method.step(batch(), 0.5).loss
    loss.backward()
    wanted = gradients(method)
    assert gap(sum(rank[name][0] for rank in ranks) / WORLD, loss.detach()) < 1e-12
    for _, found in (rank[name] for rank in ranks):
        assert {key: gap(found[key], g) for key, g in wanted.items() if gap(found[key], g) > 1e-12} == {}


@pytest.mark.parametrize("mode", ["local", "global", "detached"])
def test_each_mode_is_open_clips(ranks, mode):
    """To the factor that averaging over ranks takes away where only the own rows carry a gradient."""
    if f"open_clip {mode}" not in ranks[0]:
        pytest.skip("open_clip is not installed")
    factor = WORLD if mode == "detached" else 1
    for ours, theirs in (rank[f"open_clip {mode}"] for rank in ranks):
        assert gap(ours["loss"], theirs["loss"]) < 1e-12 and gap(ours["scale"], theirs["scale"]) < 1e-12
        for key in ("a", "b"):
            assert theirs[key].abs().max() > 1e-3
            assert gap(ours[key], factor * theirs[key]) < 1e-12
