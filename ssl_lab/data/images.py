"""Real images through Hugging Face `datasets`, robust against the files that every large collection has broken."""

import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ssl_lab.data.decode import Unreadable, decode, size_of
from ssl_lab.data.encoded import MEMORY, Encoded, EncodedSamples
from ssl_lab.data.source import Samples
from ssl_lab.data.tables import open_table
from ssl_lab.errors import UserError

log = logging.getLogger(__name__)

_PROBES = 8  # headers that are read to guess whether all images have one size


class EncodedImages(EncodedSamples):
    """Decodes the images of a table when they are read, or all of them once.

    With `in_memory="auto"` a set whose images all have one size and fill less than 1 GiB is decoded once; other images
    are decoded whenever they are read. What is done about unreadable ones, `EncodedSamples` says.

    Raises:
        UserError: more than 1 % of what was read is unreadable.
    """

    thing, unit = "image", "images"

    def __init__(
        self,
        table: Encoded,
        path: str,
        split: str,
        *,
        in_memory: bool | Literal["auto"] = "auto",
        bad_samples: str | Path | None = None,
    ):
        super().__init__(table, path, split, bad_samples=bad_samples)
        self._pixels: Tensor | None = None
        self._rows = torch.empty(0)  # which row is read for each, once all are decoded
        if in_memory is True or (in_memory == "auto" and self._fits()):
            self._decode_all(must=in_memory is True)

    def decode(self, blob: bytes) -> Tensor:
        """(3, H, W) uint8 RGB of an image file."""
        return decode(blob)

    def read(self, rows: Sequence[int]) -> Samples:
        """Images at `rows`: one tensor if the set is in memory, else a list; see `Samples`."""
        if self._pixels is not None:
            used = self._rows[list(rows)]
            return Samples(self._pixels[used], self.table.labels(used), used)
        found = [self._readable(row, blob) for row, blob in zip(rows, self.table.blobs(rows), strict=True)]
        used = torch.tensor([row for _, row in found])
        return Samples([image for image, _ in found], self.table.labels(used), used)

    def _fits(self) -> bool:
        """Whether all images seem to have one size, by a few headers, and little enough memory is needed."""
        rows = sorted({i * (len(self) - 1) // (_PROBES - 1) for i in range(_PROBES)})
        sizes = set()
        for blob in self.table.blobs(rows):
            with suppress(Unreadable):
                sizes.add(size_of(blob))
        return len(sizes) == 1 and all(3 * len(self) * h * w <= MEMORY for h, w in sizes)

    def _decode_all(self, *, must: bool) -> None:
        pixels: Tensor | None = None
        good: list[int] = []
        for row, image in self._each():
            if pixels is None:
                pixels = torch.empty(len(self), *image.shape, dtype=torch.uint8)
            if image.shape != pixels.shape[1:]:
                if must:
                    raise UserError(f"in_memory=true needs images of one size: {self.table.name(row)} differs")
                return
            pixels[row] = image
            good.append(row)
        if pixels is None:
            raise UserError(self._too_many())
        self._rows, self._pixels = self._stand_ins(good), pixels
        what = f"{len(self):,} images of {pixels.shape[2]} x {pixels.shape[3]}"
        log.info("%s %s: %s decoded into memory (%d MiB)", self.path, self.split, what, pixels.numel() >> 20)


class HFImages(EncodedImages):
    """The images of one split at `path`: a parquet file or folder, an image folder, or the name of a hub data set.

    Columns are found by their type and name unless they are given; `in_memory` and `bad_samples` as above.

    Raises:
        UserError: there is nothing at `path`, no image in it, or more than 1 % of what was read is unreadable.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        split: str = "train",
        image_column: str | None = None,
        label_column: str | None = None,
        in_memory: bool | Literal["auto"] = "auto",
        bad_samples: str | Path | None = None,
    ):
        table = open_table(str(path), split, image_column, label_column)
        super().__init__(table, str(path), split, in_memory=in_memory, bad_samples=bad_samples)
