"""Residual, Block, Transformer: the core under every modality. Only the stem and the recipe of a block differ."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from timm.layers import DropPath, LayerScale
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ssl_lab.errors import UserError
from ssl_lab.nn.attend import KernelName
from ssl_lab.nn.attention import Attention
from ssl_lab.nn.cache import KVCache
from ssl_lab.nn.dropout import dropout
from ssl_lab.nn.ffn import ACTIVATIONS, MLP, Activation
from ssl_lab.nn.mask import FULL, AttnMask
from ssl_lab.nn.masking import take
from ssl_lab.nn.rope import Rope

NormType = Callable[[int], nn.Module]


@dataclass(eq=False)
class Context:
    """All that a sublayer may need besides x, made once per forward."""

    mask: AttnMask = FULL
    rope: Rope | None = None
    memory: Tensor | None = None  # (B, S, D) for cross-attention
    memory_mask: AttnMask = FULL
    bias: Tensor | None = None  # (1 | B, H, L, S) added to the scaled scores of self-attention (ALiBi, T5)
    waves: Tensor | None = None  # (2 L - 1, D) of the distances L - 1 .. 1 - L, see `ssl_lab.nn.relative`
    cache: KVCache | None = None
    real: Tensor | None = None  # (B, L) bool, tokens that are no padding, where the mask has no need to tell them
    rows: Tensor | None = None  # (B, M) int64, the only positions that self-attention answers for; see Block.narrows

    def bias_of(self, keys: int) -> Tensor | None:
        """The bias of the last `keys` positions: a cache with a window has dropped the others."""
        return None if self.bias is None else self.bias[..., -keys:]

    def asked(self, rows: Tensor, length: int) -> "Context":
        """The context of a block of which only `rows` (B, M) of `length` positions are wanted.

        A single position under a causal mask is one that sees all keys up to its own.
        """
        mask = self.mask
        if mask.causal and rows.shape[1] == 1 and mask.window is None and mask.prefix is None and mask.chunk is None:
            seen = torch.arange(length, device=rows.device) <= rows
            mask = replace(mask, causal=False, valid=seen if mask.valid is None else seen & mask.valid)
        return replace(self, mask=mask, rows=rows)


class Residual(nn.Module):
    """x + drop_path(gain * scale * dropout(fn(norm(x)))), or norm(x + ...) with place="post"; (B, L, D) -> (B, L, D).

    Args:
        dim: width D.
        fn: the sublayer; it is called with (x, ctx) if it says `takes_context`, else with x.
        norm: makes the norm from D.
        place: norm before the sublayer, or after the sum.
        scale: constant factor of the branch (1/2 for a Conformer's feed-forwards).
        layer_scale: initial value of a learned per-channel gain (CaiT, arXiv:2103.17239); None = no gain.
        gate: a learned scalar tanh gate that starts closed (Flamingo, arXiv:2204.14198).
        drop_path: probability of dropping the branch of a sample (arXiv:1603.09382).
        dropout: probability of dropping an element of the branch's output.
    """

    def __init__(
        self,
        dim: int,
        fn: nn.Module,
        *,
        norm: NormType = nn.LayerNorm,
        place: Literal["pre", "post"] = "pre",
        scale: float = 1.0,
        layer_scale: float | None = None,
        gate: bool = False,
        drop_path: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.dim, self.norm, self.fn = dim, norm(dim), fn
        self.place, self.scale, self.dropout = place, scale, dropout
        self.layer_scale = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.gate = nn.Parameter(torch.zeros(())) if gate else None
        self.adapter: nn.Module | None = None  # after the sublayer, see `ssl_lab.nn.adapters`
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.takes_context = bool(getattr(fn, "takes_context", False))

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        branch = self.norm(x) if self.place == "pre" else x
        branch = self.fn(branch, ctx) if self.takes_context else self.fn(branch)
        if self.adapter is not None:
            branch = self.adapter(branch)
        branch = self.layer_scale(branch)
        branch = dropout(branch, self.dropout, self.training)
        if self.gate is not None:
            branch = branch * self.gate.tanh()
        if self.takes_context and ctx.rows is not None:
            x = take(x, ctx.rows)
        branch = self.drop_path(branch).to(x.dtype)  # a float32 gain must not widen a bf16 stream
        x = torch.add(x, branch, alpha=self.scale)
        return x if self.place == "pre" else self.norm(x)


class Block(nn.ModuleDict):
    """An ordered, named list of residuals, e.g. `Block(attn=Residual(...), mlp=Residual(...))`.

    It is the unit of compilation, activation checkpointing and sharding.
    """

    checkpointing: bool = False

    def __init__(self, **residuals: Residual) -> None:
        super().__init__(residuals)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled() and self._keeps(x, ctx):
            return checkpoint(self._run, x, ctx, use_reentrant=False)
        return self._run(x, ctx)

    def _keeps(self, x: Tensor, ctx: Context) -> bool:
        """Whether activations are kept for a gradient: a frozen block, in eval mode, may hand one through."""
        inputs = (x, ctx.memory, ctx.bias, *self.parameters())
        return ctx.cache is None and any(t is not None and t.requires_grad for t in inputs)

    def narrows(self, ctx: Context) -> bool:
        """Whether `ctx.rows` may be set: every other output of the block can then be left out of the work.

        It begins with self-attention, whose keys do not depend on who asks, and what follows looks at one position.
        """
        first, *rest = (residual.fn for residual in self.values())
        if not isinstance(first, Attention) or first.cross or not all(hasattr(fn, "per_position") for fn in rest):
            return False
        mask = ctx.mask
        return not mask.causal and all(t is None for t in (mask.segments, mask.window, ctx.rope, ctx.bias, ctx.cache))

    def _run(self, x: Tensor, ctx: Context) -> Tensor:
        for residual in self.values():
            x = residual(x, ctx)
        return x


class Transformer(nn.Module):
    """`depth` blocks and a final norm. A backbone is a Transformer with a stem: it says `forward`, this says `encode`.

    Args:
        block: makes the block of layer i; called with layer=i.
        depth: number of blocks.
        dim: width D.
        norm: makes the final norm from D.

    Attributes:
        fp32_residual: under autocast keep the sum over blocks in float32 as torch's autocast does by itself; else it is
            held in the autocast dtype, which saves half of the traffic and most casts (`docs/performance.md`).
    """

    fp32_residual: bool = False

    def __init__(self, block: Callable[..., Block], depth: int, dim: int, *, norm: NormType = nn.LayerNorm) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block(layer=i) for i in range(depth))
        self.norm = norm(dim)

    def encode(
        self, x: Tensor, ctx: Context, layers: Sequence[int] = (), rows: Tensor | None = None
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """(B, L, D) -> output before the norm, and the outputs of the blocks in `layers` (negative = from the end).

        With `rows` (B, M) the output is (B, M, D), and the last block does no work for other positions if it can.

        Raises:
            UserError: a layer that does not exist.
        """
        if torch.is_autocast_enabled(x.device.type) and not self.fp32_residual:
            x = x.to(torch.get_autocast_dtype(x.device.type))
        wanted = places(layers, len(self.blocks))
        hidden: dict[int, Tensor] = {}
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            if i == last and rows is not None and i not in wanted.values() and isinstance(block, Block):
                asked = ctx.asked(rows, x.shape[1])
                if block.narrows(asked):
                    return block(x, asked), hidden
            x = block(x, ctx)
            hidden.update((name, x) for name, place in wanted.items() if place == i)
        return x if rows is None else take(x, rows), hidden


def places(layers: Sequence[int], depth: int, where: str = "layers") -> dict[int, int]:
    """Where each of `layers` (negative = from the end) stands among `depth` blocks, from 0 on.

    Raises:
        UserError: a layer that does not exist; `where` names the setting.
    """
    if wrong := [i for i in layers if not -depth <= i < depth]:
        raise UserError(f"{where}={wrong[0]}: there are {depth} blocks; the last is -1")
    return {i: i % depth for i in layers}


_layer_norm: NormType = functools.partial(nn.LayerNorm, eps=1e-6)


def encoder_block(
    dim: int,
    num_heads: int,
    *,
    mlp_ratio: float = 4.0,
    norm: NormType = _layer_norm,
    qk_norm: NormType | None = None,
    layer_scale: float | None = None,
    act: Activation = "gelu",
    drop_path: float = 0.0,
    kernel: KernelName = "auto",
    layer: int = 0,
) -> Block:
    """The pre-norm recipe of ViT and its kin: attention, then an MLP of `mlp_ratio` times the width.

    CLIP's blocks have norms with an epsilon of 1e-5 and, in OpenAI's weights, `act="quick_gelu"`; SigLIP's "gelu_tanh".
    """
    attention = Attention(dim, num_heads, qk_norm=qk_norm, kernel=kernel, layer=layer)
    mlp = MLP(dim, int(dim * mlp_ratio), act=ACTIVATIONS[act])
    return Block(
        attn=Residual(dim, attention, norm=norm, layer_scale=layer_scale, drop_path=drop_path),
        mlp=Residual(dim, mlp, norm=norm, layer_scale=layer_scale, drop_path=drop_path),
    )
