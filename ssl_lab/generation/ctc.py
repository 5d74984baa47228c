"""From CTC's frame probabilities to tokens, their frames, and words with times (Graves et al., 2006).

A path gives each frame a token or the blank; what it says is itself with repeats merged and blanks dropped. The
blank is token 0 unless told otherwise.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ssl_lab.generation.words import Decodes, Words

Prefix = tuple[int, ...]
Score = Callable[[Prefix], Sequence[float] | Tensor]  # (V,) log probabilities of what follows a prefix
_NEVER = -math.inf


@dataclass(frozen=True)
class CTCBeam:
    """How a prefix beam search looks.

    Args:
        width: prefixes that are kept after each frame.
        prune: in a frame, tokens so many nats less likely than its best are not tried; inf = all are.
        lm_weight: of the language model's log probability.
        reward: added for each token, since a language model alone favours short texts.
    """

    width: int = 16
    prune: float = 10.0
    lm_weight: float = 0.5
    reward: float = 0.0


@dataclass(frozen=True)
class Word:
    """A word and when it was said, in seconds."""

    text: str
    start: float
    end: float


def greedy(log_probs: Tensor, blank: int = 0) -> list[int]:
    """Tokens of the most likely path of one utterance, log_probs (T, V)."""
    path = torch.unique_consecutive(log_probs.argmax(-1))
    return path[path != blank].tolist()


def beam_search(
    log_probs: Tensor, beam: CTCBeam | None = None, score: Score | None = None, blank: int = 0
) -> list[tuple[list[int], float]]:
    """The likeliest token sequences of one utterance, summed over all paths that say them, best first.

    A prefix beam search (Hannun et al., 2014, arXiv:1408.2873): exact where nothing is pruned.

    Args:
        log_probs: (T, V).
        beam: width, pruning and weights; `CTCBeam()` by default.
        score: a language model; asked once for each prefix that is followed. What a method `end` of it gives of a whole
            text counts when the frames are over.
        blank: token that says nothing.

    Returns:
        (tokens, score) of each: ln P(tokens | sound) + lm_weight * ln P(tokens) + reward * tokens.
    """
    beam = beam or CTCBeam()
    following: dict[Prefix, list[float]] = {}
    extra: dict[Prefix, float] = {(): 0.0}
    alive: dict[Prefix, tuple[float, float]] = {(): (0.0, _NEVER)}  # ln P of the paths that end in blank, in a token

    def bonus(prefix: Prefix, token: int) -> float:
        longer = (*prefix, token)
        if longer not in extra:
            gain = beam.reward
            if score is not None:
                if prefix not in following:
                    following[prefix] = torch.as_tensor(score(prefix)).tolist()
                gain += beam.lm_weight * following[prefix][token]
            extra[longer] = extra[prefix] + gain
        return extra[longer]

    for frame in log_probs.double().cpu():
        likely = (frame >= frame.max() - beam.prune).nonzero()[:, 0].tolist()
        tried, frame = [token for token in likely if token != blank], frame.tolist()
        found: dict[Prefix, tuple[float, float]] = {}
        for prefix, (silent, spoken) in alive.items():
            total, last = _add(silent, spoken), prefix[-1] if prefix else blank
            before = found.get(prefix, (_NEVER, _NEVER))
            held = spoken + frame[last] if prefix else _NEVER
            found[prefix] = _add(before[0], total + frame[blank]), _add(before[1], held)
            for token in tried:
                longer = (*prefix, token)
                bonus(prefix, token)
                before = found.get(longer, (_NEVER, _NEVER))
                # the same token twice is two only with a blank between them
                found[longer] = before[0], _add(before[1], (silent if token == last else total) + frame[token])
        value = {prefix: _add(*both) + extra[prefix] for prefix, both in found.items()}
        best = sorted((prefix for prefix in value if value[prefix] > _NEVER), key=value.__getitem__, reverse=True)
        alive = {prefix: found[prefix] for prefix in best[: beam.width]}
    at_end: Callable[[Prefix], float] = getattr(score, "end", lambda prefix: 0.0)
    whole = [(list(p), _add(*both) + extra[p] + beam.lm_weight * at_end(p)) for p, both in alive.items()]
    return sorted(whole, key=lambda one: one[1], reverse=True)


def align(log_probs: Tensor, tokens: Sequence[int], blank: int = 0) -> list[tuple[int, int]]:
    """First and last frame of each token on the likeliest path of log_probs (T, V) that says `tokens`.

    Raises:
        ValueError: so many tokens need more frames; repeated ones need one in between.
    """
    if not tokens:
        return []
    frames, need = len(log_probs), len(tokens) + sum(a == b for a, b in itertools.pairwise(tokens))
    if need > frames:
        raise ValueError(f"{len(tokens)} tokens need {need} frames, and there are {frames}")
    states = torch.tensor([blank, *(x for token in tokens for x in (token, blank))])
    emitted = log_probs.double().cpu()[:, states]
    skips = torch.zeros(len(states), dtype=torch.bool)
    skips[2:] = (states[2:] != blank) & (states[2:] != states[:-2])
    here = torch.full((len(states),), _NEVER, dtype=torch.float64)
    here[:2] = emitted[0, :2]
    came = torch.zeros(frames, len(states), dtype=torch.int64)
    for t in range(1, frames):
        one, two = here.roll(1), here.roll(2).masked_fill(~skips, _NEVER)
        one[0] = _NEVER
        best, came[t] = torch.stack([here, one, two]).max(0)
        here = best + emitted[t]
    state = len(states) - 1 if here[-1] >= here[-2] else len(states) - 2
    path = [state]
    for t in range(frames - 1, 0, -1):
        state -= int(came[t, state])
        path.append(state)
    path.reverse()
    spans: list[list[int]] = [[] for _ in tokens]
    for t, state in enumerate(path):
        if state % 2:
            spans[state // 2].append(t)
    return [(span[0], span[-1]) for span in spans]


def pieces(log_probs: Tensor, longest: int, blank: int = 0) -> list[tuple[int, int]]:
    """Cut (T, V) into (from, to) of at most `longest` frames, in the middle of the longest pause of each second half.

    So a search over a long recording stays small. A cut at a frame whose likeliest token is the blank changes nothing
    in what `greedy` finds.
    """
    silent = log_probs.argmax(-1) == blank
    found, start = [], 0
    while len(log_probs) - start > longest:
        half = start + longest // 2
        part = torch.nn.functional.pad(silent[half : start + longest].long(), (1, 1)).diff()
        begins, ends = (part == 1).nonzero()[:, 0], (part == -1).nonzero()[:, 0]
        end = start + longest
        if len(begins):
            widest = int((ends - begins).argmax())
            end = half + int(begins[widest] + ends[widest]) // 2
        end = max(end, start + 1)
        found.append((start, end))
        start = end
    return [*found, (start, len(log_probs))]


def times(span: tuple[int, int], seconds: float) -> tuple[float, float]:
    """Begin and end in seconds of the frames from the first to the last, which are `seconds` apart.

    Frame t lasts from (t + 0.5) to (t + 1.5) of them, as those of `ssl_lab.backbones.conformer.Conformer` do.
    """
    return (span[0] + 0.5) * seconds, (span[1] + 1.5) * seconds


def words(tokens: Sequence[int], spans: Sequence[tuple[int, int]], tokenizer: Decodes, seconds: float) -> list[Word]:
    """Words between blanks of the text, each from its first to its last token.

    Args:
        tokens: of one utterance.
        spans: first and last frame of each.
        tokenizer: makes text of tokens.
        seconds: from one frame to the next, see `times`.
    """
    text, said = Words(tokenizer), list[Word]()
    word, start, end = "", 0, 0

    def close() -> None:
        nonlocal word
        if word:
            said.append(Word(word, *times((start, end), seconds)))
        word = ""

    for token, (first, last) in zip(tokens, spans, strict=True):
        for letter in text.push(token):
            if letter.isspace():
                close()
                continue
            start = start if word else first
            word, end = word + letter, last
    if rest := text.rest().strip():
        word, start = word + rest, start if word else (spans[-1][0])
        end = spans[-1][1]
    close()
    return said


def _add(a: float, b: float) -> float:
    """ln(e^a + e^b)."""
    if a < b:
        a, b = b, a
    return a if b == _NEVER else a + math.log1p(math.exp(b - a))
