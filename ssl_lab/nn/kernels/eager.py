"""Attention written out: the definition, and on CPU the fastest kernel for short sequences and for bf16."""

import torch
from torch import Tensor

from ssl_lab.nn.mask import AttnMask


def eager(
    q: Tensor, k: Tensor, v: Tensor, mask: AttnMask, scale: float, dropout_p: float, bias: Tensor | None = None
) -> Tensor:
    """softmax(q k^T * scale + bias) v, (B, H, L, Dh), (B, Hkv, S, Dh), (B, Hkv, S, Dv) -> (B, H, L, Dv).

    A query that may attend to nothing gives 0.
    """
    weights = attention_map(q, k, mask, scale, dropout_p, bias)
    return _per_head(weights, v)


def attention_map(
    q: Tensor, k: Tensor, mask: AttnMask, scale: float, dropout_p: float = 0.0, bias: Tensor | None = None
) -> Tensor:
    """Attention weights (B, H, L, S); torch's softmax computes half precision in float32 and rounds once."""
    scores = _scores(q, k, scale)
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    allowed = mask.dense(q.shape[2], k.shape[2], q.device)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    weights = scores.softmax(-1)
    if allowed is not None and mask.may_be_empty:  # softmax over -inf is NaN
        weights = weights.masked_fill(~allowed.any(-1, keepdim=True), 0.0)
    return torch.dropout(weights, dropout_p, True) if dropout_p > 0 else weights


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """q k^T * scale -> (B, H, L, S); the scale costs no pass of its own, nor do shared key heads a copy."""
    (B, H, L, Dh), groups = q.shape, k.shape[1]
    rows = q.flatten(0, 1) if groups == H else q.reshape(B * groups, -1, Dh)
    out = torch.baddbmm(q.new_empty(()), rows, k.flatten(0, 1).transpose(1, 2), beta=0, alpha=scale)
    return out.view(B, H, L, k.shape[2])


def _per_head(weights: Tensor, v: Tensor) -> Tensor:
    """Weights (B, H, L, S) times values (B, Hkv, S, Dv) -> (B, H, L, Dv)."""
    (B, H, L, S), groups = weights.shape, v.shape[1]
    rows = weights.flatten(0, 1) if groups == H else weights.reshape(B * groups, -1, S)
    return torch.bmm(rows, v.flatten(0, 1)).view(B, H, L, v.shape[-1])
