"""Flamingo (arXiv:2204.14198): a frozen language model learns to look at images through gated cross-attention."""

from collections.abc import Sequence

import torch

from ssl_lab.backbones.flamingo import GatedVisionLanguage
from ssl_lab.backbones.vlm import Part
from ssl_lab.errors import UserError
from ssl_lab.methods.llava import LLaVA
from ssl_lab.types import Batch, Step


class Flamingo(LLaVA):
    """Mean cross-entropy of the answers' tokens; gated blocks, connector and the marker's embedding learn.

    Several images in a row are examples in context: a token sees the last image before it, and what was said of the
    others.

    Args:
        model: image encoder, connector and decoder with gated blocks.
        train: parts that learn beside the gated blocks: connector, and where nothing is pre-trained vision and decoder.
        weights: begin from a run of this method: its run folder or a checkpoint in it.
        cache_features: see `LLaVA`.

    Raises:
        UserError: unknown parts, or weights of another connector, image encoder or decoder.
    """

    model: GatedVisionLanguage

    def __init__(
        self,
        model: GatedVisionLanguage,
        *,
        train: Sequence[Part] = ("connector",),
        weights: str | None = None,
        cache_features: bool = False,
    ) -> None:
        if not isinstance(model, GatedVisionLanguage):
            raise UserError("flamingo needs a language model with gated blocks: set method.model as in conf/method")
        super().__init__(model, train=train, weights=weights, cache_features=cache_features)

    def step(self, batch: Batch, progress: float) -> Step:
        step = super().step(batch, progress)
        gates = [p.detach() for name, p in self.model.named_parameters() if name.endswith(".gate")]
        return Step(step.loss, {**step.logs, "gate": torch.stack(gates).tanh().abs().mean()})
