"""Mixtures of experts: a feed-forward of which each token uses a part (Switch, arXiv:2101.03961; DeepSeek-V3).

`experts.aux_loss` joins their losses to a method's, `experts.balance_` moves selection biases after a step.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_lab import dist
from ssl_lab.nn.experts import Experts, Mixture, real_tokens, sequence_mean
from ssl_lab.nn.ffn import GLU
from ssl_lab.nn.recompute import recomputing

if TYPE_CHECKING:
    from ssl_lab.nn.block import Context


class SwitchFFN(Mixture):
    """Each token goes to its most likely expert; what comes first fills it, the rest gives 0, (B, L, D) -> (B, L, D).

    The auxiliary loss is balance * E * sum_e f_e P_e (equations 4 to 6; f = share of tokens, P = mean probability, per
    sequence) plus z * mean(logsumexp(logits)^2) (ST-MoE, arXiv:2202.08906), per sequence too. Capacity counts per
    sequence, so a sample does not depend on the others of its batch; padding is left out.

    Args:
        dim: width D.
        num_experts: experts E.
        hidden: width of each expert, 4 * dim by default.
        capacity: of an expert in training, in units of L / E tokens; None = all it gets.
        eval_capacity: the same in evaluation; None makes decoding with a cache equal to the whole.
        jitter: the router's input is multiplied by uniform noise of 1 +- this in training.
        balance: weight of the balance loss.
        z: weight of the z-loss.
        act: activation of the experts.
        dropout: inside the experts.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int = 8,
        hidden: int | None = None,
        *,
        capacity: float | None = 1.25,
        eval_capacity: float | None = 2.0,
        jitter: float = 0.01,
        balance: float = 0.01,
        z: float = 0.001,
        act: Callable[[Tensor], Tensor] = F.relu,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(dim, num_experts)
        self.experts = Experts(num_experts, dim, hidden or 4 * dim, act=act, dropout=dropout)
        self.capacity, self.eval_capacity = capacity, eval_capacity
        self.jitter, self.balance, self.z = jitter, balance, z

    def forward(self, x: Tensor, ctx: "Context") -> Tensor:
        valid, seen = real_tokens(x, ctx), x
        if self.training and self.jitter > 0:
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            seen = wide * torch.empty_like(wide).uniform_(1 - self.jitter, 1 + self.jitter)
        logits = self.logits(seen)
        probabilities = logits.softmax(-1)
        weight, chosen = probabilities.max(-1)
        assigned = F.one_hot(chosen, self.num_experts)
        if valid is not None:
            assigned = assigned * valid[..., None]
        self._record(self._losses(logits, probabilities, assigned, valid) if self.training else None)
        kept = self._kept(assigned, chosen).flatten().nonzero().flatten()
        rows = x.flatten(0, 1)
        out = self.experts.mix(rows[kept], chosen.flatten()[kept, None], weight.flatten()[kept, None])
        return out.new_zeros(rows.shape).index_copy(0, kept, out).view_as(x)

    def _kept(self, assigned: Tensor, chosen: Tensor) -> Tensor:
        """(B, L) bool: tokens for which their expert has room, in the order of their positions."""
        capacity = self.capacity if self.training else self.eval_capacity
        place = assigned.cumsum(1).gather(2, chosen[..., None])[..., 0]
        kept = assigned.any(-1)
        if capacity is not None:
            tokens = assigned.sum((1, 2))  # of each sample, without its padding
            kept = kept & (place <= (capacity * tokens.double() / self.num_experts).long().clamp(min=1)[:, None])
        return kept

    def _losses(self, logits: Tensor, probabilities: Tensor, assigned: Tensor, valid: Tensor | None) -> Tensor:
        share, mean = sequence_mean(assigned.to(logits.dtype), valid), sequence_mean(probabilities, valid)
        uneven = self.num_experts * (share * mean).sum(-1).mean()
        squares = sequence_mean(logits.logsumexp(-1, keepdim=True).square(), valid)  # the same on any number of ranks
        return self.balance * uneven + self.z * squares.mean()


