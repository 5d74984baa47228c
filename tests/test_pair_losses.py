"""Losses of pairs: against naive sums and open_clip, chunked and whole, two modalities and three."""

import math

import pytest
import torch
import torch.nn.functional as F
from parity import gap

from ssl_lab.losses.pairs import clip_loss, sigmoid_loss


def embeddings(towers=2, B=10, E=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(towers, B, E, generator=generator, dtype=torch.float64)
    return [each.clone().requires_grad_() for each in draws]


def scalar(value):
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def slopes(loss, *inputs):
    return torch.autograd.grad(loss, inputs)


def naive_clip(a, b, scale):
    logits = scale * F.normalize(a, dim=1) @ F.normalize(b, dim=1).T
    rows = -(logits.diagonal() - logits.logsumexp(1)).mean()
    columns = -(logits.diagonal() - logits.logsumexp(0)).mean()
    return (rows + columns) / 2


def naive_sigmoid(a, b, scale, bias):
    a, b, total = F.normalize(a, dim=1), F.normalize(b, dim=1), 0.0
    for i in range(len(a)):
        for j in range(len(b)):
            total = total - F.logsigmoid((1 if i == j else -1) * (scale * a[i] @ b[j] + bias))
    return total / len(a)


@pytest.mark.parametrize("gather", ["local", "global", "detached"])
def test_clip_is_the_mean_of_both_directions(gather):
    a, b = embeddings()
    scale = scalar(7.0)
    ours, wanted = clip_loss([a, b], scale, gather=gather), naive_clip(a, b, scale)
    assert gap(ours, wanted) < 1e-14
    for left, right in zip(slopes(ours, a, b, scale), slopes(wanted, a, b, scale), strict=True):
        assert gap(left, right) < 1e-14


@pytest.mark.parametrize("chunk", [None, 1, 3, 10, 64])
def test_sigmoid_is_the_sum_over_all_pairs(chunk):
    a, b = embeddings()
    scale, bias = scalar(10.0), scalar(-4.0)
    ours, wanted = sigmoid_loss([a, b], scale, bias, chunk=chunk), naive_sigmoid(a, b, scale, bias)
    assert gap(ours, wanted) < 1e-13
    for left, right in zip(slopes(3 * ours, a, b, scale, bias), slopes(3 * wanted, a, b, scale, bias), strict=True):
        assert gap(left, right) < 1e-13


def test_three_modalities_are_three_pairs():
    a, b, c = embeddings(3)
    scale, bias = scalar(5.0), scalar(-3.0)
    each = [clip_loss(list(pair), scale) for pair in ((a, b), (a, c), (b, c))]
    assert gap(clip_loss([a, b, c], scale), sum(each) / 3) < 1e-14
    each = [sigmoid_loss(list(pair), scale, bias) for pair in ((a, b), (a, c), (b, c))]
    for chunk in (None, 4):
        assert gap(sigmoid_loss([a, b, c], scale, bias, chunk=chunk), sum(each) / 3) < 1e-14


def test_equal_to_open_clip():
    losses = pytest.importorskip("open_clip.loss", reason="open_clip is not installed")
    a, b = embeddings()
    x, y = F.normalize(a, dim=1), F.normalize(b, dim=1)
    scale, bias = scalar(1 / 0.07), scalar(-10.0)
    ours, theirs = clip_loss([a, b], scale), losses.ClipLoss()(x, y, scale)
    assert gap(ours, theirs) < 1e-13
    for left, right in zip(slopes(ours, a, b, scale), slopes(theirs, a, b, scale), strict=True):
        assert gap(left, right) < 1e-13
    x, y = F.normalize(a, dim=1), F.normalize(b, dim=1)
    ours, theirs = sigmoid_loss([a, b], scale, bias, chunk=4), losses.SigLipLoss()(x, y, scale, bias)
    assert gap(ours, theirs) < 1e-13
    for left, right in zip(slopes(ours, a, b, scale, bias), slopes(theirs, a, b, scale, bias), strict=True):
        assert gap(left, right) < 1e-13


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Remembers the largest tensor that any operation gave."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else [out]:
            if isinstance(each, torch.Tensor):
                self.numel = max(self.numel, each.numel())
        return out


@pytest.mark.parametrize("B", [64, 256, 1024])
def test_the_chunked_loss_never_holds_the_matrix(B):
    a, b = embeddings(B=B, E=4)
    with Largest() as seen:
        sigmoid_loss([a, b], scalar(10.0), scalar(-10.0), chunk=16).backward()
    assert seen.numel == max(16 * 16, 2 * B * 4)  # the two embeddings with their gradients are all that grows
    with Largest() as seen:
        sigmoid_loss([a, b], scalar(10.0), scalar(-10.0)).backward()
    assert seen.numel == B * B


def test_half_precision_is_compared_in_float32():
    a, b = (each.detach().bfloat16() for each in embeddings())
    with torch.autocast("cpu", torch.bfloat16):
        found = clip_loss([a, b], torch.tensor(10.0)), sigmoid_loss([a, b], torch.tensor(10.0), torch.tensor(-10.0))
    assert all(each.dtype == torch.float32 for each in found)
    wanted = naive_clip(a.double(), b.double(), 10.0)
    assert gap(found[0].double(), wanted) < 1e-5


def test_chance_is_the_logarithm_of_the_batch():
    z = torch.ones(8, 4)
    assert clip_loss([z, z], torch.tensor(100.0)).item() == pytest.approx(math.log(8), abs=1e-5)
