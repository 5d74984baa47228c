"""Multi-head attention: projections, optional head norms and rotation, then the one door `attend`."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ssl_lab.nn.attend import KernelName, attend
from ssl_lab.nn.linear import Linear
from ssl_lab.nn.masking import take
from ssl_lab.nn.rope import rotate

if TYPE_CHECKING:
    from ssl_lab.nn.block import Context


class Attention(nn.Module):
    """Self-attention, or cross-attention to `ctx.memory`, (B, L, D) -> (B, L, D).

    With fewer key/value heads than query heads (grouped-query attention, arXiv:2305.13245; one = multi-query) each of
    them serves `num_heads // num_kv_heads` neighbouring query heads.

    Args:
        dim: width D.
        num_heads: query heads H.
        num_kv_heads: key/value heads, H by default.
        head_dim: width Dh of a head, D / H by default.
        scale: constant factor on the scores, Dh ** -0.5 by default (T5: 1).
        cross: keys and values come from `ctx.memory`.
        qkv_bias: biases of the input projections.
        proj_bias: bias of the output projection.
        qk_norm: norm of queries and keys per head, e.g. `functools.partial(nn.LayerNorm, eps=1e-6)`.
        dropout: dropout of attention weights.
        kernel: see `attend`.
        layer: index for the key-value cache.
    """

    takes_context = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        scale: float | None = None,
        cross: bool = False,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        qk_norm: Callable[[int], nn.Module] | None = None,
        dropout: float = 0.0,
        kernel: KernelName = "auto",
        layer: int = 0,
    ) -> None:
        super().__init__()
        num_kv_heads = num_kv_heads or num_heads
        if (head_dim is None and dim % num_heads) or num_heads % num_kv_heads:
            raise ValueError(
                f"dim={dim} must be a multiple of num_heads={num_heads}, and that of num_kv_heads={num_kv_heads}"
            )
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim or dim // num_heads
        q_dim, kv_dim = num_heads * self.head_dim, num_kv_heads * self.head_dim
        if cross:
            self.q, self.kv = Linear(dim, q_dim, qkv_bias), Linear(dim, 2 * kv_dim, qkv_bias)
        else:
            self.qkv = Linear(dim, q_dim + 2 * kv_dim, qkv_bias)
        self.proj = Linear(q_dim, dim, proj_bias)
        self.q_norm = qk_norm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = qk_norm(self.head_dim) if qk_norm else nn.Identity()
        self.prefix: nn.Module | None = None  # learned keys and values, see `ssl_lab.nn.prefix`
        self.rotary_dim = self.head_dim
        self.qk_norm, self._counts = qk_norm is not None, (num_heads, num_kv_heads, num_kv_heads)
        self.cross, self.scale, self.dropout, self.kernel, self.layer = cross, scale, dropout, kernel, layer

    def forward(self, x: Tensor, ctx: "Context") -> Tensor:
        heads = self._project(x, ctx)
        q, k, v = heads.split_with_sizes(self._counts, 1) if isinstance(heads, Tensor) else heads
        q, k = self.q_norm(q), self.k_norm(k)
        if ctx.rope is not None and not self.cross:
            if isinstance(heads, Tensor) and not self.qk_norm:  # both in one go: fewer steps per token
                q, k = rotate(heads[:, : -self.num_kv_heads], ctx.rope).split_with_sizes(self._counts[:2], 1)
            else:
                q, k = rotate(q, ctx.rope), rotate(k, ctx.rope)
        if ctx.cache is not None and not self.cross:
            k, v = ctx.cache.append(self.layer, k, v)
        mask, bias = (ctx.memory_mask, None) if self.cross else (ctx.mask, ctx.bias_of(k.shape[2]))
        if self.prefix is not None:
            k, v, mask, bias = self.prefix(k, v, mask, bias)
        out = attend(
            q, k, v,
            mask,
            bias=bias,
            scale=self.scale,
            dropout_p=self.dropout if self.training else 0.0,
            kernel=self.kernel,
        )  # fmt: skip
        return self.proj(out.transpose(1, 2).flatten(2))

    def _project(self, x: Tensor, ctx: "Context") -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values in one (B, H + 2 Hkv, L, Dh), or (B, H, L, Dh) and (B, Hkv, S, Dh) twice."""
        if self.cross:
            k, v = (
                self._of_memory(ctx) if ctx.cache is None else ctx.cache.fixed(self.layer, lambda: self._of_memory(ctx))
            )
            return self._heads(self.q(x)), k, v
        if ctx.rows is None:
            return self._heads(self.qkv(x))
        width = self.num_heads * self.head_dim
        k, v = self._heads(self.qkv.rows(x, width)).chunk(2, 1)
        return self._heads(self.qkv.rows(take(x, ctx.rows), 0, width)), k, v

    def _of_memory(self, ctx: "Context") -> tuple[Tensor, ...]:
        """Keys and values (B, Hkv, S, Dh) of `ctx.memory`."""
        if ctx.memory is None:
            raise ValueError("cross-attention needs Context.memory")
        return self._heads(self.kv(ctx.memory)).chunk(2, 1)

    def _heads(self, x: Tensor) -> Tensor:
        """(B, L, H * Dh) -> (B, H, L, Dh)."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
