"""Attention written out: the definition, and on CPU the fastest kernel for short sequences and for bf16."""

import torch
from torch import Tensor

from ssl_lab.nn.mask import AttnMask


def eager(q: Tensor, k: Tensor, v: Tensor, mask: AttnMask, scale: float, dropout_p: float) -> Tensor:
    """softmax(q k^T * scale) v, (B, H, L, Dh) and (B, Hkv, S, Dh) x2 -> (B, H, L, Dh).

    A query that may attend to nothing gives 0.
    """
    weights = attention_map(q, k, mask, scale, dropout_p)
    return torch.bmm(weights.flatten(0, 1), _per_query(v, q.shape[1]).flatten(0, 1)).unflatten(0, q.shape[:2])


def attention_map(q: Tensor, k: Tensor, mask: AttnMask, scale: float, dropout_p: float = 0.0) -> Tensor:
    """Attention weights (B, H, L, S); torch's softmax computes half precision in float32 and rounds once."""
    scores = _scaled_product(q.flatten(0, 1), _per_query(k, q.shape[1]).flatten(0, 1), scale).unflatten(0, q.shape[:2])
    allowed = mask.dense(q.shape[2], k.shape[2], q.device)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    weights = scores.softmax(-1)
    if allowed is not None and not mask.plain:  # only then can a row be empty: softmax over -inf is NaN
        weights = weights.masked_fill(~allowed.any(-1, keepdim=True), 0.0)
    return torch.dropout(weights, dropout_p, dropout_p > 0)


def _scaled_product(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """q k^T * scale, (N, L, Dh) and (N, S, Dh) -> (N, L, S); the scale costs no pass of its own."""
    return torch.baddbmm(q.new_empty(()), q, k.transpose(1, 2), beta=0, alpha=scale)


def _per_query(x: Tensor, num_heads: int) -> Tensor:
    """Repeat each key/value head for the query heads of its group: (B, Hkv, S, Dh) -> (B, H, S, Dh)."""
    groups = num_heads // x.shape[1]
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)
