"""Text of a model that sees: images are encoded once, prompts with markers go in as they are embedded."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ssl_lab.backbones.decoder import Decoder
from ssl_lab.backbones.flamingo import GatedVisionLanguage
from ssl_lab.backbones.vlm import VisionLanguage
from ssl_lab.errors import UserError
from ssl_lab.generation.batch import Prompts, pad_left, room_of
from ssl_lab.generation.generate import GREEDY, continued
from ssl_lab.generation.looking import Looking
from ssl_lab.generation.processors import PADDING
from ssl_lab.generation.sampling import Sampling
from ssl_lab.generation.steppers import Cached
from ssl_lab.nn.cache import KVCache


class Seeing(Cached):
    """Steps of the decoder of a vision-language model; the cache holds the tokens of the images too.

    Args:
        model: what sees and speaks.
        visual: (N, Q, D) of the images that the prompts mention, in order; see `VisionLanguage.see`.
    """

    decoder: Any

    def __init__(self, model: VisionLanguage, visual: Tensor | None) -> None:
        super().__init__(model.decoder)  # type: ignore[arg-type]
        self.model, self.visual = model, visual

    def begin(self, tokens: Tensor, valid: Tensor | None, new: int) -> Tensor:
        visual = self.visual
        if visual is None:
            visual = self.decoder.embed.weight.new_zeros(0, 1, self.decoder.dim)
        x = self.model.splice(tokens, visual, valid=valid, side="left")
        self.length = x.embedded.shape[1]
        self.valid = None if x.valid is None else torch.cat([x.valid, x.valid.new_ones(len(tokens), new)], 1)
        ours = isinstance(self.decoder, Decoder)
        self.cache = KVCache(self.length + new, window=self.decoder.window) if ours else self.decoder.new_cache()
        out = self.decoder(x.embedded, valid=x.valid, prefix=x.prefix, cache=self.cache)
        scores: Tensor = self.decoder.logits(out.tokens[:, -1])
        return scores


def stream_seen(
    model: VisionLanguage,
    prompts: Prompts,
    visual: Tensor | None,
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    eos: int | Sequence[int] = (),
    pad: int = 0,
) -> Iterator[Tensor]:
    """Yield the tokens (B,) int64 that follow the prompts, as `ssl_lab.generation.generate.stream` does.

    Args:
        model: what sees and speaks.
        prompts: ids with a marker for each image, one sequence a row; they may differ in length.
        visual: (N, Q, D) of the images, see `VisionLanguage.see`; None = there are none.
        max_new_tokens: tokens to generate at most; fewer where the context holds no more.
        sampling: how a token is chosen; greedy by default.
        eos: id or ids that end a text; they are yielded too.
        pad: id that fills rows after their end.

    Raises:
        UserError: an empty prompt, unknown ids, markers without their images, or a prompt that fills the context; what
            concerns images at the first step.
    """
    decoder = model.decoder
    tokens, valid = pad_left(prompts, pad, decoder.embed.weight.device)
    known = tokens.masked_fill(tokens == model.image_token, 0)
    if max_new_tokens < 1 or int(known.max()) >= decoder.vocab_size:
        raise UserError(
            f"max_new_tokens={max_new_tokens} must be at least 1, and the prompt's largest token {int(known.max())} "
            f"below {decoder.vocab_size}: use the tokenizer that the model was trained with"
        )
    new = min(max_new_tokens, _room(model, tokens, valid, visual))
    seen = tokens.masked_fill(tokens == model.image_token, PADDING)
    ends = (eos,) if isinstance(eos, int) else tuple(eos)
    steps = Looking(model, visual) if isinstance(model, GatedVisionLanguage) else Seeing(model, visual)
    return continued(model, steps, tokens, valid, new, sampling, ends, (pad, 0), seen=seen)


def _room(model: VisionLanguage, tokens: Tensor, valid: Tensor | None, visual: Tensor | None) -> int:
    """Tokens that the context holds behind the longest of the prompts (B, L) and its images."""
    context = room_of(model.decoder)
    beside = 0 if visual is None or isinstance(model, GatedVisionLanguage) else visual.shape[1] - 1
    marked = tokens == model.image_token
    real = torch.ones_like(marked) if valid is None else valid
    length = int((real.sum(1) + beside * (marked & real).sum(1)).max())
    if length >= context:
        raise UserError(
            f"a prompt of {length} tokens with its images leaves no room in the model's context of {context}: shorten "
            "it, or pool the images"
        )
    return context - length
