import copy
import math

import pytest
import torch
from parity import gap, gradients, images, randomise
from training import _processes

from ssl_lab.backbones.timm import Timm
from ssl_lab.backbones.vit import ViT
from ssl_lab.cli.catalog import conf_folder
from ssl_lab.cli.compose import compose
from ssl_lab.errors import UserError
from ssl_lab.losses.queue_nce import queue_nce
from ssl_lab.methods.moco import MoCo
from ssl_lab.nn.queue import Queue
from ssl_lab.nn.shuffle import shuffled
from ssl_lab.types import Backbone, Encoded


def vit() -> ViT:
    return ViT(dim=32, depth=2, num_heads=2, image_size=16, patch_size=4)


def method(encoder: Backbone | None = None, **options) -> MoCo:
    torch.manual_seed(0)
    return MoCo(encoder or vit(), **({"head": [24, 8], "queue_size": 32} | options))


def views(batch: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(batch, 3, 16, 16, generator=generator, dtype=torch.float64) for _ in range(2)]


def unit(x):
    return x / x.square().sum(-1, keepdim=True).sqrt()


def plain_loss(query, key, queue, temperature):
    """Equation 1 of the paper, sample by sample."""
    total = 0.0
    for q, k in zip(unit(query), unit(key.detach()), strict=True):
        own = (q * k).sum() / temperature
        others = [torch.exp((q * item).sum() / temperature) for item in queue]
        total = total - torch.log(own.exp() / (own.exp() + sum(others)))
    return total / len(query)


def test_loss_and_gradients_are_the_papers():
    ours = randomise(method()).train()
    query, key = views()
    loss, _, _ = ours.contrast(query, key)
    loss.backward()
    found = gradients(ours)
    ours.zero_grad()
    q = ours.head(ours.encoder(query).prefix[:, 0])
    k = ours.key_head(ours.key_encoder(key).prefix[:, 0])
    expected = plain_loss(q, k, ours.queue.items, 0.2)
    expected.backward()
    wanted = gradients(ours)
    assert abs(loss.item() - expected.item()) < 1e-12
    assert {n: gap(found[n], wanted[n]) for n in found if gap(found[n], wanted[n]) > 1e-12} == {}
    trained = {n for n, g in found.items() if g.abs().max() > 0}
    assert trained == {n for n, _ in ours.named_parameters() if n.startswith(("encoder.", "head."))}


def test_loss_is_lightlys():
    loss = pytest.importorskip("lightly.loss", reason="needs lightly")
    theirs = loss.NTXentLoss(temperature=0.2, memory_bank_size=(64, 16))
    generator = torch.Generator().manual_seed(0)
    query, key, first = torch.randn(3, 8, 16, generator=generator).unbind(0)
    theirs(first, first)  # makes the bank
    bank = theirs.memory_bank.bank.clone()
    queue = bank if bank.shape == (64, 16) else bank.T
    a, b = (query.clone().requires_grad_() for _ in range(2))
    expected = theirs(b, key)
    expected.backward()
    found, _ = queue_nce(a, key, queue, 0.2)
    found.backward()
    assert abs(found.item() - expected.item()) < 1e-6 and gap(a.grad, b.grad) < 1e-6


def test_only_queries_get_a_gradient():
    query, key, queue = (torch.randn(4, 8, requires_grad=True) for _ in range(3))
    queue_nce(query, key, queue, 0.2)[0].backward()
    assert query.grad.abs().sum() > 0 and key.grad is None and queue.grad is None


def test_top1_counts_queries_whose_key_is_nearest():
    query = torch.eye(4)
    key = torch.eye(4)[[0, 1, 3, 2]]
    queue = torch.eye(4)[[2, 3]]
    assert queue_nce(query, key, queue, 0.2)[1].item() == 0.5


@torch.no_grad()
def average_(mine, theirs, momentum):
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        a.mul_(momentum).add_(b * (1 - momentum))


def test_training_is_in_the_official_order():
    """Query; key encoder follows; keys; loss against the queue without them; enqueue; optimizer step."""
    ours = randomise(method(momentum=0.9)).train()
    ours.key_encoder.load_state_dict(ours.encoder.state_dict())
    ours.key_head.load_state_dict(ours.head.state_dict())
    theirs = copy.deepcopy(ours)
    queue, place = theirs.queue.items.clone(), 0
    trained = [[p for n, p in m.named_parameters() if n.startswith(("encoder.", "head."))] for m in (ours, theirs)]
    mine, official = (torch.optim.SGD(p, lr=0.5) for p in trained)
    for i in range(6):
        query, key = (v.roll(i, 3) for v in views())
        step = ours.step({"views": [query, key]}, i / 6)
        mine.zero_grad()
        step.loss.backward()
        mine.step()
        ours.after_step(i / 6)

        q = theirs.head(theirs.encoder(query).prefix[:, 0])
        average_(theirs.key_encoder, theirs.encoder, 0.9)
        average_(theirs.key_head, theirs.head, 0.9)
        with torch.no_grad():
            k = unit(theirs.key_head(theirs.key_encoder(key).prefix[:, 0]))
        loss = plain_loss(q, k, queue.clone(), 0.2)
        queue[place : place + 8], place = k, (place + 8) % 32
        official.zero_grad()
        loss.backward()
        official.step()
        assert abs(loss.item() - step.loss.item()) < 1e-10, i
    assert gap(ours.queue.items, queue) < 1e-10 and ours.queue.pointer == place == 16
    for a, b in zip(*trained, strict=True):
        assert gap(a, b) < 1e-10


