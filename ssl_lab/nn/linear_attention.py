"""Attention in time linear in the length, by a feature map in place of the softmax (arXiv:2006.16236)."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_lab.errors import UserError
from ssl_lab.nn.linear import Linear

if TYPE_CHECKING:
    from ssl_lab.nn.block import Context


def elu_plus_one(x: Tensor) -> Tensor:
    """The feature map of the paper (equation 7), positive everywhere."""
    return F.elu(x) + 1


class LinearAttention(nn.Module):
    """Self-attention with weights phi(q) . phi(k), normalised per query (equations 4 to 9), (B, L, D) -> (B, L, D).

    It is causal where `ctx.mask` is, and leaves padding out; a query without any key gives 0. With a cache it carries
    one matrix (Dh, Dh + 1) per head, whatever the length. Sums are float32 at least.

    Args:
        dim: width D.
        num_heads: heads H.
        head_dim: width Dh of a head, D / H by default.
        qkv_bias: biases of the input projections.
        proj_bias: bias of the output projection.
        feature: the feature map phi, positive.
        chunk: positions that causal attention treats at once, by products of their scores.
        layer: index for the cache.
    """

    takes_context = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        feature: Callable[[Tensor], Tensor] = elu_plus_one,
        chunk: int = 64,
        layer: int = 0,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim or dim // num_heads
        self.qkv = Linear(dim, 3 * num_heads * self.head_dim, qkv_bias)
        self.proj = Linear(num_heads * self.head_dim, dim, proj_bias)
        self.feature, self.chunk, self.layer = feature, chunk, layer

    def forward(self, x: Tensor, ctx: "Context") -> Tensor:
        """Raises UserError for what has no linear form: windows, segments, prefixes, score biases, rotations."""
        mask = ctx.mask
        if any(t is not None for t in (mask.window, mask.segments, mask.prefix, ctx.bias, ctx.rope)):
            raise UserError(
                "linear attention takes no window, segments, prefix, score bias or rotary positions: "
                "choose a learned or sinusoidal position table, or another attention"
            )
        if ctx.cache is not None and not mask.causal:
            raise UserError("linear attention decodes with a cache only where the mask is causal")
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        valid = None if mask.valid is None else mask.valid[:, -x.shape[1] :]
        past = None if ctx.cache is None else ctx.cache.state(self.layer)
        with torch.autocast(x.device.type, enabled=False):
            wide = torch.promote_types(q.dtype, torch.float32)
            q, k, v = self.feature(q.to(wide)), self.feature(k.to(wide)), v.to(wide)
            out, state = linear_attention(q, k, v, causal=mask.causal, valid=valid, past=past, chunk=self.chunk)
        if ctx.cache is not None:
            ctx.cache.keep(self.layer, state, x.shape[1])
        return self.proj(out.to(x.dtype).transpose(1, 2).flatten(2))


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    valid: Tensor | None = None,
    past: Tensor | None = None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """Mapped queries and keys (B, H, L, Dh), values (B, H, L, Dv) -> (B, H, L, Dv), state (B, H, Dh, Dv + 1).

    The state is the sum of phi(k) v^T over all positions; the last column, with v = 1, sums phi(k), by which a query's
    result is normalised. `past` is the state of earlier positions, `valid` (B, L) bool marks keys that count.
    """
    if valid is not None:
        k = k * valid[:, None, :, None].to(k.dtype)
    v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    if causal:
        mixed, state = _causal(q, k, v, past, min(chunk, q.shape[2]))
    else:
        state = k.mT @ v
        mixed = q @ state
    total = mixed[..., -1:]
    return mixed[..., :-1] / total.masked_fill(total == 0, 1), state


def _causal(q: Tensor, k: Tensor, v: Tensor, past: Tensor | None, chunk: int) -> tuple[Tensor, Tensor]:
    """Within a chunk by the scores, before it by the sum of what was."""
    length = q.shape[2]
    if rest := -length % chunk:
        q, k, v = (F.pad(t, (0, 0, 0, rest)) for t in (q, k, v))
    q, k, v = (t.unflatten(2, (-1, chunk)) for t in (q, k, v))
    sums = (k.mT @ v).cumsum(2)
    if past is not None:
        sums = sums + past[:, :, None]
    first = torch.zeros_like(sums[:, :, :1]) if past is None else past[:, :, None]
    before = torch.cat([first, sums[:, :, :-1]], 2)
    out = (q @ k.mT).tril() @ v + q @ before
    return out.flatten(2, 3)[:, :, :length], sums[:, :, -1]
