"""Answers as spans of a text (SQuAD by BERT, Devlin et al., 2018, arXiv:1810.04805, section 4.2)."""

import torch
from torch import Tensor, nn

from ssl_lab.backbones.read import read, text_features
from ssl_lab.backbones.text import TextEncoder
from ssl_lab.losses.lm import nll
from ssl_lab.methods.base import Method
from ssl_lab.nn.dropout import Dropout
from ssl_lab.nn.linear import Linear
from ssl_lab.types import Batch, Pooling, Step


class SpanQA(Method):
    """Two scores for every token: that the answer begins there, and that it ends there; the mean of both entropies.

    Where a window does not hold the answer, both are to point at the class token.

    Args:
        encoder: a bidirectional text encoder.
        dropout: before the last layer.
        pooling: features for evaluation; None = the class token.
    """

    def __init__(self, encoder: TextEncoder, *, dropout: float = 0.0, pooling: Pooling | None = "mean") -> None:
        super().__init__()
        self.encoder, self.pooling = encoder, pooling
        self.dropout, self.head = Dropout(dropout), Linear(encoder.dim, 2)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def step(self, batch: Batch, progress: float) -> Step:
        logits, span = self.locate(batch), batch["span"]
        start, end = nll(logits[..., 0], span[:, 0]), nll(logits[..., 1], span[:, 1])
        right = (logits.argmax(1) == span).all(1).float().mean()
        return Step((start.mean() + end.mean()) / 2, {"both_right": right})

    def locate(self, batch: Batch) -> Tensor:
        """(B, L, 2) scores of first and last tokens, -inf at padding."""
        logits = self.head(self.dropout(read(self.encoder, batch).tokens))
        valid = batch.get("valid")
        return logits if valid is None else logits.masked_fill(~valid.unsqueeze(-1), -torch.inf)

    def embed(self, batch: Batch) -> Tensor:
        """(B, D) features of question and text together."""
        return text_features(self.encoder, batch, self.pooling)
