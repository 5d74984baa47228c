"""Sharded data, in the layout of webdataset, read by position: a shard is a .tar whose records are found by an index.

The index makes a row of a shard as easy to read as a row of a table. So the training stream keeps its arithmetic, from
a position to a row, and is resumed anywhere at no cost; only the order is one that disks like, a few shards at a time.
"""

import json
import logging
import os
import re
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Literal

from torch import Tensor

from ssl_lab.data.folders import HELD_OUT, choose, missing
from ssl_lab.data.pairs import CaptionedImages
from ssl_lab.data.pairs_text import CaptionEncoder
from ssl_lab.data.shards_index import ShardIndex, index_of
from ssl_lab.data.shards_order import row_order
from ssl_lab.data.shards_table import ShardTable
from ssl_lab.data.shards_write import PLAN, planned
from ssl_lab.data.tokenizer import Tokenizer
from ssl_lab.errors import UserError

log = logging.getLogger(__name__)

CLASSES = "classes.json"  # names of the classes, beside the shards
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


class Shards(CaptionedImages):
    """Captioned images in .tar shards; without a `tokenizer`, images alone.

    In a pass every shard is visited once, in an order made from (seed, pass); the rows of `mix` shards at a time are
    mixed. A record without an image (or, with a tokenizer, without a caption) is left out, and so is what a damaged
    shard has lost; a warning counts them. An image that cannot be read is replaced, see `EncodedImages`. Memory does
    not grow with the number of rows: where they lie is mapped from an index on disk.

    Args:
        path: a folder of shards named train*.tar and test*.tar (or otherwise: then a tenth of the records is held out),
            one .tar, a pattern such as data/part-{00000..00099}.tar, or a .txt file with the path of a shard per line.
        tokenizer: of the captions, or its path; None = images only.
        split: train, or what is held out; None = all that is there.
        context_length: tokens of a caption, begin and end included; longer ones are cut.
        fixed: pad to `context_length`, not to the longest of a batch.
        mix: shards whose rows are mixed.
        index: folder for the indices; None = `.index` beside each shard.
        in_memory: keep decoded images.
        bad_samples: a file to list unreadable images in.

    Raises:
        UserError: no shards, one that is named but missing, or nothing usable in any of them.
    """

    def __init__(
        self,
        path: str | Path,
        tokenizer: Tokenizer | str | None = None,
        *,
        split: str | None = "train",
        context_length: int = 77,
        fixed: bool = True,
        mix: int = 8,
        index: str | Path | None = None,
        in_memory: bool | Literal["auto"] = False,
        bad_samples: str | Path | None = None,
    ):
        if mix < 1:
            raise UserError(f"mix is {mix}: rows of at least 1 shard are mixed")
        encode = None if tokenizer is None else CaptionEncoder(tokenizer, context_length, fixed=fixed)
        table = open_shards(str(path), split, captions=encode is not None, index=index)
        self.mix, self._sizes = mix, tuple(table.sizes)
        super().__init__(table, str(path), split or "all", encode, in_memory=in_memory, bad_samples=bad_samples)

    def rows_at(self, position: Tensor, seed: int) -> Tensor:
        """(B,) int64 ascending positions of the stream -> (B,) int64 rows."""
        return row_order(position, seed, self._sizes, self.mix)


def open_shards(path: str, split: str | None, *, captions: bool, index: str | Path | None = None) -> ShardTable:
    """The records of `split` at `path`, see `Shards`.

    Raises:
        UserError: no shards, one that is named but missing, nothing usable in any of them, or a class without a name.
    """
    shards = _listed(path)
    part: Literal["all", "held_out", "kept"] = "all"
    if split is not None:
        splits: dict[str, list[Path]] = {}
        for shard in shards:
            named = re.match(rf"(train|{'|'.join(HELD_OUT)})(?![a-z])", shard.name)
            splits.setdefault(named[1] if named else "", []).append(shard)
        shards, divide = choose(splits, split)
        part = "all" if not divide else "kept" if split == "train" else "held_out"
    folder = None if index is None else Path(index).expanduser()
    stamps = tuple((x.stat().st_size, x.stat().st_mtime_ns) for x in shards)
    indices = _indices(tuple(shards), stamps, captions, folder)
    table = ShardTable(shards, indices, part, _classes(shards[0].parent))
    if not len(table):
        why = next((x for index in indices for x in index.examples), "too few records to hold a tenth of them out")
        raise UserError(f"{path} has no usable record in split {split}: {why}")
    return table


@lru_cache(maxsize=8)  # both splits, images and captions, and the tokenizer ask for the same
def _indices(
    shards: tuple[Path, ...], stamps: tuple[tuple[int, int], ...], captions: bool, folder: Path | None
) -> list[ShardIndex]:
    indices: list[ShardIndex] = []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for found in pool.map(lambda shard: index_of(shard, captions, folder), shards):
            indices.append(found)
            if len(indices) % 500 == 0:
                log.info("read the index of %s of %s shards", f"{len(indices):,}", f"{len(shards):,}")
    left_out: dict[str, int] = {}
    for found in indices:
        for reason, count in found.left_out.items():
            reason = reason.partition(",")[0].partition(":")[0]
            left_out[reason] = left_out.get(reason, 0) + count
    if left_out:
        counts = ", ".join(f"{reason} {count:,}" for reason, count in left_out.items())
        examples = "; ".join([x for found in indices for x in found.examples][:3])
        total = f"{sum(found.count for found in indices):,}"
        log.warning("left out of %s: %s (%s records remain), such as %s", shards[0].parent, counts, total, examples)
    return indices


def _listed(path: str) -> list[Path]:
    local = Path(path).expanduser()
    if local.is_dir():
        found = sorted(local.glob("*.tar"))
        if not found:
            raise UserError(f"no shards in {local}: looked for *.tar (make some with `ssl-lab shards`)")
        _complete(planned(local), PLAN)
        return found
    if local.suffix == ".txt" and local.is_file():
        named = [local.parent / line.strip() for line in local.read_text().splitlines() if line.strip()]
    else:
        named = [Path(x).expanduser() for x in _expanded(path)]
    if not named:
        raise UserError(f"{path} names no shard")
    if len(named) == 1 and not named[0].is_file():
        raise UserError(missing(named[0]))
    _complete(named, path)
    if packed := next((x for x in named if x.suffix != ".tar"), None):
        raise UserError(f"{packed} is no .tar: shards are read by position, so unpack a compressed one to .tar first")
    return named


def _complete(named: list[Path], by: str) -> None:
    absent = [x for x in named if not x.is_file()]
    if absent:
        raise UserError(
            f"shard {absent[0]} is missing, one of {len(absent)} of the {len(named)} that {by} names: fetch it, or "
            "name only those that are there"
        )


def _expanded(pattern: str) -> list[str]:
    found = _BRACES.search(pattern)
    if found is None:
        return [pattern]
    first, last = found[1], found[2]
    numbers = (f"{i:0{len(first)}d}" for i in range(int(first), int(last) + 1))
    return [x for n in numbers for x in _expanded(pattern[: found.start()] + n + pattern[found.end() :])]


def _classes(folder: Path) -> list[str]:
    file = folder / CLASSES
    if not file.is_file():
        return []
    try:
        names = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is no JSON ({error}): it holds a list of the names of the classes") from None
    return [str(name) for name in names]
