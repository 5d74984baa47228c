"""Length bucketing: an order of the rows in which batches hold clips of like length, so that little is padded."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ssl_lab.data.source import Samples, Source
from ssl_lab.data.stream import rows_at
from ssl_lab.rng import fold

_ORDER = 0xB0CE7


class Bucketed:
    """The rows of a source, those of `mix` batches at a time sorted by length, cut into batches, and these shuffled.

    Like the plain order it has no state: pools of group x mix positions lie side by side in the endless stream, and
    each pool follows from (seed, its number). What a pool holds is what the plain order has at its positions, so each
    pass still sees every row once, up to the pool that two passes share; and a run goes on anywhere.

    Args:
        source: the rows, with their own order if they have one.
        lengths: (N,) of each row, in any unit.
        group: rows of a step on all ranks together: ranks that wait for one another get clips of like length.
        mix: batches of a pool. More of them pad less and mix less; no more than fit into the set are taken.
    """

    def __init__(self, source: Source, lengths: Tensor, group: int, mix: int):
        self.source, self.lengths, self.group = source, lengths, group
        self.mix = max(1, min(mix, len(source) // group))
        self.classes, self.unit = source.classes, source.unit

    def __len__(self) -> int:
        return len(self.source)

    def read(self, rows: Sequence[int]) -> Samples:
        """As the source gives them."""
        return self.source.read(rows)

    def rows_at(self, position: Tensor, seed: int) -> Tensor:
        """(B,) int64 ascending positions of the stream -> (B,) int64 rows."""
        size = self.group * self.mix
        pool = position // size
        pools = range(int(pool[0]), int(pool[-1]) + 1)
        return torch.cat([self._pool(number, seed)[(position - number * size)[pool == number]] for number in pools])

    def _pool(self, number: int, seed: int) -> Tensor:
        """(group x mix,) int64 rows at the positions of a pool."""
        size = self.group * self.mix
        position = torch.arange(number * size, (number + 1) * size)
        own = getattr(self.source, "rows_at", None)
        rows = rows_at(position, seed, len(self.source)) if own is None else own(position, seed)
        rows = rows[self.lengths[rows].argsort(stable=True)].view(self.mix, self.group)
        generator = torch.Generator().manual_seed(fold(seed, _ORDER, number))
        return rows[torch.randperm(self.mix, generator=generator)].flatten()
