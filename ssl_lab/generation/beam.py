"""Beam search: the most likely sequences that a search of limited width finds."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_lab.errors import UserError
from ssl_lab.generation.batch import Prompts
from ssl_lab.generation.generate import GREEDY, first_read, prepare, processed
from ssl_lab.generation.processors import PADDING
from ssl_lab.generation.sampling import Sampling
from ssl_lab.generation.steppers import LanguageModel, stepper
from ssl_lab.nn.mode import evaluating

LOST = -1e9  # a score that no sequence has


@dataclass(frozen=True)
class Beam:
    """How wide to search, and how sequences of different lengths compare: log-probability / penalty(length).

    Args:
        num_beams: sequences that are followed.
        alpha: exponent of the penalty; 0 = plain sums, larger favours longer sequences.
        penalty: `length` = length ** alpha, as in transformers; `gnmt` = ((5 + length) / 6) ** alpha (Wu et al., 2016,
            arXiv:1609.08144, equation 14; used by the Transformer with alpha 0.6). The length counts new tokens, the
            end included.
        early_stopping: True = stop when `num_beams` sequences have ended; False = when no followed one would win at
            its present length; `never` = when none could win at any length.

    Raises:
        UserError: less than one beam, or another penalty.
    """

    num_beams: int = 4
    alpha: float = 1.0
    penalty: Literal["length", "gnmt"] = "length"
    early_stopping: bool | Literal["never"] = False

    def __post_init__(self) -> None:
        if self.num_beams < 1:
            raise UserError(f"num_beams={self.num_beams} must be 1 or more")
        if self.penalty not in ("length", "gnmt"):
            raise UserError(f"penalty={self.penalty}: there are length and gnmt")

    def divisor(self, length: int) -> float:
        """What the log-probability of so many tokens is divided by."""
        return float(length if self.penalty == "length" else (5 + length) / 6) ** self.alpha

    def bound(self, length: int, longest: int) -> float:
        """The divisor at which followed sequences are compared with those that have ended."""
        return self.divisor(longest if self.early_stopping == "never" and self.alpha > 0 else length)


class Beams(NamedTuple):
    """Sequences of each prompt, best first: new tokens (B, K, N) filled with `pad`, and penalised scores (B, K)."""

    tokens: Tensor
    scores: Tensor


class _Followed(NamedTuple):
    """What is known after n new tokens: sequences (B, K, n), and sums of log-probabilities (B, K)."""

    tokens: Tensor
    scores: Tensor


class _Found(NamedTuple):
    """The best that have ended: sequences (B, K, N), penalised scores (B, K), and whether there is one (B, K)."""

    tokens: Tensor
    scores: Tensor
    there: Tensor


@torch.inference_mode()
def beam_search(
    model: LanguageModel,
    prompts: Prompts,
    *,
    max_new_tokens: int | None = None,
    beam: Beam = Beam(),
    sampling: Sampling = GREEDY,
    eos: int | tuple[int, ...] = (),
    pad: int = 0,
    start: int = 0,
    compact: bool = True,
) -> Beams:
    """The `beam.num_beams` best sequences for each prompt.

    Of `sampling` only penalties and processors of one's own apply: nothing is drawn. They act on log-probabilities.
    The other arguments are those of `stream`.

    Raises:
        UserError: see `stream`; a temperature.
    """
    if sampling.temperature != 0:
        raise UserError("beam search draws nothing: leave temperature at 0, or num_beams at 1")
    tokens, valid, new = prepare(model, prompts, max_new_tokens, pad)
    ends = (eos,) if isinstance(eos, int) else eos
    steps, rows, width = stepper(model, start=start, compact=compact), len(tokens), beam.num_beams
    seen = first_read(model, tokens, start)
    if valid is not None and seen is tokens:
        seen = seen.masked_fill(~valid, PADDING)
    prompt = seen.repeat_interleave(width, 0)
    processors = sampling.processors(seen.shape[1], ends)
    offset = torch.arange(rows, device=tokens.device)[:, None] * width

    with evaluating(model):
        logits = steps.begin(tokens, valid, new).repeat_interleave(width, 0)
        followed = _Followed(seen.new_empty(rows, width, 0), torch.full((rows, width), LOST, device=tokens.device))
        followed.scores[:, 0] = 0.0  # all are the same prompt: one of them is enough to begin with
        found = _Found(
            seen.new_full((rows, width, new), pad),
            torch.full((rows, width), LOST, device=tokens.device),
            torch.zeros(rows, width, dtype=torch.bool, device=tokens.device),
        )
        open_ = torch.ones(rows, 1, dtype=torch.bool, device=tokens.device)
        source = torch.arange(rows, device=tokens.device).repeat_interleave(width)
        for length in range(1, new + 1):
            past = torch.cat([prompt, followed.tokens.flatten(0, 1)], 1) if processors else prompt
            gained = processed(logits.float().log_softmax(-1), past, processors)
            candidates, origin = _extended(followed, gained, max(2, 1 + len(ends)) * width)
            last = length == new
            ended = torch.full_like(candidates.scores, last, dtype=torch.bool)
            for end in ends:
                ended |= candidates.tokens[..., -1] == end
            found = _kept(found, candidates, ended & open_, beam, pad)
            best = candidates.scores.add(ended.float(), alpha=LOST).topk(width)
            followed = _Followed(_rows(candidates.tokens, best.indices), best.values)
            full, worst = found.there.all(1, keepdim=True), found.scores.min(1, keepdim=True).values
            hope = followed.scores[:, :1] / beam.bound(length, new)
            open_ &= ~full | (hope > worst)
            if last or not bool(open_.any()) or (beam.early_stopping is True and bool(full.all())):
                break
            parent = (origin.gather(1, best.indices) + offset).flatten()
            steps.reorder(source[parent] if length == 1 else parent)
            logits = steps.step(followed.tokens[..., -1].flatten())
    return Beams(found.tokens[..., :length], found.scores)


def _extended(followed: _Followed, gained: Tensor, count: int) -> tuple[_Followed, Tensor]:
    """The `count` best of all sequences with one token more, and which sequence (B, count) each comes from."""
    rows, width = followed.scores.shape
    total = gained.view(rows, width, -1) + followed.scores[..., None]
    best = total.flatten(1).topk(min(count, total[0].numel()))
    origin, token = best.indices // total.shape[-1], best.indices % total.shape[-1]
    return _Followed(torch.cat([_rows(followed.tokens, origin), token[..., None]], -1), best.values), origin


def _kept(found: _Found, new: _Followed, ended: Tensor, beam: Beam, pad: int) -> _Found:
    """The best of those found and those that ended now among the first `num_beams` candidates."""
    (width, room), length = found.tokens.shape[1:], new.tokens.shape[-1]
    counts = ended & (torch.arange(ended.shape[1], device=ended.device) < width)
    if beam.early_stopping is True:
        counts &= ~found.there.all(1, keepdim=True)
    scores = torch.where(counts, new.scores / beam.divisor(length), LOST)
    tokens = F.pad(new.tokens, (0, room - length), value=pad)
    best = torch.cat([found.scores, scores], 1).topk(width)
    return _Found(
        _rows(torch.cat([found.tokens, tokens], 1), best.indices),
        best.values,
        torch.cat([found.there, counts], 1).gather(1, best.indices),
    )


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """(B, K, N) and (B, M) -> (B, M, N)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
