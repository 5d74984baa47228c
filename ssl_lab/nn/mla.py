"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1; V3, arXiv:2412.19437)."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ssl_lab.nn.attend import KernelName, attend
from ssl_lab.nn.linear import Linear
from ssl_lab.nn.norm import RMSNorm
from ssl_lab.nn.rope import rotate

if TYPE_CHECKING:
    from ssl_lab.nn.block import Context


class MLA(nn.Module):
    """Self-attention whose keys and values are read out of one small latent per position, (B, L, D) -> (B, L, D).

    Order comes from a key of width `rope_dim` beside the latent, shared by all heads, so the rotation stays outside of
    what is compressed. A cache holds latent and rotated key alone, kv_rank + rope_dim numbers per position.

    Without a past, keys and values are formed (naive). With one, the matrices that would form them are put into the
    queries and the output (absorbed, section 2.1.2): attention then runs on the latents themselves, as if all heads
    shared one key. Both give the same up to rounding.

    Args:
        dim: width D.
        num_heads: heads H.
        q_rank: width of a latent for queries too; None = queries are projected straight from the input.
        kv_rank: width R of the latent.
        nope_dim: width of queries and keys without position, per head.
        rope_dim: width of queries and keys with position; the rotary table must have this width.
        v_dim: width of values, per head.
        scale: constant factor on the scores, (nope_dim + rope_dim) ** -0.5 by default; with YaRN DeepSeek multiplies
            that by the square of `nn.rope.yarn_mscale`.
        eps: of the latents' RMSNorm.
        dropout: dropout of attention weights.
        kernel: see `attend`.
        layer: index for the cache.
    """

    takes_context = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        q_rank: int | None = None,
        kv_rank: int = 128,
        nope_dim: int = 32,
        rope_dim: int = 16,
        v_dim: int = 32,
        scale: float | None = None,
        eps: float = 1e-6,
        dropout: float = 0.0,
        kernel: KernelName = "auto",
        layer: int = 0,
    ) -> None:
        super().__init__()
        width = nope_dim + rope_dim
        if q_rank is None:
            self.q: nn.Module = Linear(dim, num_heads * width, bias=False)
        else:
            self.q = nn.Sequential(
                Linear(dim, q_rank, bias=False), RMSNorm(q_rank, eps=eps), Linear(q_rank, num_heads * width, bias=False)
            )
        self.kv_down, self.kv_norm = Linear(dim, kv_rank + rope_dim, bias=False), RMSNorm(kv_rank, eps=eps)
        self.kv_up = Linear(kv_rank, num_heads * (nope_dim + v_dim), bias=False)
        self.proj = Linear(num_heads * v_dim, dim, bias=False)
        self.num_heads, self.kv_rank, self.v_dim = num_heads, kv_rank, v_dim
        self.nope_dim, self.rope_dim, self.rotary_dim = nope_dim, rope_dim, rope_dim
        self.scale = width**-0.5 if scale is None else scale
        self.dropout, self.kernel, self.layer = dropout, kernel, layer

    def forward(self, x: Tensor, ctx: "Context") -> Tensor:
        q = self.q(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        plain, turned = q.split([self.nope_dim, self.rope_dim], -1)
        latent, key = self.kv_down(x)[:, None].split([self.kv_rank, self.rope_dim], -1)
        if ctx.rope is not None:
            turned, key = rotate(turned, ctx.rope), rotate(key, ctx.rope)
        kept = torch.cat([self.kv_norm(latent), key], -1)
        if ctx.cache is not None:
            (kept,) = ctx.cache.append(self.layer, kept)
        read = self.naive if kept.shape[2] == x.shape[1] else self.absorbed
        return self.proj(read(plain, turned, kept, ctx).transpose(1, 2).flatten(2))

    def naive(self, plain: Tensor, turned: Tensor, kept: Tensor, ctx: "Context") -> Tensor:
        """Queries (B, H, L, nope), (B, H, L, rope) and what is kept (B, 1, S, R + rope) -> (B, H, L, v)."""
        latent, key = kept.split([self.kv_rank, self.rope_dim], -1)
        k, v = self.kv_up(latent[:, 0]).unflatten(-1, (self.num_heads, -1)).transpose(1, 2).split(
            [self.nope_dim, self.v_dim], -1
        )  # fmt: skip
        k = torch.cat([k, key.expand(-1, self.num_heads, -1, -1)], -1)
        return self._attend(torch.cat([plain, turned], -1), k, v, ctx)

    def absorbed(self, plain: Tensor, turned: Tensor, kept: Tensor, ctx: "Context") -> Tensor:
        """The same as `naive`, with the keys' matrix applied to the queries and the values' to the result."""
        of_keys, of_values = self.kv_up.weight.unflatten(0, (self.num_heads, -1)).split([self.nope_dim, self.v_dim], 1)
        q = torch.cat([plain @ of_keys.to(plain.dtype), turned], -1)
        out = self._attend(q, kept, kept[..., : self.kv_rank], ctx)
        return out @ of_values.to(out.dtype).mT

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, ctx: "Context") -> Tensor:
        return attend(
            q, k, v,
            ctx.mask,
            bias=ctx.bias_of(k.shape[2]),
            scale=self.scale,
            dropout_p=self.dropout if self.training else 0.0,
            kernel=self.kernel,
        )  # fmt: skip
