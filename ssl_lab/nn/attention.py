"""Multi-head attention: projections, optional head norms and rotation, then the one door `attend`."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ssl_lab.nn.attend import attend
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
        cross: bool = False,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        qk_norm: Callable[[int], nn.Module] | None = None,
        dropout: float = 0.0,
        kernel: str = "auto",
        layer: int = 0,
    ) -> None:
        super().__init__()
        num_kv_heads = num_kv_heads or num_heads
        if dim % num_heads or num_heads % num_kv_heads:
            raise ValueError(
                f"dim={dim} must be a multiple of num_heads={num_heads}, and that of num_kv_heads={num_kv_heads}"
            )
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, dim // num_heads
        kv_dim = num_kv_heads * self.head_dim
        if cross:
            self.q, self.kv = nn.Linear(dim, dim, qkv_bias), nn.Linear(dim, 2 * kv_dim, qkv_bias)
        else:
            self.qkv = nn.Linear(dim, dim + 2 * kv_dim, qkv_bias)
        self.proj = nn.Linear(dim, dim, proj_bias)
        self.q_norm = qk_norm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = qk_norm(self.head_dim) if qk_norm else nn.Identity()
        self.cross, self.dropout, self.kernel, self.layer = cross, dropout, kernel, layer

    def forward(self, x: Tensor, ctx: "Context") -> Tensor:
        q, k, v = self._project(x, ctx)
        q, k = self.q_norm(q), self.k_norm(k)
        if ctx.rope is not None and not self.cross:
            q, k = rotate(q, ctx.rope), rotate(k, ctx.rope)
        if ctx.cache is not None and not self.cross:
            k, v = ctx.cache.append(self.layer, k, v)
        mask = ctx.memory_mask if self.cross else ctx.mask
        out = attend(q, k, v, mask, dropout_p=self.dropout if self.training else 0.0, kernel=self.kernel)
        return self.proj(out.transpose(1, 2).flatten(2))

    def _project(self, x: Tensor, ctx: "Context") -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, L, Dh), keys and values (B, Hkv, S, Dh)."""
        if not self.cross:
            heads = self.qkv(x).unflatten(-1, (-1, self.head_dim))
            q, k, v = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], 2)
            return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if ctx.memory is None:
            raise ValueError("cross-attention needs Context.memory")
        q = self.q(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        k, v = self.kv(ctx.memory).unflatten(-1, (-1, self.head_dim)).transpose(1, 2).chunk(2, 1)
        return q, k, v
