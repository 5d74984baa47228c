"""Self-distillation: a teacher's assignments to prototypes, kept from collapsing, are what the student predicts."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_lab import dist


class Center(nn.Module):
    """Running mean of the teacher's logits over all ranks (DINO, arXiv:2104.14294, eq. 4).

    Subtracting it works against one prototype taking all; the low temperature of the teacher against all being equal.

    Args:
        prototypes: K.
        momentum: share of the old centre that is kept per step.
    """

    center: Tensor
    _total: Tensor

    def __init__(self, prototypes: int, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(prototypes))
        # Sum and number of logits since the last update: empty between two steps, so no part of a checkpoint.
        self.register_buffer("_total", torch.zeros(prototypes + 1), persistent=False)

    def forward(self, logits: Tensor, temperature: float) -> Tensor:
        """(..., K) -> assignments (..., K), float32 at least, by the centre as it was before this batch."""
        return ((_wide(logits) - self.center) / temperature).softmax(-1)

    @torch.no_grad()
    def collect(self, logits: Tensor) -> None:
        """Keep the sum of logits (M, K) for the next `update`; an accumulated step collects several times."""
        self._total = self._total + torch.cat([_wide(logits).sum(0), self.center.new_tensor([len(logits)])])

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the mean of what was collected on all ranks; ranks may bring different numbers of rows."""
        total = dist.all_reduce_sum(self._total)
        if total[-1] > 0:
            self.center.lerp_((total[:-1] / total[-1]).to(self.center.dtype), 1 - self.momentum)
        self._total = torch.zeros_like(total)

    def forget(self) -> None:
        """Drop what was collected since the last `update`."""
        self._total = torch.zeros_like(self._total)


@torch.no_grad()
def sinkhorn(logits: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """(M, K) logits -> assignments (M, K) whose columns are used equally over all ranks (SwAV, arXiv:2006.09882).

    Every row sums to one; M may differ between ranks.
    """
    scores = _wide(logits) / temperature
    top = scores.amax() if len(scores) else scores.new_full((), float("-inf"))
    # A row without any weight left would divide by zero: what lies e^80 below the top counts as e^-80.
    scores = (scores - dist.all_reduce_max(top)).clamp(min=-80).exp()
    rows = dist.all_reduce_sum(scores.new_tensor(float(len(scores))))
    for _ in range(iterations):
        used = dist.all_reduce_sum(scores.sum(0)).clamp(min=torch.finfo(scores.dtype).tiny)
        scores = scores / (used * scores.shape[1])
        scores = scores / (scores.sum(1, keepdim=True) * rows)
    return scores * rows


class _CrossEntropy(torch.autograd.Function):
    """sum_rows weight * (-sum_k target_k log softmax(logits / temperature)_k), its gradient made in the same pass.

    Prototypes are many, so the logits are by far the largest tensors of a step: one copy of them is kept, not three.
    Its rows come without their small factor, which waits in float32 for the loss scale: in fp16 most would else be 0.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, weight: Tensor, temperature: float) -> Tensor:
        scaled = _wide(logits) / temperature
        norm = scaled.logsumexp(-1)
        mass = target.sum(-1)
        loss = (weight * (mass * norm - torch.linalg.vecdot(target, scaled))).sum()
        grad = scaled.sub_(norm[..., None]).exp_().mul_(mass[..., None]).sub_(target)
        factor = weight / temperature
        if logits.dtype == torch.float16:  # entries lie within +- mass; spread over the range, few are rounded to 0
            room = 2.0**15 / mass.clamp(min=1)
            grad, factor = grad.mul_(room[..., None]), factor / room
        ctx.save_for_backward(grad.to(logits.dtype), factor)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        saved, factor = ctx.saved_tensors
        # `out` is rounded once, from the wide product, which takes no memory
        return torch.mul(saved, (grad * factor)[..., None], out=torch.empty_like(saved)), None, None, None


def cross_entropy(logits: Tensor, target: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """Student logits and teacher assignments (M, K), weights (M,) -> weighted sum of cross-entropies, scalar."""
    return _CrossEntropy.apply(logits, target, weight, temperature)


def cross_views(student: Sequence[Tensor], teacher: Tensor, temperature: float) -> Tensor:
    """DINO's loss: every student view predicts every teacher view but itself (arXiv:2104.14294, eq. 3).

    Args:
        student: logits of the views, each (B, K); those the teacher saw come first, in its order.
        teacher: assignments (T, B, K) of its views.
        temperature: of the student.

    Returns:
        Mean over pairs and batch. One pass per student view: the cross-entropies with several targets sum up to one
        with the sum of the targets.
    """
    everything, B = teacher.sum(0), teacher.shape[1]
    pairs = len(teacher) * (len(student) - 1)
    weight = everything.new_full((B,), 1 / (pairs * B))
    losses = [
        cross_entropy(view, everything - teacher[i] if i < len(teacher) else everything, weight, temperature)
        for i, view in enumerate(student)
        if i >= len(teacher) or len(teacher) > 1
    ]
    return torch.stack(losses).sum()


def koleo(x: Tensor) -> Tensor:
    """-mean log distance to the nearest neighbour in the batch of all ranks, (B, D) -> scalar.

    Spreads features evenly on the sphere (Sablayrolles et al., 2019, arXiv:1806.03198, as DINOv2 uses it).
    """
    with torch.autocast(x.device.type, enabled=False):
        x = F.normalize(_wide(x), dim=-1, eps=1e-8)
        world = dist.gather(x)
        with torch.no_grad():
            similarity = x @ world.T
            own = torch.arange(len(x), device=x.device) + len(x) * dist.rank()
            nearest = similarity.scatter(1, own[:, None], -2.0).argmax(1)
        distance = F.pairwise_distance(x, world[nearest], eps=1e-8)
        return -(distance + 1e-8).log().mean()


@torch.no_grad()
def entropy(assignments: Tensor) -> Tensor:
    """Nats, (..., K) assignments -> (...): log K when all prototypes are alike, 0 when one has all."""
    return -torch.special.xlogy(assignments, assignments).sum(-1)


@torch.no_grad()
def information(assignments: Tensor) -> Tensor:
    """Nats that assignments (M, K) tell about the sample, scalar: entropy of their mean minus mean of their entropies.

    0 when all samples get the same assignment, be it to one prototype or to all: then the teacher teaches nothing.
    """
    return entropy(assignments.mean(0)) - entropy(assignments).mean()


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
