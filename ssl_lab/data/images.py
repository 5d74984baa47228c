"""Real images through Hugging Face `datasets`, robust against the files that every large collection has broken."""

import json
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from ssl_lab.data.decode import Unreadable, decode, size_of
from ssl_lab.data.source import Samples
from ssl_lab.data.tables import open_table
from ssl_lab.errors import UserError
from ssl_lab.rng import fold

log = logging.getLogger(__name__)

_MEMORY = 1 << 30  # bytes of decoded pixels that "auto" keeps
_HANDFUL, _SHARE = 5, 0.01  # more unreadable images than this, and than this share of what was read, end the run
_EARLY = 2000  # the share is taken of at least so many: the first few hundred say little
_TRIES = 16  # stand-ins that are tried for one unreadable image
_PROBES = 8  # headers that are read to guess whether all images have one size


class Encoded(Protocol):
    """Undecoded images by row, with their targets."""

    @property
    def classes(self) -> list[str]:
        """Names in the order of the targets; empty where there are no labels."""
        ...

    def __len__(self) -> int: ...

    def blobs(self, rows: Sequence[int]) -> list[bytes]:
        """Image files; empty where one cannot be opened."""
        ...

    def labels(self, rows: Tensor) -> Tensor:
        """(B,) int64 rows -> (B,) int64 targets, -1 = unlabelled."""
        ...

    def name(self, row: int) -> str:
        """How a person finds the image."""
        ...


class EncodedImages:
    """Decodes the images of a table when they are read, or all of them once.

    With `in_memory="auto"` a set whose images all have one size and fill less than 1 GiB is decoded once; other images
    are decoded whenever they are read. An unreadable image is replaced by another one, which depends on its row alone,
    and is reported: by a warning and, if `bad_samples` names a file, by a line of JSON in it. `path` and `split` name
    the set in messages.

    Raises:
        UserError: more than 1 % of what was read is unreadable.
    """

    unit = "images"

    def __init__(
        self,
        table: Encoded,
        path: str,
        split: str,
        *,
        in_memory: bool | Literal["auto"] = "auto",
        bad_samples: str | Path | None = None,
    ):
        self.table, self.path, self.split = table, path, split
        self.classes = table.classes
        self.bad: dict[int, str] = {}  # row -> reason
        self.bad_samples = Path(bad_samples) if bad_samples else None
        self._read, self._floor = 0, min(len(table), _EARLY)
        self._pixels: Tensor | None = None
        self._rows = torch.empty(0)  # which row is read for each, once all are decoded
        if in_memory is True or (in_memory == "auto" and self._fits()):
            self._decode_all(must=in_memory is True)

    def __len__(self) -> int:
        return len(self.table)

    def read(self, rows: Sequence[int]) -> Samples:
        """Images at `rows`: one tensor if the set is in memory, else a list; see `Samples`."""
        if self._pixels is not None:
            used = self._rows[list(rows)]
            return Samples(self._pixels[used], self.table.labels(used), used)
        found = [self._readable(row, blob) for row, blob in zip(rows, self.table.blobs(rows), strict=True)]
        used = torch.tensor([row for _, row in found])
        return Samples([image for image, _ in found], self.table.labels(used), used)

    def _readable(self, row: int, blob: bytes) -> tuple[Tensor, int]:
        """The image at `row`, or its stand-in, with the row it was read from."""
        for attempt in range(_TRIES):
            image = _try(blob)
            self._read += 1
            if isinstance(image, Tensor):
                return image, row
            self._report(row, str(image))
            row = fold(row, attempt) % len(self)
            blob = self.table.blobs([row])[0]
        raise UserError(self._too_many())

    def _report(self, row: int, reason: str) -> None:
        if row in self.bad:
            return
        self.bad[row] = reason
        name = self.table.name(row)
        log.warning("skipped an unreadable image, %s: %s (%d so far)", name, reason, len(self.bad))
        if self.bad_samples:
            line = json.dumps({"image": name, "split": self.split, "row": row, "reason": reason}) + "\n"
            known = self.bad_samples.read_text() if self.bad_samples.exists() else ""
            if line not in known:  # a resumed run meets the same images again
                self.bad_samples.parent.mkdir(parents=True, exist_ok=True)
                self.bad_samples.write_text(known + line)
        if len(self.bad) > max(_HANDFUL, _SHARE * min(max(self._read, self._floor), len(self))):
            raise UserError(self._too_many())

    def _too_many(self) -> str:
        some = "; ".join(f"{self.table.name(row)} ({reason})" for row, reason in list(self.bad.items())[:3])
        count = f"{len(self.bad)} of {len(self)} images" if self._read >= len(self) else f"{len(self.bad)} images"
        return f"{count} of {self.path} are unreadable, such as {some}: mend or remove them"

    def _fits(self) -> bool:
        """Whether all images seem to have one size, by a few headers, and little enough memory is needed."""
        rows = sorted({i * (len(self) - 1) // (_PROBES - 1) for i in range(_PROBES)})
        sizes = set()
        for blob in self.table.blobs(rows):
            with suppress(Unreadable):
                sizes.add(size_of(blob))
        return len(sizes) == 1 and all(3 * len(self) * h * w <= _MEMORY for h, w in sizes)

    def _decode_all(self, *, must: bool) -> None:
        self._floor = len(self)  # all will be read, so the share of bad ones is taken of all
        pixels: Tensor | None = None
        good: list[int] = []
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # decoders release the interpreter lock
            for start in range(0, len(self), 1024):
                rows = range(start, min(start + 1024, len(self)))
                for row, image in zip(rows, pool.map(_try, self.table.blobs(rows)), strict=True):
                    self._read += 1
                    if not isinstance(image, Tensor):
                        self._report(row, str(image))
                        continue
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
        self._rows = torch.arange(len(self))
        for row in self.bad:
            self._rows[row] = good[fold(row, 0) % len(good)]
        self._pixels = pixels
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


def _try(blob: bytes) -> Tensor | Unreadable:
    try:
        return decode(blob)
    except Unreadable as error:
        return error
