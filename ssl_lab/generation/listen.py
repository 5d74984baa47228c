"""What is said in one recording of any length: by the frames of CTC with the times of words, or pause by pause."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_lab.errors import UserError
from ssl_lab.generation.chunks import at_pauses, in_chunks
from ssl_lab.generation.ctc import CTCBeam, Score, Word, align, beam_search, greedy, pieces, words
from ssl_lab.generation.words import Decodes

_SHORTEST = 0.2  # seconds; what is shorter is followed by silence, as in training
_SEARCHED = 20.0  # seconds that one search covers
_SURE = -100.0  # ln P of what a silent frame does not say


@dataclass(frozen=True)
class Recogniser:
    """A method that writes down speech, with how it is to listen.

    Args:
        method: gives frames as `CTC.emissions` does, and may `decode` them itself, or gives transcripts of utterances
            (`ssl_lab.types.Transcribes`).
        tokenizer: of its tokens.
        sampling_rate: in Hz.
        chunk: seconds that are heard at once.
        overlap: seconds that two chunks of frames have in common; transcripts are cut at pauses instead.
        beam: of the search; a width of 1 takes the likeliest token of each frame, or of each place.
        score: a language model, for frames only.
    """

    method: Any
    tokenizer: Decodes
    sampling_rate: int
    chunk: float = 20.0
    overlap: float = 2.0
    beam: CTCBeam = field(default_factory=lambda: CTCBeam(1))
    score: Score | None = None

    @property
    def timed(self) -> bool:
        """Whether it knows when words were said."""
        return hasattr(self.method, "emissions")

    def text(self, audio: Tensor) -> str:
        """What is said in (S,) float32 at the sampling rate, words joined by blanks."""
        if self.timed:
            return " ".join(word.text for word in self.words(audio))
        rate = self.sampling_rate
        parts = [audio[a:b] for a, b in at_pauses(audio, round(self.chunk * rate), round(0.1 * rate))]
        return " ".join(text for part in parts if (text := self._utterance(part)))

    def words(self, audio: Tensor) -> list[Word]:
        """The same as words with their times; raises as `tokens` does."""
        return words(*self.tokens(audio), self.tokenizer, self.method.encoder.seconds)

    def tokens(self, audio: Tensor) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokens of (S,) float32, and the first and last frame of each.

        Raises:
            UserError: the weights give values that are no numbers.
        """
        method, rate = self.method, self.sampling_rate
        seconds = method.encoder.seconds
        step, chunk, overlap = (round(x * rate) for x in (seconds, self.chunk, self.overlap))
        frames = in_chunks(self._frames, self._long_enough(audio), step=step, chunk=chunk, overlap=overlap)
        if not frames.isfinite().all():
            raise UserError("the weights give values that are no numbers: take an earlier checkpoint")
        if (decode := getattr(method, "decode", None)) is not None:
            heard, at = frames[frames[:, -1] > 0, :-1], frames[:, -1].nonzero()[:, 0].tolist()
            if _silent(audio) or not at:
                return [], []
            tokens, within = decode(heard, num_beams=self.beam.width)
            return tokens, [(at[a], at[b]) for a, b in within]
        said, spans = list[int](), list[tuple[int, int]]()
        for start, end in pieces(frames, round(_SEARCHED / seconds), method.blank):
            part = frames[start:end]
            if self.beam.width > 1:
                tokens = beam_search(part, self.beam, self.score, blank=method.blank)[0][0]
            else:
                tokens = greedy(part, method.blank)
            said += tokens
            spans += [(start + a, start + b) for a, b in align(part, tokens, method.blank)]
        return said, spans

    def _frames(self, samples: Tensor) -> Tensor:
        """(S,) -> (T, V) on the CPU: log probabilities, or what `decode` takes and a column of 1 where it was heard."""
        log_probs, frames = self.method.emissions(self._batch(samples))
        found: Tensor = log_probs[0, : int(frames)].cpu()
        if hasattr(self.method, "decode"):
            return torch.zeros_like(F.pad(found, (0, 1))) if _silent(samples) else F.pad(found, (0, 1), value=1.0)
        if _silent(samples):
            found = torch.full_like(found, _SURE)
            found[:, self.method.blank] = 0.0
        return found

    def _utterance(self, samples: Tensor) -> str:
        if _silent(samples):
            return ""
        with torch.no_grad():
            (ids,) = self.method.transcribe(self._batch(self._long_enough(samples)), num_beams=self.beam.width)
        return " ".join(self.tokenizer.decode(ids).split())

    def _batch(self, samples: Tensor) -> dict[str, Tensor]:
        parameter = next(self.method.parameters())
        dtype = torch.promote_types(parameter.dtype, torch.float32)  # bf16 would spoil samples
        heard = samples[None].to(parameter.device, dtype)
        return {"audio": heard, "audio_valid": torch.ones_like(heard, dtype=torch.bool)}

    def _long_enough(self, samples: Tensor) -> Tensor:
        return F.pad(samples, (0, max(0, round(_SHORTEST * self.sampling_rate) - len(samples))))


def _silent(samples: Tensor) -> bool:
    """Nothing was recorded; normalised by itself, nothing would look like anything."""
    return bool(samples.min() == samples.max())
