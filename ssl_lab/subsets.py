"""Few rows of many, with equally many of each class."""

import torch
from torch import Tensor


def per_class(y: Tensor, fraction: float) -> int:
    """Classes (N,) -> rows of each class in a balanced share of them, round(fraction * N / classes)."""
    return round(fraction * len(y) / len(y.unique()))


def balanced(y: Tensor, fraction: float, seed: int) -> Tensor:
    """Classes (N,) -> ascending rows (M,) int64 of a seeded subset with `per_class` rows of each.

    A class that has fewer gives all it has. The draw of a smaller fraction lies within that of a larger one.
    """
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed)).to(y.device)
    return order[ranks(y[order]) < per_class(y, fraction)].sort().values


def ranks(y: Tensor) -> Tensor:
    """Classes (N,) -> (N,) int64, how many earlier rows have the same class."""
    order = y.argsort(stable=True)
    counts = y.unique(return_counts=True)[1]
    starts = (counts.cumsum(0) - counts).repeat_interleave(counts)
    return torch.empty_like(y).scatter_(0, order, torch.arange(len(y), device=y.device) - starts)
