"""Text of a language model with gated cross-attention, and its prompts with examples (Flamingo)."""

from collections.abc import Sequence

from torch import Tensor

from ssl_lab.backbones.flamingo import GatedVisionLanguage
from ssl_lab.generation.steppers import Cached
from ssl_lab.nn.mask import AttnMask


class Looking(Cached):
    """Steps of such a model: images are encoded once, and what comes last looks at the last image.

    Args:
        model: what looks and speaks.
        visual: (N, R, D) of the images that the prompts mention, in order, see `GatedVisionLanguage.see`; None = none.
    """

    def __init__(self, model: GatedVisionLanguage, visual: Tensor | None) -> None:
        super().__init__(model.decoder)
        self.model, self.visual = model, visual

    def begin(self, tokens: Tensor, valid: Tensor | None, new: int) -> Tensor:
        visual = self.model.marker.new_zeros(0, 1, self.decoder.dim) if self.visual is None else self.visual
        self.memory, self.mask = self.model.media(tokens, visual, valid=valid)
        return super().begin(tokens, valid, new)

    def reorder(self, rows: Tensor) -> None:
        super().reorder(rows)
        self.memory = self.memory[rows]
        segments, asked = self.mask.segments, self.mask.asked
        assert segments is not None and asked is not None
        self.mask = AttnMask(segments=segments[rows], asked=asked[rows])

    def _scores(self, tokens: Tensor) -> Tensor:
        valid = None if self.valid is None else self.valid[:, : self.length]
        out = self.model.read(tokens, self.memory, self.mask, valid=valid, cache=self.cache)
        assert self.mask.asked is not None
        self.mask = AttnMask(segments=self.mask.segments, asked=self.mask.asked[:, -1:])
        return self.decoder.logits(out.tokens[:, -1])


def few_shot(examples: Sequence[Sequence[int]], query: Sequence[int], *, image_token: int, end: int) -> list[int]:
    """A prompt with examples in context (section 3.1.4 of the paper): images with their texts, then a query.

    Args:
        examples: tokens that belong to each example's image.
        query: tokens that begin the answer about the last image; may be empty.
        image_token: the marker, which comes first of each.
        end: what stands behind every example's text.

    Gives `len(examples) + 1` markers in one row; the images go to the model in the same order.
    """
    shots = [token for text in examples for token in (image_token, *text, end)]
    return [*shots, image_token, *query]
