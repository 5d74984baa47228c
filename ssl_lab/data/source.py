"""What a set of labelled images has to offer, so that one loader serves generated scenes, folders and the hub."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(slots=True)
class Samples:
    """Some rows of a source.

    `images` is one (B, 3, H, W) uint8 tensor where all images have one size and lie in memory, else a list of
    (3, Hi, Wi) uint8. `targets` (B,) int64 holds -1 for an unlabelled image. `rows` (B,) int64 holds the row that was
    really read: an unreadable image is replaced by another.
    """

    images: Tensor | list[Tensor]
    targets: Tensor
    rows: Tensor


class First:
    """The first `count` rows of a source, to overfit on or to train with few images."""

    def __init__(self, source: "Source", count: int) -> None:
        self.source, self.count, self.classes = source, min(count, len(source)), source.classes

    def __len__(self) -> int:
        return self.count

    def read(self, rows: Sequence[int]) -> Samples:
        """As the whole source gives them."""
        return self.source.read(rows)


class Source(Protocol):
    """A finite set of images that can be read by row, in any order and from any process."""

    classes: list[str]  # names in the order of the targets; empty where there are no labels

    def __len__(self) -> int: ...

    def read(self, rows: Sequence[int]) -> Samples:
        """The images at `rows`, in that order; a row may occur more than once."""
        ...
