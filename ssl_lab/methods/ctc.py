"""Speech recognition by CTC (Graves et al., 2006): a token or the blank for each frame, summed over all alignments."""

import torch
from torch import Tensor, nn

from ssl_lab.backbones.hear import SpeechEncoder, hear, require_frames
from ssl_lab.errors import UserError
from ssl_lab.generation.ctc import CTCBeam, beam_search, greedy
from ssl_lab.losses.ctc import ctc_loss, share_spoken
from ssl_lab.methods.base import Method
from ssl_lab.nn.linear import Linear
from ssl_lab.types import Batch, Step


class CTC(Method):
    """Encoder, linear map to tokens, CTC loss in nats per token of the transcripts of all ranks.

    A row with more tokens than frames (repeated tokens need one more between them) has no alignment: it counts for
    nothing, and `train/too_long` tells the share of such rows.

    Args:
        encoder: of sound, such as `Conformer`.
        vocab_size: tokens V, the blank among them; in YAML 0 = those of the data's tokenizer.
        augment: of features in training, such as `SpecAugment`; None = none.
        blank: its token; that of the padding in the data's tokenizers, 0.

    Raises:
        UserError: no tokens besides the blank, or an AST.
    """

    def __init__(
        self, encoder: SpeechEncoder, vocab_size: int, *, augment: nn.Module | None = None, blank: int = 0
    ) -> None:
        super().__init__()
        if vocab_size < 2 or not 0 <= blank < vocab_size:
            raise UserError(
                f"vocab_size={vocab_size} with blank={blank} leaves nothing to write: take data with transcripts"
            )
        require_frames(encoder, "ctc")
        self.encoder, self.augment, self.blank = encoder, augment, blank
        self.head = Linear(encoder.dim, vocab_size)

    def step(self, batch: Batch, progress: float) -> Step:
        if "labels" not in batch:
            raise UserError("there is nothing to write down: choose data with transcripts, such as data=speech")
        encoded = hear(self.encoder, batch, self.augment)
        logits = self.head(encoded.tokens)
        loss, too_long = ctc_loss(logits, batch["labels"], encoded.valid, blank=self.blank)
        return Step(loss, {"too_long": too_long, "spoken": share_spoken(logits, encoded.valid, blank=self.blank)})

    @torch.no_grad()
    def emissions(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Log probabilities (B, T', V) float32 at least, and the frames of each row (B,) int64."""
        encoded = hear(self.encoder, batch)
        logits = self.head(encoded.tokens)
        exact = torch.promote_types(logits.dtype, torch.float32)
        return logits.to(exact).log_softmax(-1), _count(encoded.tokens, encoded.valid)

    def transcribe(self, batch: Batch, *, num_beams: int = 1) -> list[list[int]]:
        """Token ids of each row: of its likeliest path, or of a prefix beam search."""
        log_probs, frames = self.emissions(batch)
        rows = [row[:length] for row, length in zip(log_probs.cpu(), frames.tolist(), strict=True)]
        if num_beams == 1:
            return [greedy(row, self.blank) for row in rows]
        return [beam_search(row, CTCBeam(num_beams), blank=self.blank)[0][0] for row in rows]


def _count(tokens: Tensor, valid: Tensor | None) -> Tensor:
    if valid is None:
        return torch.full((len(tokens),), tokens.shape[1], device=tokens.device)
    return valid.sum(1)
