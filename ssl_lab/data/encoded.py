"""Undecoded files by row, and what is done about those that every large collection has broken."""

import json
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ssl_lab.data.decode import Unreadable
from ssl_lab.errors import UserError
from ssl_lab.rng import fold

log = logging.getLogger(__name__)

MEMORY = 1 << 30  # bytes of decoded samples that `in_memory="auto"` keeps
_HANDFUL, _SHARE = 5, 0.01  # more unreadable samples than this, and than this share of what was read, end the run
_EARLY = 2000  # the share is taken of at least so many: the first few hundred say little
_TRIES = 16  # stand-ins that are tried for one unreadable sample
_CHUNK = 1024  # samples whose bytes are held at once when all are decoded


class Encoded(Protocol):
    """Undecoded images or clips by row, with their targets."""

    @property
    def classes(self) -> list[str]:
        """Names in the order of the targets; empty where there are no labels."""
        ...

    def __len__(self) -> int: ...

    def blobs(self, rows: Sequence[int]) -> list[bytes]:
        """Files; empty where one cannot be opened."""
        ...

    def labels(self, rows: Tensor) -> Tensor:
        """(B,) int64 rows -> (B,) int64 targets, -1 = unlabelled."""
        ...

    def name(self, row: int) -> str:
        """How a person finds the sample."""
        ...


class EncodedSamples:
    """A table of files. An unreadable one is replaced by another one, which depends on its row alone.

    It is reported: by a warning and, if `bad_samples` names a file, by a line of JSON in it. `path` and `split` name
    the set in messages. What `thing` and `decode` are, a subclass says.

    Raises:
        UserError: more than 1 % of what was read is unreadable.
    """

    thing = "sample"
    unit = "samples"

    def __init__(self, table: Encoded, path: str, split: str, *, bad_samples: str | Path | None = None):
        self.table, self.path, self.split = table, path, split
        self.classes = table.classes
        self.bad: dict[int, str] = {}  # row -> reason
        self.bad_samples = Path(bad_samples) if bad_samples else None
        self._read, self._floor = 0, min(len(table), _EARLY)

    def __len__(self) -> int:
        return len(self.table)

    def decode(self, blob: bytes) -> Tensor:
        """The sample that a file holds.

        Raises:
            Unreadable: it holds none.
        """
        raise NotImplementedError

    def _readable(self, row: int, blob: bytes) -> tuple[Tensor, int]:
        """The sample at `row`, or its stand-in, with the row it was read from."""
        for attempt in range(_TRIES):
            sample = self._try(blob)
            self._read += 1
            if isinstance(sample, Tensor):
                return sample, row
            self._report(row, str(sample))
            row = fold(row, attempt) % len(self)
            blob = self.table.blobs([row])[0]
        raise UserError(self._too_many())

    def _each(self) -> Iterator[tuple[int, Tensor]]:
        """All readable samples with their rows, in order, decoded by several threads; the others are reported."""
        self._floor = len(self)  # all will be read, so the share of bad ones is taken of all
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # decoders release the interpreter lock
            for start in range(0, len(self), _CHUNK):
                rows = range(start, min(start + _CHUNK, len(self)))
                for row, sample in zip(rows, pool.map(self._try, self.table.blobs(rows)), strict=True):
                    self._read += 1
                    if isinstance(sample, Tensor):
                        yield row, sample
                    else:
                        self._report(row, str(sample))

    def _stand_ins(self, good: Sequence[int]) -> Tensor:
        """(N,) int64: the row that is read for each, once it is known which are `good`."""
        rows = torch.arange(len(self))
        for row in self.bad:
            rows[row] = good[fold(row, 0) % len(good)]
        return rows

    def _try(self, blob: bytes) -> Tensor | Unreadable:
        try:
            return self.decode(blob)
        except Unreadable as error:
            return error

    def _report(self, row: int, reason: str) -> None:
        if row in self.bad:
            return
        self.bad[row] = reason
        name = self.table.name(row)
        log.warning("skipped an unreadable %s, %s: %s (%d so far)", self.thing, name, reason, len(self.bad))
        if self.bad_samples:
            line = json.dumps({self.thing: name, "split": self.split, "row": row, "reason": reason}) + "\n"
            known = self.bad_samples.read_text() if self.bad_samples.exists() else ""
            if line not in known:  # a resumed run meets the same samples again
                self.bad_samples.parent.mkdir(parents=True, exist_ok=True)
                with open(self.bad_samples, "a") as file:  # not rewritten: other workers add to it meanwhile
                    file.write(line)
        if len(self.bad) > max(_HANDFUL, _SHARE * min(max(self._read, self._floor), len(self))):
            raise UserError(self._too_many())

    def _too_many(self) -> str:
        some = "; ".join(f"{self.table.name(row)} ({reason})" for row, reason in list(self.bad.items())[:3])
        unit = self.unit
        count = f"{len(self.bad)} of {len(self)} {unit}" if self._read >= len(self) else f"{len(self.bad)} {unit}"
        return f"{count} of {self.path} are unreadable, such as {some}: mend or remove them"
