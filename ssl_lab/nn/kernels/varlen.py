"""torch's attention over sequences of any lengths laid end to end: packed rows without a mask and without waste."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ssl_lab.nn.kernels.case import Case, fused
from ssl_lab.nn.kernels.packed import flat, inexpressible, span, unflat
from ssl_lab.nn.mask import AttnMask


def varlen(
    q: Tensor, k: Tensor, v: Tensor, mask: AttnMask, scale: float, dropout_p: float, bias: Tensor | None = None
) -> Tensor:
    """(B, H, L, Dh), (B, Hkv, S, Dh) x2 -> (B, H, L, Dh).

    A row without `segments` is one sequence, so batches with and without packed documents may take turns. Padding that
    has an id of its own is a document like any other.
    """
    assert bias is None and dropout_p == 0
    from torch.nn.attention.varlen import varlen_attn

    (rows, heads, queries, _), keys = q.shape, k.shape[2]
    if mask.segments is not None:
        assert queries == keys
        of_q, longest_q = mask.cu_seqlens()
        of_k, longest_k = of_q, longest_q
    else:
        of_q, longest_q = _whole(rows, queries, q.device), queries
        of_k, longest_k = (of_q if queries == keys else _whole(rows, keys, q.device)), keys
    options: dict[str, Any] = {"scale": scale, "window_size": span(mask)}
    if k.shape[1] != heads:
        if _shares_heads(varlen_attn):
            options["enable_gqa"] = True
        else:  # torch 2.11
            k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    out = varlen_attn(flat(q), flat(k), flat(v), of_q, of_k, longest_q, longest_k, **options)
    assert isinstance(out, Tensor)
    return unflat(out, rows)


def refuses(case: Case) -> str | None:
    """None when this kernel can serve, else the reason."""
    if case.dropout_p > 0:
        return "torch's varlen attention has no dropout"
    return fused(case, multiple=8) or inexpressible(case)


def _whole(rows: int, length: int, device: torch.device) -> Tensor:
    """(rows + 1,) int32 beginnings of sequences of one length, and the end."""
    return torch.arange(0, (rows + 1) * length, length, dtype=torch.int32, device=device)


@functools.cache
def _shares_heads(function: Callable[..., Any]) -> bool:
    """Whether it takes fewer key heads than query heads (from torch 2.12 on)."""
    return "enable_gqa" in inspect.signature(function).parameters
