"""Which tokens are seen: always index tensors, never boolean maps. (Who may attend to whom is `nn/mask.py`.)"""

import torch
from torch import Tensor


def random_mask(noise: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """Split N tokens per sample by noise (B, N) -> keep (B, K) of the lowest and drop (B, N - K).

    K = int(N * (1 - ratio)), as MAE counts.
    """
    order = noise.argsort(1)
    kept = int(noise.shape[1] * (1 - ratio))
    return order[:, :kept], order[:, kept:]


def take(x: Tensor, index: Tensor) -> Tensor:
    """(B, N, D), (B, K) int64 -> (B, K, D)."""
    return x.flatten(0, 1).index_select(0, _rows(index, x.shape[1])).unflatten(0, index.shape)


def put_back(kept: Tensor, keep: Tensor, fill: Tensor, N: int) -> Tensor:
    """Inverse of `take`: kept (B, K, D) at keep (B, K), every other of the N places holds `fill` (D)."""
    holes = fill.to(kept.dtype).expand(len(kept) * N, -1)
    return holes.index_copy(0, _rows(keep, N), kept.flatten(0, 1)).unflatten(0, (len(kept), N))


def _rows(index: Tensor, N: int) -> Tensor:
    """(B, K) places among N -> (B * K) rows of the batch laid out flat: whole rows move at once, unlike with gather."""
    return (index + torch.arange(len(index), device=index.device)[:, None] * N).flatten()
