"""What a transducer writes: frame by frame the likeliest token until the blank, or a beam (arXiv:1211.3711).

A hypothesis is a sequence of tokens, each with the frame at which it was written.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Prefix = tuple[int, ...]
State = tuple[Tensor, ...]
_NEVER = -math.inf


class Writes(Protocol):
    """What decoding asks of a transducer, see `ssl_lab.nn.transducer.Transducer`."""

    blank: int

    def advance(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """(B,) int64 -> (B, J), and the state after them, tensors (layers, B, ...)."""
        ...

    def log_probs(self, heard: Tensor, said: Tensor) -> Tensor:
        """(..., J) twice -> (..., V)."""
        ...


@dataclass(frozen=True)
class RNNTBeam:
    """How a beam search looks.

    Args:
        width: hypotheses that are kept.
        max_symbols: tokens that one frame may write.
        prune: tokens so many nats less likely than the best of their hypothesis are not tried; inf = all are.
    """

    width: int = 8
    max_symbols: int = 5
    prune: float = 10.0


@dataclass(frozen=True)
class Hypothesis:
    """Tokens, the frame of each, and ln P(tokens | sound) summed over the alignments that were followed."""

    tokens: list[int]
    frames: list[int]
    score: float


@torch.no_grad()
def greedy(net: Writes, heard: Tensor, frames: Tensor, *, max_symbols: int = 5) -> list[Hypothesis]:
    """The likeliest token at each step, of all rows together; the score is that of this one alignment.

    Args:
        net: the transducer.
        heard: (B, T, J).
        frames: (B,) int64, how many of them are real.
        max_symbols: tokens that one frame may write before the next comes.
    """
    rows = len(heard)
    found = [Hypothesis([], [], 0.0) for _ in range(rows)]
    scores = heard.new_zeros(rows, dtype=torch.float64)
    said, state = net.advance(torch.full((rows,), net.blank, device=heard.device))
    for t in range(int(frames.max()) if rows else 0):
        on = (frames > t).nonzero()[:, 0]
        for symbol in range(max_symbols + 1):
            log_probs = net.log_probs(heard[on, t], said[on])
            if symbol == max_symbols:  # nothing but the blank is left
                scores[on] += log_probs[:, net.blank].double()
                break
            value, token = log_probs.max(-1)
            scores[on] += value.double()
            wrote = token != net.blank
            on, token = on[wrote], token[wrote]
            if not len(on):
                break
            for row, one in zip(on.tolist(), token.tolist(), strict=True):
                found[row].tokens.append(one)
                found[row].frames.append(t)
            after, later = net.advance(token, tuple(part[:, on] for part in state))
            said = said.index_copy(0, on, after.to(said.dtype))
            state = tuple(old.index_copy(1, on, new) for old, new in zip(state, later, strict=True))
    return [Hypothesis(h.tokens, h.frames, score) for h, score in zip(found, scores.tolist(), strict=True)]


@torch.no_grad()
def beam_search(net: Writes, heard: Tensor, beam: RNNTBeam | None = None) -> list[Hypothesis]:
    """The likeliest token sequences of one utterance, best first: all take a frame before any takes the next.

    Time-synchronous decoding (Saon et al., 2020, ICASSP): within a frame, hypotheses write up to `max_symbols` tokens,
    the best `width` of each number; those that come to the same tokens by different alignments are one, and their
    probabilities add up. Exact where nothing is pruned.

    Args:
        net: the transducer.
        heard: (T, J).
        beam: width and pruning; `RNNTBeam()` by default.
    """
    beam, known = beam or RNNTBeam(), _Known(net, heard)
    alive: dict[Prefix, tuple[float, Prefix]] = {(): (0.0, ())}  # tokens: ln P, and the frames of the best alignment
    for t, frame in enumerate(heard):
        done: dict[Prefix, tuple[float, Prefix]] = {}
        writing = alive
        for symbol in range(beam.max_symbols + 1):
            log_probs = net.log_probs(frame, known.said(list(writing))).double().cpu()
            longer: list[tuple[float, Prefix, Prefix]] = []
            for (prefix, (score, at)), row in zip(writing.items(), log_probs, strict=True):
                _merge(done, prefix, score + float(row[net.blank]), at)
                if symbol == beam.max_symbols:
                    continue
                least = float(row.max()) - beam.prune
                value, token = row.topk(min(beam.width + 1, len(row)))
                longer += [
                    (score + gain, (*prefix, one), (*at, t))
                    for gain, one in zip(value.tolist(), token.tolist(), strict=True)
                    if one != net.blank and gain >= least and gain > _NEVER
                ]
            # what is less likely than `width` that are done does not come to be one of them
            enough = sorted((score for score, _ in done.values()), reverse=True)[beam.width - 1 : beam.width]
            longer = [each for each in longer if not enough or each[0] > enough[0]]
            writing = {prefix: (score, at) for score, prefix, at in sorted(longer, reverse=True)[: beam.width]}
            if not writing:
                break
        best = sorted(done, key=lambda prefix: done[prefix][0], reverse=True)[: beam.width]
        alive = {prefix: done[prefix] for prefix in best}
        known.keep(alive)
    return [Hypothesis(list(prefix), list(at), score) for prefix, (score, at) in alive.items()]


def _merge(done: dict[Prefix, tuple[float, Prefix]], prefix: Prefix, score: float, at: Prefix) -> None:
    """Add the probability of one more way to `prefix`."""
    if prefix not in done:
        done[prefix] = score, at
        return
    other, best = done[prefix]
    high, low = max(score, other), min(score, other)
    done[prefix] = high + math.log1p(math.exp(low - high)) if high > _NEVER else high, at if score > other else best


class _Known:
    """What the prediction network gave for the prefixes that are followed, so that each is asked for once."""

    def __init__(self, net: Writes, heard: Tensor) -> None:
        self.net = net
        said, state = net.advance(torch.full((1,), net.blank, device=heard.device))
        self.kept: dict[Prefix, tuple[Tensor, State]] = {(): (said, state)}

    def said(self, prefixes: list[Prefix]) -> Tensor:
        """(N, J) after each of the prefixes, whose beginnings are known."""
        new = [prefix for prefix in prefixes if prefix not in self.kept]
        if new:
            states = zip(*(self.kept[prefix[:-1]][1] for prefix in new), strict=True)
            tokens = torch.tensor([prefix[-1] for prefix in new], device=self.kept[()][0].device)
            said, state = self.net.advance(tokens, tuple(torch.cat(part, 1) for part in states))
            for i, prefix in enumerate(new):
                self.kept[prefix] = said[i : i + 1], tuple(part[:, i : i + 1] for part in state)
        return torch.cat([self.kept[prefix][0] for prefix in prefixes])

    def keep(self, prefixes: dict[Prefix, tuple[float, Prefix]]) -> None:
        """Forget all others, but the empty one."""
        self.kept = {prefix: found for prefix, found in self.kept.items() if prefix in prefixes or not prefix}
