"""What is done to the scores of the next token before one is chosen. Each is called with (tokens, logits).

The usual order is that of `Sampling.processors`: repetition, minimum length and the user's own, then temperature,
top-k, top-p.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ssl_lab.errors import UserError

NEVER = float("-inf")
PADDING = -1  # stands for left padding in the tokens that processors see


class LogitsProcessor(Protocol):
    """Anything that changes scores: constrained decoding, bans, biases of one's own."""

    def __call__(self, tokens: Tensor, logits: Tensor) -> Tensor:
        """Scores (B, V) after `tokens` (B, L), prompts and what was generated, -1 where a row is padded -> (B, V)."""
        ...


@dataclass(frozen=True)
class Temperature:
    """Logits divided by `value`: below 1 sharper, above 1 flatter.

    Raises:
        UserError: `value` is not above 0; `Sampling` takes 0 as greedy.
    """

    value: float

    def __post_init__(self) -> None:
        if not self.value > 0:
            raise UserError(f"temperature={self.value} must be above 0; 0 means greedy and needs no processor")

    def __call__(self, tokens: Tensor, logits: Tensor) -> Tensor:
        return logits / self.value


@dataclass(frozen=True)
class TopK:
    """Only the `count` best, and those that tie with the last of them (Fan et al., 2018, arXiv:1805.04833).

    Raises:
        UserError: `count` is below 1.
    """

    count: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UserError(f"top_k={self.count} must be 1 or more; null keeps every token")

    def __call__(self, tokens: Tensor, logits: Tensor) -> Tensor:
        least = logits.topk(min(self.count, logits.shape[-1]), -1).values[..., -1:]
        return logits.masked_fill(logits < least, NEVER)


@dataclass(frozen=True)
class TopP:
    """The smallest set of best tokens whose probability reaches `mass` (nucleus sampling, arXiv:1904.09751).

    The token that crosses `mass` belongs to it, so one always stays.

    Raises:
        UserError: `mass` outside (0, 1].
    """

    mass: float

    def __post_init__(self) -> None:
        if not 0 < self.mass <= 1:
            raise UserError(f"top_p={self.mass} must be above 0 and at most 1; null keeps every token")

    def __call__(self, tokens: Tensor, logits: Tensor) -> Tensor:
        ordered, order = logits.sort(-1)
        below = ordered.softmax(-1).cumsum(-1)  # from the least likely: what the better ones leave over
        dropped = below <= 1 - self.mass
        dropped[..., -1] = False
        return logits.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), NEVER)


@dataclass(frozen=True)
class RepetitionPenalty:
    """Tokens that occurred, prompt included, lose: positive scores are divided, negative multiplied.

    CTRL (Keskar et al., 2019, arXiv:1909.05858, section 4.1), for scores of either sign.

    Raises:
        UserError: `factor` is not above 0.
    """

    factor: float

    def __post_init__(self) -> None:
        if not self.factor > 0:
            raise UserError(f"repetition_penalty={self.factor} must be above 0; 1 changes nothing")

    def __call__(self, tokens: Tensor, logits: Tensor) -> Tensor:
        rows, vocab = logits.shape
        places = torch.where(tokens == PADDING, vocab, tokens)
        seen = logits.new_zeros(rows, vocab + 1, dtype=torch.bool).scatter_(1, places, True)[:, :vocab]
        return torch.where(seen, torch.where(logits < 0, logits * self.factor, logits / self.factor), logits)


@dataclass(frozen=True)
class MinNewTokens:
    """No end before `count` new tokens.

    Args:
        count: new tokens at least.
        eos: ids that end a text.
        start: index of the first new token in `tokens`: the padded length of the prompts.
    """

    count: int
    eos: tuple[int, ...]
    start: int

    def __call__(self, tokens: Tensor, logits: Tensor) -> Tensor:
        if tokens.shape[1] - self.start >= self.count or not self.eos:
            return logits
        return logits.index_fill(1, torch.tensor(self.eos, device=logits.device), NEVER)


@dataclass(frozen=True)
class Below:
    """Only ids below `count`: an embedding may have more rows than its tokenizer has tokens."""

    count: int

    def __call__(self, tokens: Tensor, logits: Tensor) -> Tensor:
        return logits.masked_fill(torch.arange(logits.shape[1], device=logits.device) >= self.count, NEVER)


@dataclass(frozen=True)
class Allowed:
    """Only one of `choices` may be generated, then the end: an example of constrained decoding by a trie.

    Args:
        choices: texts, or sequences of ids.
        eos: id that ends a text.
        start: index of the first new token in `tokens`; None = what generation says: the padded length of a decoder's
            prompts, 1 after the start token of an encoder and decoder.
        encode: makes ids of a text, e.g. `tokenizer.encode`; needed where choices are texts.

    Raises:
        UserError: no choice, an empty one, or a text without `encode`.
    """

    choices: Sequence[str | Sequence[int]]
    eos: int
    start: int | None = None
    encode: Callable[[str], Sequence[int]] | None = None
    _next: dict[tuple[int, ...], list[int]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        after: dict[tuple[int, ...], list[int]] = {}
        for choice in self.choices:
            ids = (*self._ids(choice), self.eos)
            if len(ids) == 1:
                raise UserError(f"choice {choice!r} has no tokens: leave it out")
            for i, token in enumerate(ids):
                following = after.setdefault(ids[:i], [])
                if token not in following:
                    following.append(token)
        if not after:
            raise UserError("there is nothing to choose from: give one choice at least")
        object.__setattr__(self, "_next", after)

    def _ids(self, choice: str | Sequence[int]) -> Sequence[int]:
        if not isinstance(choice, str):
            return choice
        if self.encode is None:
            raise UserError(f"choice {choice!r} is a text: give encode=tokenizer.encode, or its ids")
        return self.encode(choice)

    def __call__(self, tokens: Tensor, logits: Tensor) -> Tensor:
        out = torch.full_like(logits, NEVER)
        for row, past in enumerate(tokens[:, self.start :].tolist()):
            following = self._next.get(tuple(past), [self.eos])  # a finished row gives padding whatever is said here
            out[row, following] = logits[row, following]
        return out
