"""Shuffling BN (MoCo, arXiv:1911.05722, section 3.3): batch statistics must not tell which query a key belongs to."""

from collections.abc import Callable

import torch
from torch import Tensor

from ssl_lab import dist


@torch.no_grad()
def shuffled(encode: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """encode(x) of (B, ...), where each rank encodes B random ones of all ranks' samples; results return to their rank.

    Without gradient. The permutation is rank 0's. On one process it is `encode(x)`: there is one batch only.
    """
    if dist.world_size() == 1:
        return encode(x)
    everyone = dist.gather(x, grad=False)
    order = dist.broadcast(torch.randperm(len(everyone), device=x.device))
    mine = slice(dist.rank() * len(x), (dist.rank() + 1) * len(x))
    out = dist.gather(encode(everyone[order[mine]]), grad=False)
    return out[order.argsort()[mine]]
