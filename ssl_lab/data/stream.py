"""The endless training stream: which row stands at which position, and which positions form a batch.

Nothing here has a state. Position p lies in pass p // N over the N rows, each pass in an order of its own; batch k of
a rank is a fixed slice of positions. So a run that starts at step s reads what an uninterrupted run reads from step s
on, whatever the number of workers, ranks or accumulated batches.
"""

from functools import lru_cache

import torch
from torch import Tensor

from ssl_lab.rng import fold

_ORDER = 0x0D3  # keeps the draws of the order apart from those of the augmentation


@lru_cache(maxsize=4)  # two sets, and a batch touches two passes (more only if it is larger than the set)
def permutation(seed: int, turn: int, num_rows: int) -> Tensor:
    """(N,) int64: the order of the rows in pass number `turn`."""
    return torch.randperm(num_rows, generator=torch.Generator().manual_seed(fold(seed, _ORDER, turn)))


def rows_at(position: Tensor, seed: int, num_rows: int) -> Tensor:
    """(B,) int64 ascending positions of the stream -> (B,) int64 rows."""
    turn, place = position // num_rows, position % num_rows
    turns = range(int(turn[0]), int(turn[-1]) + 1)
    return torch.cat([permutation(seed, t, num_rows)[place[turn == t]] for t in turns])


def batch_positions(number: int, batch_size: int, rank: int = 0, world_size: int = 1) -> Tensor:
    """(B,) int64 positions of batch `number` of a rank; joined over the ranks they form one unbroken run."""
    first = (number * world_size + rank) * batch_size
    return torch.arange(first, first + batch_size)


def eval_rows(num_rows: int, limit: int | None = None, rank: int = 0, world_size: int = 1) -> Tensor:
    """(M,) int64: this rank's share of the rows, every world_size-th of them, the same number on each rank.

    `limit` keeps so many rows, evenly spread, so that a set sorted by class keeps all of them. Where the ranks do not
    divide the number, the first rows are repeated; whoever gathers drops a row it has already seen.
    """
    kept = num_rows if limit is None else min(limit, num_rows)
    rows = torch.arange(kept) * num_rows // kept
    padded = -(-kept // world_size) * world_size
    return rows[torch.arange(rank, padded, world_size) % kept]
