"""Recordings: folders of clips, tables, the hub; with classes, with transcripts, or with neither."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ssl_lab.data.audio_decode import decode_audio, seconds_of
from ssl_lab.data.audio_text import Transcribed, TranscriptEncoder
from ssl_lab.data.decode import Unreadable
from ssl_lab.data.encoded import MEMORY, EncodedSamples
from ssl_lab.data.medium import AUDIO
from ssl_lab.data.pairs_table import PairTable, open_pairs
from ssl_lab.data.source import Samples
from ssl_lab.data.tokenizer import Tokenizer
from ssl_lab.errors import UserError

log = logging.getLogger(__name__)

_PROBES = 16  # headers that are read to guess how much memory all clips need
_READ = 4096  # rows whose transcripts or sizes are looked at together
_FLOAT = 4  # bytes of a sample


class Clips(EncodedSamples):
    """The recordings of one split at `path`, mono and at one rate.

    `path` is a folder of sound files (sub-folders are classes), a parquet file or a folder of them, a .csv or .tsv file
    of paths and transcripts, or the name of a hub data set. A column holds the bytes or the path of a clip. Columns are
    found by type and name unless they are given, and splits as in `HFImages`. With a `tokenizer`, rows without a
    transcript are left out and `Samples.data` is a `Transcribed`; without one it is a list of (Si,) float32.

    With `in_memory="auto"` clips that fill less than 1 GiB are decoded once, others whenever they are read. An
    unreadable one is replaced by another one, together with its class and its transcript; see `EncodedSamples`.

    Args:
        path: where the clips are.
        tokenizer: of the transcripts, or its path; None = clips alone.
        split: train, or what is held out.
        sampling_rate: in Hz, of what is given out.
        audio_column: None = found.
        transcript_column: None = found, if there is one.
        label_column: of classes; None = found, if there are any.
        end: transcripts end with the tokenizer's end token, as a decoder needs it.
        in_memory: keep decoded clips.
        bad_samples: a file to list unreadable clips in.

    Raises:
        UserError: nothing at `path`, no clips, no transcripts, one with a character that the tokenizer does not know,
            or more than 1 % of the clips unreadable.
    """

    thing, unit = "clip", "clips"
    table: PairTable

    def __init__(
        self,
        path: str | Path,
        tokenizer: Tokenizer | str | None = None,
        *,
        split: str = "train",
        sampling_rate: int = 16000,
        audio_column: str | None = None,
        transcript_column: str | None = None,
        label_column: str | None = None,
        end: bool = False,
        in_memory: bool | Literal["auto"] = "auto",
        bad_samples: str | Path | None = None,
    ):
        check_rate(sampling_rate)
        columns = (audio_column, transcript_column, label_column)
        table = open_pairs(str(path), split, *columns, medium=AUDIO, optional=tokenizer is None)
        super().__init__(table, str(path), split, bad_samples=bad_samples)
        self.sampling_rate = sampling_rate
        self._samples: Tensor | None = None  # all clips, one after another
        self._ends = self._rows = torch.empty(0)  # where each ends, and which is read for each row
        self.encode = None if tokenizer is None else TranscriptEncoder(tokenizer, end=end)
        if self.encode is not None:
            self.encode.check(self._all_transcripts(), str(path))
        if in_memory is True or (in_memory == "auto" and self._fits()):
            self._decode_all(must=in_memory is True)

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Of the transcripts."""
        return None if self.encode is None else self.encode.tokenizer

    @cached_property
    def lengths(self) -> Tensor:
        """(N,) int64: samples of each clip where all are decoded, else the bytes of its file; to batch alike by."""
        if self._samples is not None:
            used = self._rows
            return self._ends[used + 1] - self._ends[used]
        rows = range(len(self))
        return torch.cat([torch.tensor(_sizes(self.table, rows[i : i + _READ])) for i in range(0, len(self), _READ)])

    def decode(self, blob: bytes) -> Tensor:
        """(S,) float32 of a sound file."""
        return decode_audio(blob, self.sampling_rate)

    def read(self, rows: Sequence[int]) -> Samples:
        """Clips at `rows`, to be read only; see `Samples`."""
        if self._samples is not None:
            used = self._rows[list(rows)]
            spans = zip(self._ends[used].tolist(), self._ends[used + 1].tolist(), strict=True)
            clips = [self._samples[start:end] for start, end in spans]
        else:
            found = [self._readable(row, blob) for row, blob in zip(rows, self.table.blobs(rows), strict=True)]
            clips, used = [clip for clip, _ in found], torch.tensor([row for _, row in found])
        data: Any = clips
        if self.encode is not None:
            data = Transcribed(clips, self.transcripts(used.tolist()), self.encode)
        return Samples(data, self.table.labels(used), used)

    def transcripts(self, rows: Sequence[int]) -> list[str]:
        """The transcript of each of these rows; without any, the name of its class, or nothing.

        Where clips are held in memory and another one stands in for an unreadable row, it is that one's transcript.
        """
        if self._samples is not None:
            rows = self._rows[list(rows)].tolist()
        texts = [found[0] if found else "" for found in self.table.captions(rows)]
        if not self.classes:
            return texts
        labels = self.table.labels(torch.tensor(list(rows), dtype=torch.int64)).tolist()
        return [text or (self.classes[label] if label >= 0 else "") for text, label in zip(texts, labels, strict=True)]

    def _all_transcripts(self) -> Iterator[list[str]]:
        for start in range(0, len(self), _READ):
            yield self.transcripts(range(start, min(start + _READ, len(self))))

    def _fits(self) -> bool:
        """Whether all clips together need little enough memory, by a few headers."""
        rows = sorted({i * (len(self) - 1) // (_PROBES - 1) for i in range(_PROBES)})
        seconds = []
        for blob in self.table.blobs(rows):
            with suppress(Unreadable):
                seconds.append(seconds_of(blob))
        mean = sum(seconds) / max(1, len(seconds))
        return bool(seconds) and mean * self.sampling_rate * _FLOAT * len(self) <= MEMORY

    def _decode_all(self, *, must: bool) -> None:
        parts: list[Tensor] = []
        sizes = [0] * len(self)
        total = 0
        for row, clip in self._each():
            parts.append(clip)
            sizes[row] = len(clip)
            total += len(clip)
            if total * _FLOAT > MEMORY and not must:  # the headers that were looked at were those of short ones
                return
        if not parts:
            raise UserError(self._too_many())
        self._rows = self._stand_ins([row for row, size in enumerate(sizes) if size])
        self._ends = torch.tensor([0, *sizes]).cumsum(0)
        self._samples = torch.cat(parts)
        what = f"{len(self):,} clips, {total / self.sampling_rate / 60:.1f} minutes,"
        log.info("%s %s: %s decoded into memory (%d MiB)", self.path, self.split, what, total * _FLOAT >> 20)


def check_rate(sampling_rate: int) -> int:
    """`sampling_rate`, if it is one; else a `UserError`."""
    if not 1000 <= sampling_rate <= 384_000:
        raise UserError(f"sampling_rate is {sampling_rate}: it is in Hz, such as 16000, or 8000 for telephones")
    return sampling_rate


def _sizes(table: PairTable, rows: Sequence[int]) -> list[int]:
    """Bytes of the files at `rows`; those that are files of their own are not opened."""
    found = []
    for value in table.table.rows[list(rows)][table.table.column]:
        entry: Any = value if isinstance(value, dict) else {"path": value} if isinstance(value, str) else {}
        inside = value if isinstance(value, bytes) else entry.get("bytes")
        size = len(inside or b"")
        if inside is None and entry.get("path"):
            with suppress(OSError):
                size = Path(table.base or "", entry["path"]).stat().st_size
        found.append(size)
    return found
