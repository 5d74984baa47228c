"""Word and character error rate of transcripts: edits over the number of words (characters) that were said."""

import time
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.text import char_error_rate, word_error_rate

from ssl_lab.evals.base import Common, Round, Skip
from ssl_lab.types import Batch, Transcribes

_NONE = -1  # stands after the last token of a row


@dataclass(frozen=True)
class WordErrorRate(Common):
    """The test split, written down by the method and compared with its transcripts as they are.

    Args:
        num_beams: 1 = the likeliest token of each frame, else prefixes that a search follows.
        max_tokens: of a transcript; what comes later is lost.
    """

    num_beams: int = 1
    max_tokens: int = 1000
    needs: ClassVar[type] = Transcribes

    @property
    def protocol(self) -> dict[str, Any]:
        """Settings that the values depend on."""
        return {"num_beams": self.num_beams, "max_tokens": self.max_tokens, "limit": self.limit}

    def run(self, round: Round) -> dict[str, float]:
        """`wer` and `cer` in percent, above 100 where much is added.

        Details are the share of rows without an error and the real-time factor: seconds that this rank's method took
        over seconds of sound, batches and their padding as they are, without reading files.

        Raises:
            Skip: the test data have no transcripts.
        """
        tokenizer = getattr(round.data, "tokenizer", None)
        transcripts = getattr(getattr(round.data, "test", None), "transcripts", None)
        if tokenizer is None or transcripts is None:
            raise Skip("the test data have no transcripts: choose e.g. data=speech, data=digits_connected")
        method, rate = cast(Transcribes, round.method), getattr(round.data, "sampling_rate", None)
        taken, heard = 0.0, 0.0

        def said(batch: Batch) -> Tensor:
            nonlocal taken, heard
            samples = batch["audio_valid"].sum() if "audio_valid" in batch else batch["audio"].numel()
            heard += float(samples) / (rate or 1)
            begin = time.perf_counter()
            found = method.transcribe(batch, num_beams=self.num_beams)
            taken += time.perf_counter() - begin
            rows = [row[: self.max_tokens] for row in found]
            return torch.stack([F.pad(torch.tensor(r), (0, self.max_tokens - len(r)), value=_NONE) for r in rows])

        found = round.extract(said, "test", self.limit)
        told = [tokenizer.decode(row[row != _NONE]).strip() for row in found.x.long()]
        right = [text.strip() for text in transcripts(found.index.tolist())]
        if not any(right):
            raise Skip("the transcripts of the test data are empty")
        whole = sum(a.split() == b.split() for a, b in zip(told, right, strict=True)) / len(right)
        wer, cer = word_error_rate(told, right), char_error_rate(told, right)
        if rate and heard:
            round.notes.append(f"{heard:,.0f} s of sound in {taken:,.1f} s, real-time factor {taken / heard:.4f}")
        values = {"wer": 100 * float(wer), "cer": 100 * float(cer), "rows/right": 100 * whole}
        return values | ({"time/real_time_factor": taken / heard} if rate and heard else {})
