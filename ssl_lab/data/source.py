"""What a set of samples has to offer, so that one loader serves scenes, folders, the hub, and text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


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


class First:
    """The first `count` rows of a source, to overfit on or to train with few samples."""

    def __init__(self, source: "Source", count: int) -> None:
        self.source, self.count = source, min(count, len(source))
        self.classes, self.unit = source.classes, source.unit
        self.tokenizer = getattr(source, "tokenizer", None)

    def __len__(self) -> int:
        return self.count

    def read(self, rows: Sequence[int]) -> Samples:
        """As the whole source gives them."""
        return self.source.read(rows)


class Source(Protocol):
    """A finite set of samples that can be read by row, in any order and from any process."""

    classes: list[str]  # names in the order of the targets; empty where there are no labels
    unit: str  # what a row is, in the plural: images, sequences

    def __len__(self) -> int: ...

    def read(self, rows: Sequence[int]) -> Samples:
        """The samples at `rows`, in that order; a row may occur more than once."""
        ...
