"""The records of shards as rows of one table."""

import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ssl_lab.data.shards_index import ShardIndex, captions_of
from ssl_lab.errors import UserError

_OPEN = 16  # files and indices that are kept open


class ShardTable:
    """The records of some shards as rows: those of the first shard, then those of the next one.

    Args:
        shards: the .tar files.
        indices: one for each.
        part: rows of each shard: all, those that are held out, or the others.
        classes: names; none = numbers, if there are classes.

    Raises:
        UserError: a class without a name.
    """

    def __init__(
        self,
        shards: list[Path],
        indices: list[ShardIndex],
        part: Literal["all", "held_out", "kept"],
        classes: list[str],
    ):
        first = [index.held_out if part == "kept" else 0 for index in indices]
        count = [index.held_out if part == "held_out" else index.count for index in indices]
        used = [i for i in range(len(shards)) if count[i] > first[i]]
        self.shards, self._indices = [shards[i] for i in used], [indices[i] for i in used]
        self._first = [first[i] for i in used]
        self.sizes = [count[i] - first[i] for i in used]
        self._starts = [0, *np.cumsum(self.sizes).tolist()]
        most = max((index.target for index in indices), default=-1)
        if classes and most >= len(classes):
            raise UserError(
                f"the shards in {shards[0].parent} hold class {most}, but classes.json names only {len(classes)}: "
                "name all of them, or remove the file"
            )
        self.classes = classes or [str(i) for i in range(most + 1)]
        self._files: OrderedDict[int, int] = OrderedDict()
        self._records: OrderedDict[int, np.ndarray] = OrderedDict()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def blobs(self, rows: Sequence[int]) -> list[bytes]:
        """The encoded images at `rows`; empty where a shard cannot be read any more."""
        return [self._pread(shard, record["image"], record["image_size"]) for shard, record in self._at(rows)]

    def captions(self, rows: Sequence[int]) -> list[list[str]]:
        """The captions at `rows`; one that is empty where a shard cannot be read any more."""
        found = [(self._pread(shard, x["text"], x["text_size"]), bool(x["json"])) for shard, x in self._at(rows)]
        return [captions_of(text, is_json) or [""] for text, is_json in found]

    def labels(self, rows: Tensor) -> Tensor:
        """(B,) int64 rows -> (B,) int64 targets, -1 = unlabelled."""
        return torch.tensor([int(record["target"]) for _, record in self._at(rows.tolist())])

    def name(self, row: int) -> str:
        """The shard and the file in it."""
        shard, record = self._at([row])[0]
        head = self._pread(shard, int(record["image"]) - 512, 100)
        return f"{self.shards[shard]} {head.partition(bytes(1))[0].decode(errors='replace')}"

    def _at(self, rows: Sequence[int]) -> list[tuple[int, Any]]:
        """Number of the shard, and record, of each row."""
        found = []
        for row in rows:
            shard = bisect_right(self._starts, row) - 1
            records = _kept(self._records, shard, lambda i: self._indices[i].records())
            found.append((shard, records[self._first[shard] + row - self._starts[shard]]))
        return found

    def _pread(self, shard: int, offset: int, size: int) -> bytes:
        try:
            file = _kept(self._files, shard, lambda i: os.open(self.shards[i], os.O_RDONLY), os.close)
            return os.pread(file, int(size), int(offset))
        except OSError:
            return b""

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": OrderedDict(), "_records": OrderedDict()}

    def __del__(self) -> None:
        for file in getattr(self, "_files", {}).values():
            os.close(file)


def _kept(cache: OrderedDict[int, Any], key: int, make: Any, drop: Any = None) -> Any:
    """`cache[key]`, made if it is not there; the one that was used longest ago leaves."""
    if key in cache:
        cache.move_to_end(key)
        return cache[key]
    if len(cache) >= _OPEN:
        _, old = cache.popitem(last=False)
        if drop is not None:
            drop(old)
    cache[key] = made = make(key)
    return made
