"""MoCo on two gloo processes, and shuffling BN."""

import pytest
import torch
from parity import gap, images
from test_moco import method, unit, views
from training import _processes

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


def _rank(rank, store, queue):
    """What a rank sees of half of the batch: its loss, gradients under DDP, queue, and shuffled results."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    ours = method().double().train()
    torch.manual_seed(10 + rank)  # in training every rank draws for itself
    half = slice(4 * rank, 4 * rank + 4)
    net = torch.nn.parallel.DistributedDataParallel(Contrast(ours))
    for _ in range(2):
        net.zero_grad()
        loss = net(*(v[half] for v in views()))
        loss.backward()
        ours.after_step(0.0)
    found = {k: p.grad.numpy() for k, p in ours.named_parameters() if p.grad is not None}
    before = torch.get_rng_state()
    centred = shuffled(Centred(), torch.arange(4.0)[:, None] + 4 * rank)
    torch.set_rng_state(before)
    order = torch.randperm(8)
    items = ours.queue.items.numpy()
    torch.manual_seed(20 + rank)
    batch_norm = method(Statistics(), head=[4]).double().train()
    batch_norm.contrast(*(v[half] for v in views()))
    queue.put(
        (
            rank,
            loss.item(),
            found,
            items,
            ours.queue.pointer.item(),
            centred.numpy(),
            order.numpy(),
            batch_norm._keys[0].numpy(),
        )
    )
    torch.distributed.barrier()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    queue, store = _processes.Queue(), tmp_path_factory.mktemp("gloo") / "store"
    processes = [_processes.Process(target=_rank, args=(r, store, queue)) for r in range(2)]
    for process in processes:
        process.start()
    found = sorted((queue.get(timeout=120) for _ in processes), key=lambda entry: entry[0])
    for process in processes:
        process.join(60)
    return found


def test_two_ranks_equal_one_process(ranks):
    ours = method().double().train()
    for _ in range(2):
        ours.zero_grad()
        loss, _, _ = ours.contrast(*views())
        loss.backward()
        ours.after_step(0.0)
    assert sum(entry[1] for entry in ranks) / 2 == pytest.approx(loss.item(), abs=1e-12)
    for _, _, found, items, pointer, *_ in ranks:
        wanted = {k: p.grad for k, p in ours.named_parameters() if p.grad is not None}
        assert found.keys() == wanted.keys()
        assert {k: gap(torch.from_numpy(found[k]), g) for k, g in wanted.items()
                if gap(torch.from_numpy(found[k]), g) > 1e-12} == {}  # fmt: skip
        assert gap(torch.from_numpy(items), ours.queue.items) < 1e-12 and pointer == 16
    assert (ranks[0][3] == ranks[1][3]).all()


def test_shuffled_samples_meet_others_and_return(ranks):
    order = torch.from_numpy(ranks[0][6])  # rank 0's permutation
    x = torch.arange(8.0)[:, None]
    expected = torch.empty(8, 1)
    for half in order.chunk(2):
        expected[half] = x[half] - x[half].mean(0)
    found = torch.cat([torch.from_numpy(entry[5]) for entry in ranks])
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
    assert gap(torch.cat([torch.from_numpy(entry[7]) for entry in ranks]), expected) < 1e-12


def test_one_process_shuffles_nothing_and_takes_no_gradient():
    x = images(8, 4).requires_grad_()
    state = torch.get_rng_state()
    out = shuffled(Centred(), x)
    assert torch.equal(out, x - x.mean(0)) and not out.requires_grad
    assert torch.equal(torch.get_rng_state(), state)
