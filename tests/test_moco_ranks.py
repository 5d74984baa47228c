"""MoCo on two gloo processes, and shuffling BN."""

import pytest
import torch
from parity import gap, gradients, images
from ranks import on_ranks, part
from test_moco import method, unit, views

from ssl_lab.nn.shuffle import shuffled
from ssl_lab.types import Encoded


class Centred(torch.nn.Module):
    """Batch statistics and nothing else: the output tells with whom a sample was encoded."""

    def forward(self, x):
        return x - x.mean(0)


class Statistics(torch.nn.Module):
    """An encoder that is a batch normalisation of 8 mean values."""

    dim = 8

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(8)

    def forward(self, x, tokens=True):
        values = self.norm(x.unflatten(2, (8, 2)).mean((1, 3, 4)))
        return Encoded(values[:, None], values[:, :0, None], has_cls=False)


class Contrast(torch.nn.Module):
    def __init__(self, method):
        super().__init__()
        self.method = method

    def forward(self, query, key):
        return self.method.contrast(query, key)[0]


def work(rank):
    """What a rank sees of half of the batch: its loss, gradients under DDP, queue, and shuffled results."""
    ours = method().double().train()
    torch.manual_seed(10 + rank)  # in training every rank draws for itself
    half = part(rank, 8)
    net = torch.nn.parallel.DistributedDataParallel(Contrast(ours))
    for _ in range(2):
        net.zero_grad()
        loss = net(*(v[half] for v in views()))
        loss.backward()
        ours.after_step(0.0)
    before = torch.get_rng_state()
    centred = shuffled(Centred(), torch.arange(4.0)[:, None] + 4 * rank)
    torch.set_rng_state(before)
    order = torch.randperm(8)
    torch.manual_seed(20 + rank)
    batch_norm = method(Statistics(), head=[4]).double().train()
    batch_norm.contrast(*(v[half] for v in views()))
    return {
        "loss": loss.item(),
        "gradients": gradients(ours),
        "items": ours.queue.items,
        "pointer": ours.queue.pointer.item(),
        "centred": centred,
        "order": order,
        "keys": batch_norm._keys[0],
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return on_ranks(work, tmp_path_factory.mktemp("ranks"))


@pytest.mark.faults("C17", "two ranks, each method: loss and gradients of one process")
def test_two_ranks_equal_one_process(ranks):
    ours = method().double().train()
    for _ in range(2):
        ours.zero_grad()
        loss, _, _ = ours.contrast(*views())
        loss.backward()
        ours.after_step(0.0)
    assert sum(rank["loss"] for rank in ranks) / 2 == pytest.approx(loss.item(), abs=1e-12)
    wanted = gradients(ours)
    for rank in ranks:
        found = rank["gradients"]
        assert found.keys() == wanted.keys()
        assert {key: gap(found[key], g) for key, g in wanted.items() if gap(found[key], g) > 1e-12} == {}
        assert gap(rank["items"], ours.queue.items) < 1e-12 and rank["pointer"] == 16
    assert torch.equal(ranks[0]["items"], ranks[1]["items"])


def test_shuffled_samples_meet_others_and_return(ranks):
    order = ranks[0]["order"]  # rank 0's permutation
    x = torch.arange(8.0)[:, None]
    expected = torch.empty(8, 1)
    for half in order.chunk(2):
        expected[half] = x[half] - x[half].mean(0)
    found = torch.cat([rank["centred"] for rank in ranks])
    assert torch.equal(found, expected)
    assert not torch.equal(found[:4], x[:4] - x[:4].mean(0))


def test_keys_are_normalised_with_shuffled_batches(ranks):
    ours, key = method(Statistics(), head=[4]).double().train(), views()[1]
    torch.manual_seed(0)
    method(Statistics(), head=[4])  # as on rank 0, where the permutation is drawn next
    order = torch.randperm(8)
    expected = torch.empty(8, 4, dtype=torch.float64)
    for half in order.chunk(2):
        expected[half] = unit(ours._keys_of(key[half])).detach()
    assert gap(torch.cat([rank["keys"] for rank in ranks]), expected) < 1e-12


def test_one_process_shuffles_nothing_and_takes_no_gradient():
    x = images(8, 4).requires_grad_()
    state = torch.get_rng_state()
    out = shuffled(Centred(), x)
    assert torch.equal(out, x - x.mean(0)) and not out.requires_grad
    assert torch.equal(torch.get_rng_state(), state)
