"""Answers as spans of a text (SQuAD by BERT, Devlin et al., 2018, arXiv:1810.04805, section 4.2)."""

import torch
from torch import Tensor, nn

from ssl_lab.backbones.read import read, text_features
from ssl_lab.backbones.text import TextEncoder
from ssl_lab.losses.lm import nll
from ssl_lab.methods.base import Method
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
        self.dropout, self.head = nn.Dropout(dropout), Linear(encoder.dim, 2)
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


def best_span(logits: Tensor, allowed: Tensor, max_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best first and last token of each row: the largest sum of both scores over all spans that are possible.

    That is what n-best lists approximate; with at most `max_tokens` tokens all pairs can be compared.

    Args:
        logits: (B, L, 2) scores of first and last tokens.
        allowed: (B, L) bool, tokens that may begin or end an answer.
        max_tokens: of an answer.

    Returns:
        Scores (B,), first and last tokens (B,) int64; the score is -inf where nothing is allowed.
    """
    start, end = logits.masked_fill(~allowed.unsqueeze(-1), -torch.inf).float().unbind(-1)
    length = start.shape[1]
    later = torch.arange(length, device=start.device)[:, None] + torch.arange(max_tokens, device=start.device)
    ends = end[:, later.clamp(max=length - 1)].masked_fill(later >= length, -torch.inf)  # (B, L, max_tokens)
    score, place = (start.unsqueeze(-1) + ends).flatten(1).max(1)
    first = place // max_tokens
    return score, first, first + place % max_tokens