def test_queue_is_a_ring():
    torch.manual_seed(0)
    queue = Queue(8, 3)
    torch.testing.assert_close(queue.items.norm(dim=1), torch.ones(8))
    start = queue.items.clone()
    for i in range(3):
        queue.enqueue(torch.full((4, 3), float(i)))
        if i == 0:
            assert torch.equal(queue.items[4:], start[4:])
    assert queue.items[:, 0].tolist() == [2.0] * 4 + [1.0] * 4 and queue.pointer == 4
    assert set(queue.state_dict()) == {"items", "pointer"}


def test_a_queue_that_does_not_fit_the_batch_is_a_users_mistake():
    with pytest.raises(UserError, match="set queue_size to 30 or 36"):
        Queue(32, 3).enqueue(torch.ones(6, 3))
    with pytest.raises(UserError, match="set queue_size to 64"):
        Queue(32, 3).enqueue(torch.ones(64, 3))


def test_only_training_fills_the_queue():
    ours = method().double()
    start = copy.deepcopy(ours.state_dict())
    ours.eval()
    ours.step({"views": views()}, 0.0)
    ours.after_step(0.0)
    ours.train()
    with torch.no_grad():
        ours.step({"views": views()}, 0.0)
    ours.after_step(0.0)
    assert all(gap(v, start[k]) < 1e-14 for k, v in ours.state_dict().items())
    ours.step({"views": views()}, 0.0)
    assert torch.equal(ours.queue.items, start["queue.items"])  # not among the negatives of its own step
    ours.after_step(0.0)
    assert (ours.queue.items != start["queue.items"]).any(1).tolist() == [True] * 8 + [False] * 24


def test_a_state_dict_goes_on_to_the_bit():
    def train(ours, steps):
        for i in steps:
            ours.train().zero_grad()
            ours.step({"views": [v.roll(i, 3) for v in views()]}, 0.0).loss.backward()
            with torch.no_grad():
                for p in ours.parameters():
                    if p.grad is not None:
                        p.sub_(0.1 * p.grad)
            ours.after_step(0.0)

    whole, first, second = (method().double() for _ in range(3))
    train(whole, range(6))
    train(first, range(3))
    second.queue.items.zero_()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(second, range(3, 6))
    assert all(torch.equal(v, second.state_dict()[k]) for k, v in whole.state_dict().items())


def test_key_encoder_keeps_batch_statistics_of_its_own():
    ours = method(Timm("resnet18"), head=[8], queue_size=16).train()
    query, key = (v.float() for v in views())
    ours.contrast(query, key + 3)
    a, b = ours.encoder.model.bn1, ours.key_encoder.model.bn1
    assert b.training and a.num_batches_tracked == b.num_batches_tracked == 1
    assert not torch.allclose(a.running_mean, b.running_mean)
    mean = b.running_mean.clone()
    ours.after_step(0.0)
    assert torch.equal(b.running_mean, mean)


def test_v1_is_values():
    cfg = compose("train", ["method=moco", "views@data.views=moco_v1", "method.head=[128]", "method.temperature=0.07"],
                  [conf_folder()])  # fmt: skip
    assert cfg.data.views.both.jitter_p == 1.0 and "blur_p" not in cfg.data.views.both
    v1, v2 = method(head=cfg.method.head), method(head=[2048, 128])
    assert [type(m).__name__ for m in v1.head] == ["Linear"]
    assert [type(m).__name__ for m in v2.head] == ["Linear", "ReLU", "Linear"]
    assert all(m.bias is not None for head in (v1.head, v2.head) for m in head if hasattr(m, "bias"))


def test_it_takes_two_views():
    with pytest.raises(UserError, match="3 views"):
        method().step({"views": [*views(), views()[0]]}, 0.0)


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


def test_random_queue_gives_the_loss_of_chance():
    torch.manual_seed(0)
    queue, q, k = Queue(4096, 128).items, torch.randn(64, 128), torch.randn(64, 128)
    loss, right = queue_nce(q, k, queue, 1.0)
    assert loss.item() == pytest.approx(math.log(4097), abs=0.1) and right < 0.1
