"""Attention that knows distances as Transformer-XL and the Conformer do: by projected waves, with two learned biases.

Query i scores key j by ((q_i + u) . k_j + (q_i + v) . W r_(i - j)) / sqrt(Dh) (arXiv:1901.02860, section 3.3).
"""

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ssl_lab.nn.attend import KernelName, attend
from ssl_lab.nn.attention import Attention
from ssl_lab.nn.kernels.products import at_a_time, product
from ssl_lab.nn.linear import Linear
from ssl_lab.nn.mask import AttnMask

if TYPE_CHECKING:
    from ssl_lab.nn.block import Context

_LINES = 128  # queries whose products with distances are made together, so that they lie in the cache


class RelativeAttention(Attention):
    """Self-attention with relative positions, (B, L, D) -> (B, L, D); the position term is a score bias of `attend`.

    `Context.waves` are the waves r, made once for all layers; without them each layer makes its own.

    Args:
        dim: width D.
        num_heads: heads H.
        dropout: dropout of attention weights.
        kernel: see `attend`; one that takes a bias.
        layer: index of the layer.
    """

    def __init__(
        self, dim: int, num_heads: int, *, dropout: float = 0.0, kernel: KernelName = "auto", layer: int = 0
    ) -> None:
        super().__init__(dim, num_heads, dropout=dropout, kernel=kernel, layer=layer)
        self.distance = Linear(dim, dim, bias=False)
        self.u, self.v = (nn.Parameter(torch.empty(num_heads, self.head_dim)) for _ in range(2))
        nn.init.xavier_uniform_(self.u)
        nn.init.xavier_uniform_(self.v)

    def forward(self, x: Tensor, ctx: "Context") -> Tensor:
        rows, length, dim = x.shape
        waves = relative_waves(length, dim, device=x.device) if ctx.waves is None else ctx.waves
        far = self.distance(waves.to(x.dtype) * self.head_dim**-0.5)
        far = far.unflatten(-1, (self.num_heads, -1)).transpose(0, 1)
        add = torch.cat([self.u.flatten(), self.u.new_zeros(2 * dim)])  # u costs nothing as a bias of the projection
        heads = self._heads(self.qkv.rows(x, add=add))
        more = (self.v - self.u)[:, None]
        each = self.num_heads * length**2 * far.element_size()  # bytes of scores of a sample
        step = rows if x.device.type != "cpu" else at_a_time(rows, each)
        out = []
        for start, piece in zip(range(0, rows, step), heads.split(step), strict=True):
            q, k, v = piece.chunk(3, 1)
            mask = ctx.mask if step >= rows else _rows(ctx.mask, start, start + step)
            bias = position_bias(q + more.to(q.dtype), far)
            if self.prefix is not None:
                k, v, mask, bias = self.prefix(k, v, mask, bias)
            attended = attend(
                q, k, v, mask,
                bias=bias,
                overwrite_bias=True,
                dropout_p=self.dropout if self.training else 0.0,
                kernel=self.kernel,
            )  # fmt: skip
            out.append(attended.transpose(1, 2).flatten(2))
        return self.proj(torch.cat(out) if len(out) > 1 else out[0])


def relative_waves(length: int, dim: int, *, device: torch.device | str | None = None) -> Tensor:
    """(2 L - 1, D) float32: sines and cosines of the distances L - 1 ... 1 - L of a query from a key, alternating.

    A distance is positive where the key stands before the query.
    """
    rate = torch.exp(torch.arange(0, dim, 2, device=device, dtype=torch.float32) * (-math.log(10000.0) / dim))
    angle = torch.arange(length - 1, -length, -1, device=device, dtype=torch.float32)[:, None] * rate
    return torch.stack([angle.sin(), angle.cos()], 2).flatten(1)[:, :dim]


def position_bias(q: Tensor, far: Tensor) -> Tensor:
    """q (B, H, L, Dh) and projected distances (H, 2 L - 1, Dh) -> (B, H, L, L): of query i its product with i - j.

    A query is multiplied with all distances that it or its neighbours need, of which L are its own: a window that moves
    by one to the left with every query. It is read as a strided view, and written as one backward.
    """
    if torch.compiler.is_compiling():
        return _slid(q @ far.transpose(1, 2))
    out: Tensor = _PositionBias.apply(q, far)
    return out


def _slid(scores: Tensor) -> Tensor:
    """(..., L, 2 L - 1) -> (..., L, L) by slices and views, which a compiler understands."""
    length = scores.shape[-2]
    if length == 1:
        return scores
    return scores.flatten(-2)[..., length - 1 : -1].unflatten(-1, (length, -1))[..., :length]


class _PositionBias(torch.autograd.Function):
    """Some queries at a time, whose products stay in the cache and have less than 2 L columns, of the whole batch."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, far: Tensor) -> Tensor:
        ctx.save_for_backward(q, far)
        rows, heads, length, _ = q.shape
        bias = q.new_empty(rows, heads, length, length)
        for lines, near in _parts(length):
            scores = product(_by_head(q[:, :, lines]), far[:, near].transpose(1, 2))
            bias[:, :, lines] = _window(scores, rows, length)
        return bias

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        q, far = ctx.saved_tensors
        rows, heads, length, _ = q.shape
        into_q, into_far = torch.empty_like(q), far.new_zeros(heads, far.shape[2], far.shape[1])  # its transposed
        for lines, near in _parts(length):
            count = lines.stop - lines.start
            scores = grad.new_empty(heads, rows * count, length + count - 1)
            _clear_around_window(scores, rows, length)
            _window(scores, rows, length).copy_(grad[:, :, lines])
            into_q[:, :, lines] = product(scores, far[:, near]).unflatten(1, (rows, count)).transpose(0, 1)
            into_far[..., near] += product(_by_head(q[:, :, lines]).transpose(1, 2), scores)
        return into_q, into_far.transpose(1, 2)


def _parts(length: int) -> list[tuple[slice, slice]]:
    """Queries of about `_LINES` each, and the distances that they need."""
    step = -(-length // -(-length // _LINES))
    ends = [(start, min(start + step, length)) for start in range(0, length, step)]
    return [(slice(start, stop), slice(length - stop, 2 * length - 1 - start)) for start, stop in ends]


def _by_head(q: Tensor) -> Tensor:
    """(B, H, l, Dh) -> (H, B * l, Dh)."""
    return q.transpose(0, 1).flatten(1, 2)


def _window(scores: Tensor, rows: int, length: int) -> Tensor:
    """Scores (H, B * l, L + l - 1) of l queries, contiguous, as (B, H, l, L): line i from its column l - 1 - i on."""
    heads, lines, width = scores.shape
    lines //= rows
    strides = (lines * width, rows * lines * width, width - 1, 1)
    return scores.as_strided((rows, heads, lines, length), strides, lines - 1)


def _clear_around_window(scores: Tensor, rows: int, length: int) -> None:
    """Zeros outside of the window: before it, and between the end of one of its lines and the beginning of the next."""
    heads, lines, width = scores.shape
    lines //= rows
    items = scores.view(heads * rows, lines * width)
    items[:, : lines - 1] = 0
    items[:, -1] = 0
    items[:, lines - 1 : -1].unflatten(1, (lines, width - 1))[:, :, length:] = 0


def _rows(mask: AttnMask, start: int, stop: int) -> AttnMask:
    """The mask of some samples of the batch."""
    parts = {name: getattr(mask, name) for name in ("valid", "segments", "prefix", "everyone")}
    return replace(mask, **{name: part[start:stop] for name, part in parts.items() if part is not None})
