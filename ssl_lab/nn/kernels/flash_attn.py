"""FlashAttention-2 of the package flash-attn (Dao, 2023, arXiv:2307.08691): windows, packed rows and dropout."""

import importlib
from typing import Any

import torch
from torch import Tensor

from ssl_lab.nn.kernels.case import Case, absent, fused
from ssl_lab.nn.kernels.packed import flat, inexpressible, span, unflat
from ssl_lab.nn.mask import AttnMask

MODULE = "flash_attn.flash_attn_interface"  # flash_attn alone may be the package of FlashAttention-4


def flash_attn(
    q: Tensor, k: Tensor, v: Tensor, mask: AttnMask, scale: float, dropout_p: float, bias: Tensor | None = None
) -> Tensor:
    """(B, H, L, Dh), (B, Hkv, S, Dh) x2 -> (B, H, L, Dh). The package counts causal positions from the end, as we do.

    Its backward sums in an order that varies unless torch is told to be deterministic.
    """
    assert bias is None
    package: Any = importlib.import_module(MODULE)
    options = {
        "dropout_p": dropout_p,
        "softmax_scale": scale,
        "causal": mask.causal,
        "window_size": span(mask),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    if mask.segments is None:
        out: Tensor = package.flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), **options)
        return out.transpose(1, 2)
    assert q.shape[2] == k.shape[2]
    bounds, longest = mask.cu_seqlens()
    out = package.flash_attn_varlen_func(flat(q), flat(k), flat(v), bounds, bounds, longest, longest, **options)
    return unflat(out, len(q))


def refuses(case: Case) -> str | None:
    """None when this kernel can serve, else the reason."""
    remedy = "pip install flash-attn --no-build-isolation"
    return fused(case) or inexpressible(case) or absent(MODULE, remedy)
