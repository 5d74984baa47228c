"""FlexAttention: masks that are not plain, without a dense matrix of them."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ssl_lab.nn.kernels.case import Case
from ssl_lab.nn.mask import AttnMask


@functools.cache
def _flex(compiled: bool) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    run: Callable[..., Any] = flex_attention
    return torch.compile(run, dynamic=False) if compiled else run


def flex(
    q: Tensor, k: Tensor, v: Tensor, mask: AttnMask, scale: float, dropout_p: float, bias: Tensor | None = None
) -> Tensor:
    """(B, H, L, Dh), (B, Hkv, S, Dh) x2 -> (B, H, L, Dh). Compiled on an accelerator, interpreted on CPU.

    `bias` must be None: `attend` refuses one, and `auto` never sends one here.
    """
    assert bias is None
    blocks = mask.blocks(q.shape[2], k.shape[2], q.device)
    run = _flex(q.device.type != "cpu" and not torch.compiler.is_compiling())
    out: Tensor = run(q, k, v, block_mask=blocks, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out


def refuses(case: Case) -> str | None:
    """None when this kernel can serve, else the reason."""
    if case.dropout_p > 0:
        return "FlexAttention has no dropout"
    if case.device.type == "cpu" and torch.is_grad_enabled():
        return "FlexAttention has no backward on CPU"
    return None
