"""Features of a split: each row once, in order, whichever rank embedded it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ssl_lab import dist


@dataclass(frozen=True, slots=True)
class Features:
    """Features `x` (N, D) float32, classes `y` (N,) int64 (-1 = unlabelled), rows `index` (N,) int64, ascending."""

    x: Tensor
    y: Tensor
    index: Tensor

    def to(self, device: torch.device) -> "Features":
        """The same on another device."""
        return Features(self.x.to(device), self.y.to(device), self.index.to(device))

    def at(self, rows: Tensor) -> "Features":
        """Some of the rows: (M,) int64 places, or a boolean (N,)."""
        return Features(self.x[rows], self.y[rows], self.index[rows])

    def spread(self, count: int | None) -> "Features":
        """At most `count` rows, evenly spaced; None = all."""
        if count is None or count >= (N := len(self.y)):
            return self
        return self.at(torch.arange(count, device=self.y.device) * N // count)


def num_classes(*parts: Features) -> int:
    """One more than the largest class among them, at least 2."""
    return max(2, 1 + max(int(part.y.max()) for part in parts))


def gather_rows(x: Tensor, device: torch.device) -> Tensor:
    """(N, ...) of this rank -> the rows of all ranks, on the CPU. Ranks may hold different numbers of rows.

    `device` is the one that the process group can communicate on.
    """
    if dist.world_size() == 1:
        return x
    counts = dist.gather(torch.tensor([len(x)], device=device), grad=False).tolist()
    padded = torch.zeros(max(counts), *x.shape[1:], dtype=x.dtype, device=device)
    padded[: len(x)] = x.to(device)
    parts = torch.split(dist.gather(padded, grad=False).cpu(), max(counts))
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def unique_rows(x: Tensor, y: Tensor, index: Tensor) -> Features:
    """Sort by `index` and keep one of each: samplers repeat rows to give every rank the same number of batches."""
    order = index.argsort(stable=True)
    ordered = index[order]
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    keep = order[first]
    return Features(x[keep], y[keep], index[keep])
