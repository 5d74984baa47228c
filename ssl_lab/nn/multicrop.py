"""Views of several sizes through one network."""

from collections.abc import Callable, Sequence
from itertools import groupby

import torch
from torch import Tensor


def by_size(network: Callable[[Tensor], Tensor], views: Sequence[Tensor]) -> list[Tensor]:
    """V views, each (B, C, Hv, Wv) -> V outputs of `network`, which runs once per group of neighbours of equal size."""
    out: list[Tensor] = []
    for _, group in groupby(views, key=lambda view: view.shape):
        same = list(group)
        out += network(torch.cat(same)).chunk(len(same)) if len(same) > 1 else [network(same[0])]
    return out
