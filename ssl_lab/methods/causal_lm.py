"""Causal language modelling (GPT, Radford et al., 2018): predict every next token of packed documents."""

import torch
from torch import Tensor

from ssl_lab.backbones.decoder import Decoder
from ssl_lab.losses.lm import IGNORE, mean_over_tokens, token_nll
from ssl_lab.methods.base import Method
from ssl_lab.types import Batch, Step


class CausalLM(Method):
    """Mean cross-entropy of the next token.

    Args:
        decoder: the language model.
    """

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def step(self, batch: Batch, progress: float) -> Step:
        nll = self.nll(batch)
        return Step(mean_over_tokens(nll, batch["labels"]))

    def nll(self, batch: Batch) -> Tensor:
        """Nats (B, L) float32 of every label, 0 where none is scored."""
        return token_nll(self._encode(batch), self.decoder.head_weight, batch["labels"])

    def _encode(self, batch: Batch) -> Tensor:
        return self.decoder(batch["tokens"], valid=batch.get("valid"), segments=batch.get("segments")).tokens
