"""What all mixtures of experts share: the experts, the router, and how their losses reach a method.

`aux_loss(model)` is added to the loss of a step, `balance_(model)` is called after it. Models without experts give 0
and are left alone.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_lab.nn.dropout import Dropout
from ssl_lab.nn.linear import linear
from ssl_lab.nn.recompute import recomputing

if TYPE_CHECKING:
    from ssl_lab.nn.block import Context


def aux_loss(module: nn.Module) -> Tensor:
    """Scalar: the auxiliary losses of all layers of experts in their latest training pass, weighted and summed.

    To be read after the forward pass whose loss it joins, once per pass.
    """
    losses = [m.aux for m in module.modules() if isinstance(m, Mixture) and m.aux is not None]
    if losses:
        return torch.stack(losses).sum()
    return torch.zeros((), device=next((p.device for p in module.parameters()), None))


def balance_(module: nn.Module) -> None:
    """Let all layers of experts act on their load since the last call, see `DeepSeekMoE`; in `after_step`."""
    for m in module.modules():
        if isinstance(m, Mixture):
            m.balance_()


def forget_(module: nn.Module) -> None:
    """Let all layers of experts leave out their load since the last call; in `after_skip`."""
    for m in module.modules():
        if isinstance(m, Mixture):
            m.forget_()


class Experts(nn.Module):
    """E feed-forward networks without biases, each applied to its own rows: (M, D) -> (M, D).

    Args:
        num_experts: experts E.
        dim: width D.
        hidden: width of each expert.
        gated: gate and value side by side (SwiGLU with act=F.silu), else one activated layer.
        act: activation.
        dropout: inside the experts.
    """

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden: int,
        *,
        gated: bool = False,
        act: Callable[[Tensor], Tensor] = F.relu,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(num_experts, hidden * (2 if gated else 1), dim))
        self.down = nn.Parameter(torch.empty(num_experts, dim, hidden))
        self.gated, self.act, self.dropout = gated, act, Dropout(dropout)
        for weight in (*self.up, *self.down):
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))  # as nn.Linear

    def forward(self, x: Tensor, counts: list[int]) -> Tensor:
        """Rows (M, D) ordered by expert, and how many each has."""
        # unbind, not an index per expert: its backward writes one gradient, not E of the full size
        parts = zip(x.split(counts), self.up.unbind(), self.down.unbind(), strict=True)
        return torch.cat([self._one(rows, up, down) for rows, up, down in parts])

    def _one(self, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        if self.gated:
            gate, value = linear(x, up).chunk(2, -1)
            return linear(self.dropout(self.act(gate) * value), down)
        return linear(self.dropout(self.act(linear(x, up))), down)

    def mix(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Tokens (N, D), their experts (N, K) int64 and weights (N, K) -> weighted sums (N, D)."""
        flat = chosen.flatten()
        order = flat.argsort(stable=True)
        counts: list[int] = torch.bincount(flat, minlength=len(self.up)).tolist()
        out = self(x[order // chosen.shape[1]], counts)
        out = out[order.argsort()]  # a permutation: sums in a fixed order on every device
        out = out.view(*chosen.shape, out.shape[-1])
        return (out * weights[..., None].to(out.dtype)).sum(1)


class Mixture(nn.Module):
    """What layers of experts share: a router in float32, and the auxiliary loss of the latest training pass.

    Attributes:
        aux: scalar with its graph, or None outside of training. It is set by the forward pass alone, not by the second
            one of activation checkpointing, through which its gradient flows like any other.
    """

    takes_context = True
    aux: Tensor | None = None

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.router = nn.Parameter(torch.empty(num_experts, dim))
        nn.init.normal_(self.router, std=0.1 / math.sqrt(dim))

    def logits(self, x: Tensor) -> Tensor:
        """Tokens (..., D) -> (..., E), in float32 at least, also under autocast."""
        with torch.autocast(x.device.type, enabled=False):
            wide = torch.promote_types(x.dtype, torch.float32)
            return F.linear(x.to(wide), self.router.to(wide))

    def balance_(self) -> None:
        """What is to be done after a step: nothing."""

    def forget_(self) -> None:
        """What is to be done after a step that is left out: nothing."""

    def _record(self, aux: Tensor | None) -> None:
        if not recomputing():
            self.aux = aux

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "aux": None}  # a graph cannot be copied


def real_tokens(x: Tensor, ctx: "Context") -> Tensor | None:
    """(B, L) bool of the tokens at hand, or None when all are real."""
    valid, segments = ctx.mask.valid if ctx.real is None else ctx.real, ctx.mask.segments
    if valid is None and segments is not None:
        return segments[:, -x.shape[1] :] != -1  # padding of packed rows
    return None if valid is None else valid[:, -x.shape[1] :]


def sequence_mean(x: Tensor, valid: Tensor | None) -> Tensor:
    """(B, L, E) -> (B, E): mean over the real tokens of each sequence."""
    if valid is None:
        return x.mean(1)
    weight = valid.to(x.dtype)
    return (x * weight[..., None]).sum(1) / weight.sum(1, keepdim=True).clamp(min=1)
