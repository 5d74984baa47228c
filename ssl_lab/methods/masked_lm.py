"""Masked language modelling (BERT, Devlin et al., 2018, arXiv:1810.04805): predict hidden tokens from both sides."""

from torch import Tensor

from ssl_lab.backbones.read import read, text_features
from ssl_lab.backbones.text import TextEncoder
from ssl_lab.errors import UserError
from ssl_lab.losses.lm import IGNORE, mean_over_tokens, nll
from ssl_lab.methods.base import Method
from ssl_lab.nn.heads import MaskedLMHead, PoolerHead
from ssl_lab.types import Batch, Encoded, Pooling, Step
from ssl_lab.weights.text import load_head


class MaskedLM(Method):
    """Mean cross-entropy of the masked tokens; with `next_sentence` plus that of whether sentence B follows A.

    Args:
        encoder: a bidirectional text encoder.
        next_sentence: learn from pairs too: `target` (B,) is 0 where B follows A, 1 where it does not, as
            `MaskPairs` makes it.
        pooling: features for evaluation; None = the class token.
        head_weights: begin with the heads of a BERT of transformers too, `hf:<folder or repository>`; the encoder has
            `weights` of its own.

    Raises:
        UserError: a causal encoder, or weights without such heads.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        *,
        next_sentence: bool = False,
        pooling: Pooling | None = "mean",
        head_weights: str | None = None,
    ) -> None:
        super().__init__()
        if encoder.causal:
            raise UserError("a masked token is told from both sides: set method.encoder.causal to false")
        self.encoder, self.pooling = encoder, pooling
        self.head = MaskedLMHead(encoder.dim, encoder.vocab_size)
        self.pooler = PoolerHead(encoder.dim, 2) if next_sentence else None
        for head in (self.head, self.pooler):
            if head_weights is not None and head is not None:
                load_head(head, head_weights)

    def step(self, batch: Batch, progress: float) -> Step:
        encoded = read(self.encoder, batch)
        logits, wanted = self._masked(encoded, batch)
        loss = mean_over_tokens(nll(logits, wanted), batch["labels"])
        logs: dict[str, Tensor | float] = {"masked_top1": _top1(logits, wanted)}
        if self.pooler is None:
            return Step(loss, logs)
        target = batch["target"]
        if "types" not in batch or int(target.min()) < 0:
            raise UserError("next_sentence=true needs pairs of sentences: choose views that make them, as mask_pairs")
        order = self.pooler(encoded.tokens[:, 0])
        follows = nll(order, target).mean()
        logs |= {"masked": loss.detach(), "next": follows.detach(), "next_top1": _top1(order, target)}
        return Step(loss + follows, logs)

    def nll(self, batch: Batch) -> Tensor:
        """Nats (B, L) float32 of every masked token, 0 elsewhere."""
        found = nll(*self._masked(read(self.encoder, batch), batch))
        scored = batch["labels"] != IGNORE
        return found.new_zeros(scored.shape).masked_scatter(scored, found)

    def _masked(self, encoded: Encoded, batch: Batch) -> tuple[Tensor, Tensor]:
        """Scores (M, V) of the masked tokens, the only ones that go through the head, and what they were (M,)."""
        scored = batch["labels"] != IGNORE
        return self.head(encoded.tokens[scored], self.encoder.embed.weight), batch["labels"][scored]

    def embed(self, batch: Batch) -> Tensor:
        """(B, D) features of the text."""
        return text_features(self.encoder, batch, self.pooling)


def _top1(logits: Tensor, wanted: Tensor) -> Tensor:
    return (logits.detach().argmax(-1) == wanted).sum() / max(1, len(wanted))
