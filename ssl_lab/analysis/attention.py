"""Where the class token of the last block looks, head by head."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ssl_lab.analysis.pictures import grid_of
from ssl_lab.errors import UserError
from ssl_lab.nn.attention import Attention
from ssl_lab.nn.block import Transformer
from ssl_lab.nn.kernels.eager import attention_map
from ssl_lab.nn.relative import RelativeAttention
from ssl_lab.nn.rope import rotate
from ssl_lab.types import Encoded

_HEAT = ((8, 5, 30), (90, 20, 110), (190, 55, 85), (245, 140, 30), (252, 250, 165))  # dark = 0 to light = 1


@torch.no_grad()
def attention_weights(encoder: nn.Module, image: Tensor, layer: int = -1, **more: Any) -> tuple[Tensor, Encoded]:
    """Images (B, C, H, W) -> self-attention weights (B, heads, L, L) of a block, and what the encoder gave.

    The fused kernels never form the weights, so queries and keys are caught on their way into the kernel and
    softmax(scale * q k^T + bias) is computed from them, in float32 at least. Rows and columns are the tokens of the
    block, prefix first; dropout and the columns of a tuned prefix, which are no tokens, are left out. The encoder runs
    in its present mode; the caller sets eval mode and autocast. `more` are further arguments of the encoder, which may
    be a decoder of embedded tokens (B, L, D).

    Raises:
        UserError: the block has no self-attention of ours.
    """
    attention = _attention(encoder, layer)
    caught: dict[str, Any] = {}
    hooks = [
        attention.register_forward_pre_hook(lambda _, args: caught.update(ctx=args[1])),
        attention.q_norm.register_forward_hook(lambda *call: caught.update(q=call[2])),
        attention.k_norm.register_forward_hook(lambda *call: caught.update(k=call[2])),
    ]
    try:
        encoded: Encoded = encoder(image, **more)
    finally:
        for hook in hooks:
            hook.remove()
    q, k, ctx = (caught[name] for name in ("q", "k", "ctx"))
    if ctx.rope is not None:
        q, k = rotate(q, ctx.rope), rotate(k, ctx.rope)
    tokens, mask, bias = k.shape[2], ctx.mask, ctx.bias
    if attention.prefix is not None:
        k, _, mask, bias = attention.prefix(k, k, mask, bias)
    scale = q.shape[-1] ** -0.5 if attention.scale is None else attention.scale
    dtype = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        weights = attention_map(q.to(dtype), k.to(dtype), mask, scale, bias=bias)
    return weights[..., -tokens:], encoded


@torch.no_grad()
def attention_maps(encoder: nn.Module, image: Tensor, layer: int = -1) -> Tensor:
    """Images (B, C, H, W) -> weights on the patches (B, heads, rows, columns) float, each map between 0 and 1.

    The query is the class token, or the mean over all patches where there is none. Keys that are no patches (class and
    register tokens) are left out, so a map may sum to less than 1.

    Raises:
        UserError: no self-attention of ours, or tokens that form no grid.
    """
    weights, encoded = attention_weights(encoder, image, layer)
    N = encoded.tokens.shape[1]
    prefix = weights.shape[-1] - N
    rows, columns = grid_of(encoder, N, image)
    query = weights[:, :, 0] if encoded.has_cls else weights[:, :, prefix:].mean(2)
    return query[:, :, prefix:].unflatten(2, (rows, columns))


def heat(maps: Tensor, size: Sequence[int]) -> Tensor:
    """(..., rows, columns) >= 0 -> colours (..., 3, H, W) uint8 from dark (0) to light (each map's largest value).

    Every value becomes a block of H / rows x W / columns pixels.
    """
    x = maps.double()
    x = x / x.amax((-2, -1), keepdim=True).clamp(min=1e-300)
    stops = torch.tensor(_HEAT, dtype=torch.float64, device=maps.device)
    place = x * (len(_HEAT) - 1)
    low = place.long().clamp(max=len(_HEAT) - 2)
    colours = torch.lerp(stops[low], stops[low + 1], (place - low)[..., None]).round().to(torch.uint8)
    H, W = size
    out = colours.movedim(-1, -3)
    return out.repeat_interleave(H // maps.shape[-2], -2).repeat_interleave(W // maps.shape[-1], -1)


def _attention(encoder: nn.Module, layer: int) -> Attention:
    """The self-attention of a block."""
    if not isinstance(encoder, Transformer):
        raise UserError(f"{type(encoder).__name__} has no blocks of ours, whose attention could be shown")
    found = [m for m in encoder.blocks[layer].modules() if isinstance(m, Attention) and not m.cross]
    found = [m for m in found if not isinstance(m, RelativeAttention)]  # its scores are more than q k^T
    if not found:
        raise UserError(f"block {layer} of {type(encoder).__name__} has no self-attention whose weights can be shown")
    return found[0]
