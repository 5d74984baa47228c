"""The one way randomness is tied to seed, step, rank and sample, so that a resumed run repeats its numbers."""

import random

import numpy as np
import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN, _MIX1, _MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def fold(seed: int, *ints: int) -> int:
    """Fold integers into a seed, giving a non-negative 63-bit seed (splitmix64 finaliser; Steele et al., 2014)."""
    z = seed & _MASK
    for i in ints:
        z = (z + _GOLDEN * ((i & _MASK) + 1)) & _MASK
        z = ((z ^ (z >> 30)) * _MIX1) & _MASK
        z = ((z ^ (z >> 27)) * _MIX2) & _MASK
        z ^= z >> 31
    return z >> 1


def seed_all(seed: int) -> None:
    """Seed torch on every device, NumPy (timm's Mixup draws from it) and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x


def _mix(z: Tensor) -> Tensor:
    """splitmix64 finaliser on int64 tensors; products wrap as in C, shifts are made logical by masking."""
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * _signed(_MIX1)
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * _signed(_MIX2)
    return z ^ ((z >> 31) & ((1 << 33) - 1))


def uniform(seed: int, position: Tensor, draws: int) -> Tensor:
    """(B,) int64 positions -> (B, draws) float64 in [0, 1): the draws of a sample depend on (seed, position) alone.

    The same numbers come out on every device, in any batch and in any worker.
    """
    base = _mix(position.to(torch.int64) * _signed(_GOLDEN) + _signed(fold(seed, 0x5EED)))
    step = torch.arange(1, draws + 1, device=position.device, dtype=torch.int64) * _signed(_GOLDEN)
    bits = _mix(base[:, None] + step[None])
    return ((bits >> 11) & ((1 << 53) - 1)).double() * 2.0**-53
