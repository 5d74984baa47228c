"""Connectionist temporal classification (Graves et al., 2006): the likelihood of a transcript over all alignments."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_lab.errors import UserError
from ssl_lab.losses.lm import IGNORE, mean_over_known


def ctc_loss(logits: Tensor, labels: Tensor, valid: Tensor | None = None, *, blank: int = 0) -> tuple[Tensor, Tensor]:
    """Nats per token of the transcripts of all ranks, and the share of rows that have no alignment; see `ctc_nll`.

    Rows without an alignment count for nothing; where no row has one, the loss is 0 and so are its gradients.
    """
    nll, fits = ctc_nll(logits, labels, valid, blank=blank)
    return mean_over_known(nll, labels.masked_fill(~fits[:, None], IGNORE)), (~fits).float().mean()


def ctc_nll(logits: Tensor, labels: Tensor, valid: Tensor | None = None, *, blank: int = 0) -> tuple[Tensor, Tensor]:
    """Negative log likelihood of each transcript in nats (B,), float32 at least, and which rows have an alignment.

    Args:
        logits: (B, T, V) of the frames.
        labels: (B, L) int64 token ids, -100 = padding, wherever it stands.
        valid: (B, T) bool, False = padding, which stands at the end.
        blank: the token that says nothing.

    Returns:
        The nats, 0 for rows that do not fit, and (B,) bool: False for rows without frames, and for those with more
        tokens than frames, where a token that repeats the one before needs a frame more between them.

    Raises:
        UserError: a label that is the blank, or no token.
    """
    known = labels != IGNORE
    if bool((known & ((labels == blank) | (labels < 0) | (labels >= logits.shape[2]))).any()):
        raise UserError(
            f"transcripts hold tokens that this output of {logits.shape[2]} tokens cannot write, or the blank {blank} "
            "itself: the method's vocab_size and blank must be those of the data's tokenizer"
        )
    labels = packed(labels)
    frames = logits.new_full((len(logits),), logits.shape[1], dtype=torch.int64) if valid is None else valid.sum(1)
    fits = (frames_needed(labels) <= frames) & (frames > 0)
    labels = labels.masked_fill(~fits[:, None], IGNORE)
    with torch.autocast(logits.device.type, enabled=False):
        log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        nll = F.ctc_loss(
            log_probs.transpose(0, 1),
            labels.clamp(min=0),
            frames.clamp(min=1),
            (labels != IGNORE).sum(1),
            blank=blank,
            reduction="none",
        )
    return nll.where(fits, 0.0), fits


def share_spoken(logits: Tensor, valid: Tensor | None = None, *, blank: int = 0) -> Tensor:
    """Share of the frames (B, T, V) whose likeliest token is not the blank; 0 for long, while nothing else is learned.

    `valid` as in `ctc_nll`; a float32 scalar.
    """
    said = logits.detach().argmax(-1) != blank
    real = torch.ones_like(said) if valid is None else valid
    return (said & real).sum() / real.sum().clamp(min=1)


def packed(labels: Tensor) -> Tensor:
    """Labels (B, L) with the padding (-100) moved to the end of each row."""
    return labels.gather(1, (labels == IGNORE).long().argsort(dim=1, stable=True))


def frames_needed(labels: Tensor) -> Tensor:
    """(B,) int64: the fewest frames that can say packed labels (B, L)."""
    known = labels != IGNORE
    repeated = (labels[:, 1:] == labels[:, :-1]) & known[:, 1:]
    return known.sum(1) + repeated.sum(1)
