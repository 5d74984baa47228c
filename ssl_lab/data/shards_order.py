"""The order in which a pass visits the rows of shards: a few shards at a time, for disks that read ahead.

Like the order of a table (`ssl_lab/data/stream.py`) it has no state: pass, group of shards and place in the group
follow from the position, and each permutation from (seed, pass, group).
"""

from functools import lru_cache

import torch
from torch import Tensor

from ssl_lab.rng import fold

_ORDER, _MIX = 0x5A4D, 0x5A4E


def row_order(position: Tensor, seed: int, sizes: tuple[int, ...], mix: int) -> Tensor:
    """(B,) int64 ascending positions -> (B,) int64 rows, those of shard i being numbered after those of shard i - 1.

    Position p lies in pass p // N over the N rows. A pass takes the shards in a random order, `mix` of them at a time,
    and the rows of these in a random order.
    """
    total = sum(sizes)
    rows = torch.empty_like(position)
    turn, place = position // total, position % total
    for t in range(int(turn[0]), int(turn[-1]) + 1):
        order, ends = _groups(seed, t, sizes, mix)
        here = turn == t
        wanted = place[here]
        group = torch.searchsorted(ends, wanted, right=True)
        found = torch.empty_like(wanted)
        for g in group.unique().tolist():
            inside = group == g
            first = int(ends[g - 1]) if g else 0
            members = tuple(order[g * mix : (g + 1) * mix].tolist())
            found[inside] = _mixed(seed, t, g, members, sizes)[wanted[inside] - first]
        rows[here] = found
    return rows


@lru_cache(maxsize=4)
def _groups(seed: int, turn: int, sizes: tuple[int, ...], mix: int) -> tuple[Tensor, Tensor]:
    """The shards in the order of a pass (S,) int64, and the place (groups,) int64 where each group ends."""
    order = torch.randperm(len(sizes), generator=torch.Generator().manual_seed(fold(seed, _ORDER, turn)))
    ends = torch.tensor(sizes)[order].cumsum(0)
    return order, ends[[min(i + mix, len(sizes)) - 1 for i in range(0, len(sizes), mix)]]


@lru_cache(maxsize=4)
def _mixed(seed: int, turn: int, group: int, members: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
    """(rows of the group,) int64: the rows of its shards in random order."""
    starts = _starts(sizes)
    rows = torch.cat([torch.arange(sizes[m]) + starts[m] for m in members])
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(fold(seed, _MIX, turn, group)))]


@lru_cache(maxsize=4)
def _starts(sizes: tuple[int, ...]) -> list[int]:
    return [0, *torch.tensor(sizes).cumsum(0).tolist()]
