"""torch's scaled_dot_product_attention: all backends, or one of them by name."""

import contextlib
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ssl_lab.nn.kernels.case import Case, not_half, off_cuda, too_wide
from ssl_lab.nn.mask import AttnMask

Backend = Literal["flash", "efficient", "cudnn", "math"]

BACKENDS: dict[Backend, SDPBackend] = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: AttnMask,
    scale: float,
    dropout_p: float,
    bias: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """(B, H, L, Dh), (B, Hkv, S, Dh), (B, Hkv, S, Dv) -> (B, H, L, Dv); `backend` restricts torch's own choice."""
    H, L, S = q.shape[1], q.shape[2], k.shape[2]
    # torch counts causal positions from the start of both, we from their ends: the same only for L == S
    causal = mask.plain and mask.causal and L == S
    allowed = None if causal else mask.dense(L, S, q.device)
    empty = None
    if allowed is not None and mask.may_be_empty:
        empty = ~allowed.any(-1, keepdim=True)
        allowed = allowed | empty  # backends disagree on rows without a key: let them see all, then zero them
    if bias is not None:
        bias = bias.to(q.dtype)
        if causal:
            causal, allowed = False, mask.dense(L, S, q.device)
        allowed = bias if allowed is None else bias.masked_fill(~allowed, float("-inf"))
    folded = L == 1 and k.shape[1] != H and (allowed is None or allowed.shape[1] == 1)
    if folded:  # one query per head: the heads of a group are then queries of one head, and nothing is repeated
        q = q.view(len(q), k.shape[1], -1, q.shape[-1])
    with sdpa_kernel(BACKENDS[backend]) if backend else contextlib.nullcontext():
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=allowed, dropout_p=dropout_p, is_causal=causal and L > 1, scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
    if folded:
        out = out.reshape(len(q), H, 1, -1)
    return out if empty is None else torch.where(empty, out.new_zeros(()), out)


def refuses(case: Case, *, backend: Backend) -> str | None:
    """None when this backend can serve, else the reason."""
    if backend in ("efficient", "cudnn") and (reason := off_cuda(case)):
        return reason
    if backend in ("flash", "cudnn") and case.v_dim not in (None, case.head_dim):
        return f"its values are as wide as its keys, not {case.v_dim} beside {case.head_dim}"
    L, S = case.lengths or (1, 1)
    if backend == "flash" and case.device.type == "cuda" and case.mask.causal and 1 < L != S:
        return "torch's flash kernel counts causal positions from the start, which needs as many queries as keys"
    if backend in ("flash", "cudnn") and case.device.type == "cuda":
        plain = backend == "cudnn" or case.mask.plain
        return (
            not_half(case) or (None if plain else "flash attention takes only plain or causal masks") or too_wide(case)
        )
    if backend == "flash" and case.device.type == "cpu" and case.dropout_p > 0:
        return "the CPU flash kernel has no dropout"
    return None
