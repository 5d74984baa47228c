"""Losses of samples in several modalities: what belongs together is near, across all ranks."""

import itertools
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssl_lab import dist
from ssl_lab.nn.norm import l2_normalize

Gather = Literal["local", "global", "detached"]


def clip_loss(embeddings: Sequence[Tensor], scale: Tensor, *, gather: Gather = "local") -> Tensor:
    """CLIP's symmetric cross-entropy (arXiv:2103.00020, fig. 3) -> scalar, float32 at least.

    For every two modalities a and b, with rows of unit length:  (CE(scale a b^T, own) + CE(scale b a^T, own)) / 2;
    the mean over all such pairs of modalities.

    Args:
        embeddings: two modalities or more, (B, E) each; row i of all of them is one sample.
        scale: scalar, exp of the learned logit scale.
        gather: how N ranks compare. All three give the loss and the gradients of one process, once gradients are
            averaged over ranks. "local": own rows against the columns of all, gradients flow back to the owner of a
            column; "global": every rank makes the whole matrix; "detached": the whole matrix, and only the own rows
            carry a gradient, so nothing is sent in the backward pass (open_clip's default, with N times its gradient).
    """
    own = [l2_normalize(e) for e in embeddings]
    everyone = [_gathered(e, gather) for e in own]
    first, B = dist.rank() if gather == "local" else 0, len(own[0])
    rows = own if gather == "local" else everyone
    labels = torch.arange(len(rows[0]), device=own[0].device) + first * B
    losses = []
    with torch.autocast(own[0].device.type, enabled=False):
        scale = scale.to(own[0].dtype)
        for a, b in itertools.combinations(range(len(own)), 2):
            logits = scale * rows[a] @ everyone[b].T
            back = logits.T if len(rows[a]) == len(everyone[a]) else scale * rows[b] @ everyone[a].T
            losses.append((F.cross_entropy(logits, labels) + F.cross_entropy(back, labels)) / 2)
    return torch.stack(losses).mean()


def sigmoid_loss(embeddings: Sequence[Tensor], scale: Tensor, bias: Tensor, *, chunk: int | None = None) -> Tensor:
    """SigLIP (arXiv:2303.15343, eq. 1) -> scalar, float32 at least; the mean over all pairs of modalities.

    -1/N sum over i, j of log sigmoid(y_ij (scale a_i b_j + bias)), y = 1 for i = j, else -1, over the global batch N.

    Args:
        embeddings: two modalities or more, (B, E) each.
        scale: scalar, exp of the learned t'.
        bias: scalar, learned.
        chunk: look at so many rows and columns at a time; b's rows go round the ranks, with their gradient, until they
            are home again. Memory then holds `chunk` x `chunk` logits and two ranks' rows, however large the global
            batch is, and the gradients are the same. None = own rows against the columns of all in one matrix.
    """
    own = [l2_normalize(e) for e in embeddings]
    losses = []
    with torch.autocast(own[0].device.type, enabled=False):
        scale, bias = scale.to(own[0].dtype), bias.to(own[0].dtype)
        for a, b in itertools.combinations(own, 2):
            if chunk is not None:
                losses.append(_Sigmoid.apply(a, b, scale, bias, chunk))
                continue
            logits = scale * a @ dist.gather(b).T + bias
            signs = torch.full_like(logits, -1.0)
            signs.diagonal(len(a) * dist.rank()).fill_(1.0)
            losses.append(-F.logsigmoid(signs * logits).sum() / len(a))
    return torch.stack(losses).mean()


class _OwnScaled(torch.autograd.Function):
    """Identity whose gradient is multiplied: one rank's share stands for the whole that averaging divides by N."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: int) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def _gathered(x: Tensor, how: Gather) -> Tensor:
    """(B, E) -> (N * B, E); "detached" puts the own rows, which carry a gradient, back in their place."""
    world, rank = dist.world_size(), dist.rank()
    if how != "detached" or world == 1:
        return dist.gather(x)
    parts = list(dist.gather(x, grad=False).chunk(world))
    own: Tensor = _OwnScaled.apply(x, world)
    parts[rank] = own
    return torch.cat(parts)


class _Sigmoid(torch.autograd.Function):
    """The loss of own rows `a` against everyone's `b`, its gradients made on the way, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, chunk: int) -> Tensor:
        world, B = dist.world_size(), len(a)
        loss, scale_grad, bias_grad = (a.new_zeros(()) for _ in range(3))
        a_grad, visitor = torch.zeros_like(a), torch.stack([b, torch.zeros_like(b)])
        for visit in range(world):
            columns, columns_grad = visitor
            for i, j in itertools.product(range(0, B, chunk), repeat=2):
                rows, cols = slice(i, i + chunk), slice(j, j + chunk)
                similar = a[rows] @ columns[cols].T
                logits = torch.addcmul(bias, similar, scale)
                if visit == 0 and i == j:  # log sigmoid(y z) = log sigmoid(-z) + z where y = 1
                    loss -= logits.diagonal().sum()
                loss += F.softplus(logits).sum()
                slope = logits.sigmoid_()
                if visit == 0 and i == j:
                    slope.diagonal().sub_(1.0)
                bias_grad += slope.sum()
                scale_grad += (slope * similar).sum()
                a_grad[rows].addmm_(slope, columns[cols])
                columns_grad[cols].addmm_(slope.T, a[rows])
            visitor = dist.pass_on(visitor)
        ctx.save_for_backward(a_grad.mul_(scale / B), visitor[1] * (scale / B), scale_grad / B, bias_grad / B)
        return loss / B

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *(grad * saved for saved in ctx.saved_tensors), None
