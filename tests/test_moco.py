import copy
import math

import pytest
import torch
from parity import gap, gradients, randomise

from ssl_lab.backbones.timm import Timm
from ssl_lab.backbones.vit import ViT
from ssl_lab.cli.catalog import conf_folder
from ssl_lab.cli.compose import compose
from ssl_lab.errors import UserError
from ssl_lab.losses.queue_nce import queue_nce
from ssl_lab.methods.moco import MoCo
from ssl_lab.nn.queue import Queue
from ssl_lab.types import Backbone


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
    with pytest.raises(UserError, match=r"set method\.queue_size to 30 or 36"):
        Queue(32, 3).enqueue(torch.ones(6, 3))
    with pytest.raises(UserError, match=r"set method\.queue_size to 64"):
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


def test_random_queue_gives_the_loss_of_chance():
    torch.manual_seed(0)
    queue, q, k = Queue(4096, 128).items, torch.randn(64, 128), torch.randn(64, 128)
    loss, right = queue_nce(q, k, queue, 1.0)
    assert loss.item() == pytest.approx(math.log(4097), abs=0.1) and right < 0.1