class DeepSeekMoE(Mixture):
    """Fine-grained experts of which each token uses a few, beside one that all use, (B, L, D) -> (B, L, D).

    DeepSeek-V3 (arXiv:2412.19437, section 2.1.2): affinities are sigmoids; selection adds a bias per expert and is
    limited to the best groups (a group counts by its two best experts), weights are the chosen affinities without it,
    normalised. After a step each bias moves by `bias_rate` against the load of its expert. The auxiliary loss is the
    sequence balance loss (equations 17 to 20).

    Args:
        dim: width D.
        num_experts: routed experts E.
        hidden: width of each expert, `dim` by default.
        top_k: experts K per token.
        num_groups: groups of experts (nodes of a cluster).
        top_groups: groups that a token may use.
        num_shared: experts that all tokens use, built as one of that many times the width.
        scaling: factor on the weights (2.5 in V3).
        balance: weight of the sequence balance loss.
        bias_rate: step of the biases.
    """

    bias: Tensor
    load: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int = 8,
        hidden: int | None = None,
        *,
        top_k: int = 2,
        num_groups: int = 1,
        top_groups: int = 1,
        num_shared: int = 1,
        scaling: float = 1.0,
        balance: float = 1e-4,
        bias_rate: float = 1e-3,
    ) -> None:
        super().__init__(dim, num_experts)
        if num_experts % num_groups or not top_groups <= num_groups or top_k > top_groups * num_experts // num_groups:
            raise ValueError(f"{top_k} of {num_experts} experts in {top_groups} of {num_groups} groups is impossible")
        hidden = hidden or dim
        self.experts = Experts(num_experts, dim, hidden, gated=True, act=F.silu)
        self.shared = GLU(dim, num_shared * hidden) if num_shared else None
        self.top_k, self.num_groups, self.top_groups = top_k, num_groups, top_groups
        self.scaling, self.balance, self.bias_rate = scaling, balance, bias_rate
        self.register_buffer("bias", torch.zeros(num_experts))
        self.register_buffer("load", torch.zeros(num_experts, dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor, ctx: "Context") -> Tensor:
        affinity = self.logits(x).sigmoid()
        chosen = self.choose(affinity)
        weights = affinity.gather(-1, chosen)
        weights = self.scaling * weights / (weights.sum(-1, keepdim=True) + 1e-20)
        if self.training:
            self._watch(affinity, chosen, real_tokens(x, ctx))
        else:
            self._record(None)
        out = self.experts.mix(x.flatten(0, 1), chosen.flatten(0, 1), weights.flatten(0, 1)).view_as(x)
        return out if self.shared is None else out + self.shared(x)

    @torch.no_grad()
    def choose(self, affinity: Tensor) -> Tensor:
        """Affinities (..., E) -> the K chosen experts (..., K) int64."""
        score = affinity + self.bias
        if self.top_groups < self.num_groups:
            grouped = score.unflatten(-1, (self.num_groups, -1))
            best = grouped.topk(min(2, grouped.shape[-1]), -1).values.sum(-1).topk(self.top_groups, -1).indices
            allowed = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter(-1, best, True)
            score = grouped.masked_fill(~allowed[..., None], float("-inf")).flatten(-2)
        return score.topk(self.top_k, -1).indices

    @torch.no_grad()
    def balance_(self) -> None:
        """Move the biases against the load since the last call: up where it is below the mean, down where above."""
        load = dist.all_reduce_sum(self.load.float())
        self.bias += self.bias_rate * (load.mean() - load).sign()
        self.forget_()

    def forget_(self) -> None:
        """Count the load anew."""
        self.load.zero_()

    def _watch(self, affinity: Tensor, chosen: Tensor, valid: Tensor | None) -> None:
        assigned = F.one_hot(chosen, self.num_experts).sum(-2)
        if valid is not None:
            assigned = assigned * valid[..., None]
        share = sequence_mean(assigned.to(affinity.dtype), valid) * self.num_experts / self.top_k
        mean = sequence_mean(affinity / affinity.sum(-1, keepdim=True), valid)
        self._record(self.balance * (share * mean).sum(-1).mean())
        if not recomputing():
            self.load += assigned.sum((0, 1))
