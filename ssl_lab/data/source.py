"""What a set of samples has to offer, so that one loader serves scenes, folders, the hub, and text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from ssl_lab.errors import UserError
from ssl_lab.subsets import balanced, per_class

_READ = 256  # samples at a time


@dataclass(slots=True)
class Samples:
    """Some rows of a source.

    `data` is what the views take: images as one (B, 3, H, W) uint8 tensor where all have one size and lie in memory,
    else as a list of (3, Hi, Wi) uint8; text as token ids, (B, L) int64 or a list of (Li,); sound as a list of (Si,)
    float32, or a `Transcribed`. `targets` (B,) int64 holds -1 for an unlabelled sample. `rows` (B,) int64 holds the row
    that was really read: an unreadable image is replaced by another.
    """

    data: Any
    targets: Tensor
    rows: Tensor


class Subset:
    """Some rows of a source, which are numbered anew: to overfit on, or to train with few labels.

    Where the source has an encoder of texts, or a question for each row, so has this.

    Args:
        source: of all rows.
        rows: (M,) int64, the rows to keep.
    """

    def __init__(self, source: "Source", rows: Tensor) -> None:
        self.source, self.rows = source, rows
        self.classes, self.unit = source.classes, source.unit
        self.tokenizer = getattr(source, "tokenizer", None)
        whole: Any = source
        if hasattr(whole, "encode"):
            self.encode = whole.encode
        if hasattr(whole, "question"):  # no method: a source that asks nothing must not look as if it did
            self.question = partial(_question, whole, rows)

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, rows: Sequence[int]) -> Samples:
        """As the whole source gives them; a stand-in for an unreadable sample has that one's number."""
        found = self.source.read(self.rows[list(rows)].tolist())
        return Samples(found.data, found.targets, torch.tensor(rows, dtype=torch.int64))

    def without(self, known: Callable[[int], Tensor]) -> "Subset":
        """The same, but images are not read once their reader knows them, where the whole source can leave them out."""
        whole: Any = self.source
        return Subset(whole.without(known), self.rows) if hasattr(whole, "without") else self


def _question(whole: Any, rows: Tensor, row: int) -> Any:
    return whole.question(int(rows[row]))


def subset(source: "Source", rows: float, seed: int) -> "Source":
    """The first `rows` of a source, or a share of it below 1: equally many rows of each class, drawn from `seed`.

    Raises:
        UserError: a share of rows without classes, or one that leaves nothing of a class.
    """
    if rows >= 1:
        return Subset(source, torch.arange(min(int(rows), len(source))))
    if not source.classes:
        raise UserError(
            f"data.rows={rows:g}: a share takes equally many of each class, and these {source.unit} have none: "
            "give a number of rows"
        )
    targets = _targets(source)
    labelled = (targets >= 0).nonzero()[:, 0]
    if not len(labelled) or per_class(targets[labelled], rows) < 1:
        raise UserError(
            f"data.rows={rows:g} of {len(labelled):,} {source.unit} leaves none of some of the "
            f"{len(source.classes)} classes: give a larger share"
        )
    return Subset(source, labelled[balanced(targets[labelled], rows, seed)])


def _targets(source: "Source") -> Tensor:
    """(N,) int64, read with the samples where there is no table of them."""
    table = getattr(source, "table", None)
    if table is not None:
        found: Tensor = table.labels(torch.arange(len(source)))
        return found
    parts = torch.arange(len(source)).split(_READ)
    return torch.cat([source.read(part.tolist()).targets for part in parts])


class Source(Protocol):
    """A finite set of samples that can be read by row, in any order and from any process."""

    classes: list[str]  # names in the order of the targets; empty where there are no labels
    unit: str  # what a row is, in the plural: images, sequences

    def __len__(self) -> int: ...

    def read(self, rows: Sequence[int]) -> Samples:
        """The samples at `rows`, in that order; a row may occur more than once."""
        ...
