"""Cross-entropy of predicted tokens, over the scored tokens of all ranks."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssl_lab import dist
from ssl_lab.errors import UserError
from ssl_lab.nn.linear import linear

IGNORE = -100  # the label of a position that is not scored


def nll(logits: Tensor, wanted: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Logits (M, V) and classes (M,) -> negative log likelihood in nats (M,), float32 at least; 0 for class -100."""
    if label_smoothing == 0 and logits.dtype in (torch.bfloat16, torch.float16):
        found: Tensor = _NLL.apply(logits, wanted)
        return found
    exact = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    return F.cross_entropy(exact, wanted, reduction="none", label_smoothing=label_smoothing)


class _NLL(torch.autograd.Function):
    """Of half-precision logits some rows at a time, so that their float32 copies are small and stay in the cache."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, wanted: Tensor) -> Tensor:
        exact = torch.promote_types(logits.dtype, torch.float32)
        total = torch.cat([part.to(exact).logsumexp(-1) for part in logits.split(_rows_at_once(logits))])
        known = wanted != IGNORE
        own = logits.gather(1, wanted.where(known, 0)[:, None])[:, 0].to(exact)
        ctx.save_for_backward(logits, wanted, total)
        return (total - own).where(known, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, wanted, total = ctx.saved_tensors
        known = wanted != IGNORE
        share, own = grad.where(known, 0.0)[:, None], wanted.where(known, 0)[:, None]
        out, count = torch.empty_like(logits), _rows_at_once(logits)
        for into, part, log_sum, factor, target in zip(
            *(t.split(count) for t in (out, logits, total[:, None], share, own)), strict=True
        ):
            likely = torch.sub(part, log_sum).exp_()
            into.copy_(likely.mul_(factor).scatter_add_(1, target, -factor))
        return out, None


def _rows_at_once(logits: Tensor) -> int:
    """On an accelerator few, large pieces are better; there is nothing to keep in a cache."""
    size = 1 << 20 if logits.device.type == "cpu" else 1 << 26
    return max(1, size // logits.shape[1])


def token_nll(hidden: Tensor, weight: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Negative log likelihood in nats (B, L), float32 at least, of `labels` (B, L), 0 where they are -100.

    Only scored positions go through the output layer.

    Args:
        hidden: (B, L, D) of the last layer.
        weight: (V, D) of the output layer.
        labels: (B, L) int64.
        label_smoothing: share of the target that is spread evenly over the V tokens.
    """
    scored = labels != IGNORE
    whole = bool(scored.all())
    rows, wanted = (hidden.flatten(0, 1), labels.flatten()) if whole else (hidden[scored], labels[scored])
    found = nll(linear(rows, weight), wanted, label_smoothing=label_smoothing)
    if whole:
        return found.unflatten(0, labels.shape)
    return found.new_zeros(labels.shape).masked_scatter(scored, found)


def mean_over_known(nll: Tensor, labels: Tensor) -> Tensor:
    """Sum of `nll`, of any shape, over the number of scored ones among `labels` (B, L) or (B,) of all ranks, if any.

    Ranks hold different numbers of them: every rank divides by the mean number, so that averaged gradients are those
    of one process. Accumulated micro-batches divide each by its own number.
    """
    count = _known(nll, labels)
    return nll.sum() / count.where(count > 0, 1.0)


def mean_over_tokens(nll: Tensor, labels: Tensor) -> Tensor:
    """As `mean_over_known`, where a batch without any scored token is a mistake in the data.

    Raises:
        UserError: no token is scored.
    """
    count = _known(nll, labels)
    if float(count) == 0:
        raise UserError("no token of this batch is scored: all labels are -100; check the data and its views")
    return nll.sum() / count


def _known(nll: Tensor, labels: Tensor) -> Tensor:
    return dist.all_reduce_mean((labels != IGNORE).sum().to(nll.dtype))


@torch.no_grad()
def top1(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Share of the scored tokens that are the most likely ones."""
    scored = labels != IGNORE
    right = linear(hidden[scored], weight).argmax(-1) == labels[scored]
    return right.sum() / max(1, len(right))
