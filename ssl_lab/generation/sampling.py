"""How the next token is chosen from its scores."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ssl_lab.errors import UserError
from ssl_lab.generation.processors import (
    Allowed,
    LogitsProcessor,
    MinNewTokens,
    RepetitionPenalty,
    Temperature,
    TopK,
    TopP,
)


@dataclass(frozen=True)
class Sampling:
    """What to do with scores, and how to draw.

    Args:
        temperature: 0 = the most likely token (greedy); else scores are divided by it and a token is drawn.
        top_k: draw from so many best tokens.
        top_p: draw from the smallest set with so much probability.
        repetition_penalty: above 1 makes tokens that occurred less likely.
        min_new_tokens: no end before so many.
        seed: of the draws; the same seed gives the same text.
        extra: processors of one's own, used before the temperature.

    Raises:
        UserError: a value outside its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0
    seed: int = 0
    extra: Sequence[LogitsProcessor] = ()

    def __post_init__(self) -> None:
        if self.temperature == 0 and (self.top_k is not None or self.top_p is not None):
            name, value = ("top_p", self.top_p) if self.top_k is None else ("top_k", self.top_k)
            raise UserError(
                f"{name}={value} limits what is drawn, and neither beam search nor temperature=0 draws anything: leave "
                f"{name} out, or set num_beams=1 and a temperature above 0"
            )
        self.processors(0, ())  # each checks its value

    def processors(self, start: int, eos: Sequence[int]) -> list[LogitsProcessor]:
        """All that is done to the scores, in order.

        Args:
            start: index of the first new token in the tokens that the processors see.
            eos: ids that end a text.
        """
        found: list[LogitsProcessor] = []
        if self.repetition_penalty != 1.0:
            found.append(RepetitionPenalty(self.repetition_penalty))
        if self.min_new_tokens > 0:
            found.append(MinNewTokens(self.min_new_tokens, tuple(eos), start))
        for each in self.extra:
            if isinstance(each, Allowed) and each.start is None:
                found.append(replace(each, start=start))
            else:
                found.append(each)
        if self.temperature != 0:
            found += [] if self.temperature == 1.0 else [Temperature(self.temperature)]
            found += [] if self.top_k is None else [TopK(self.top_k)]
            found += [] if self.top_p is None else [TopP(self.top_p)]
        return found

    def generator(self, device: torch.device) -> torch.Generator | None:
        """The source of the draws, None where nothing is drawn."""
        return None if self.temperature == 0 else torch.Generator(device).manual_seed(self.seed)

    def choose(self, logits: Tensor, generator: torch.Generator | None) -> Tensor:
        """Processed scores (B, V) -> tokens (B,) int64."""
        if generator is None:
            return logits.argmax(-1)
        return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
