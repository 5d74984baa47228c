"""The transducer's loss (RNN-T; Graves, 2012, arXiv:1211.3711): a transcript's likelihood over all its alignments.

An alignment is a path through the lattice of frames t and tokens written u: a blank leads to (t + 1, u), the next token
to (t, u + 1), and the blank at (T - 1, U) ends it. Nodes of one anti-diagonal t + u depend only on the one before, so
each takes one vectorised step.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from ssl_lab.errors import UserError
from ssl_lab.losses.ctc import packed
from ssl_lab.losses.lm import IGNORE

_NEVER = float("-inf")


def transducer_nll(
    logits: Tensor, labels: Tensor, valid: Tensor | None = None, *, blank: int = 0
) -> tuple[Tensor, Tensor]:
    """Negative log likelihood of each transcript in nats (B,), float32 at least, and which rows (B,) have frames.

    Scores of all tokens at all nodes are many: `ssl_lab.losses.joint` never has them all at once.

    Args:
        logits: (B, T, U + 1, V): of frame t after u tokens, U = L the length of `labels`.
        labels: (B, L) int64 token ids, -100 = padding, wherever it stands.
        valid: (B, T) bool, False = padding, which stands at the end.
        blank: the token that leads to the next frame.

    Raises:
        UserError: a label that is the blank or no token, or logits of another length than the labels.
    """
    require_fit(labels, (len(logits), logits.shape[2] - 1), logits.shape[3], blank)
    lengths, counts = lengths_of(logits, valid), (labels != IGNORE).sum(1)
    with torch.autocast(logits.device.type, enabled=False):
        exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
        total = exact.logsumexp(-1)
        said = packed(labels).clamp(min=0)[:, None, :, None].expand(-1, logits.shape[1], -1, -1)
        token = exact[:, :, :-1].gather(3, said)[..., 0] - total[:, :, :-1]
        nll: Tensor = Lattice.apply(exact[..., blank] - total, token, lengths, counts)
    return nll, lengths > 0


def require_fit(labels: Tensor, shape: tuple[int, int], vocabulary: int, blank: int) -> None:
    """Refuse labels of another shape than (rows, nodes - 1), and those that are the blank or no token.

    Raises:
        UserError: such labels.
    """
    if labels.shape != shape:
        raise UserError(
            f"labels {tuple(labels.shape)} do not fit {tuple(shape)}: a transducer needs a node more than tokens, "
            "(B, T, L + 1, V) and (B, L)"
        )
    if bool(((labels != IGNORE) & ((labels == blank) | (labels < 0) | (labels >= vocabulary))).any()):
        raise UserError(
            f"transcripts hold tokens that this output of {vocabulary} tokens cannot write, or the blank {blank} "
            "itself: the method's vocab_size and blank must be those of the data's tokenizer"
        )


def lengths_of(frames: Tensor, valid: Tensor | None) -> Tensor:
    """(B,) int64 valid frames."""
    return frames.new_full((len(frames),), frames.shape[1], dtype=torch.int64) if valid is None else valid.sum(1)


class Lattice(torch.autograd.Function):
    """Log probabilities of a blank (B, T, U + 1) and of the next token (B, T, U), lengths (B,) twice -> nats (B,).

    Forward sums over the beginnings of paths (alpha), backward over their ends (beta): an edge's gradient is minus the
    probability that a path of this transcript takes it.
    """

    @staticmethod
    def forward(ctx: Any, blank: Tensor, token: Tensor, frames: Tensor, tokens: Tensor) -> Tensor:
        at, node = (torch.arange(n, device=blank.device) for n in blank.shape[1:])
        early, written = at[:, None] < frames[:, None, None], node < tokens[:, None, None]
        blank = blank.masked_fill(~(early & (node <= tokens[:, None, None])), _NEVER)
        token = pad(token, (0, 1)).masked_fill(~(early & written), _NEVER)
        blank, token = (_skewed(edge) for edge in (blank, token))
        alpha = torch.full_like(blank, _NEVER)
        alpha[0, :, 0] = 0
        for d in range(len(alpha) - 1):
            written_one = pad((alpha[d] + token[d])[:, :-1], (1, 0), value=_NEVER)
            alpha[d + 1] = torch.logaddexp(alpha[d] + blank[d], written_one)
        last = (frames - 1 + tokens).clamp(min=0)
        rows = torch.arange(len(frames), device=blank.device)
        total = (alpha + blank)[last, rows, tokens]
        total = total.where(frames > 0, 0.0)
        ctx.save_for_backward(alpha, blank, token, total, last, tokens)
        ctx.num_frames = len(at)
        return -total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        alpha, blank, token, total, last, tokens = ctx.saved_tensors
        rows = torch.arange(len(last), device=last.device)
        beta = torch.full_like(pad(alpha, (0, 1, 0, 0, 0, 1)), _NEVER)  # of the node that an edge leads to
        end = torch.zeros_like(alpha, dtype=torch.bool)
        end[last, rows, tokens] = True
        after_blank, after_token = torch.empty_like(alpha), torch.empty_like(alpha)
        for d in range(len(alpha) - 1, -1, -1):
            after_blank[d] = beta[d + 1, :, :-1].masked_fill(end[d], 0.0)
            after_token[d] = beta[d + 1, :, 1:]
            beta[d, :, :-1] = torch.logaddexp(blank[d] + after_blank[d], token[d] + after_token[d])
        sure = total.masked_fill(total.isinf(), 0.0)[:, None]

        def into(edge: Tensor, after: Tensor) -> Tensor:
            return _straight((alpha + edge + after - sure).exp() * -grad[:, None], ctx.num_frames)

        into_blank, into_token = into(blank, after_blank), into(token, after_token)
        return into_blank, into_token[:, :, :-1], None, None


def _skewed(edge: Tensor) -> Tensor:
    """(B, T, U + 1) -> (T + U, B, U + 1): line d holds the nodes with t + u = d, and -inf where there is none."""
    _, frames, nodes = edge.shape
    node = torch.arange(nodes, device=edge.device)
    at = torch.arange(frames + nodes - 1, device=edge.device)[:, None] - node
    lines = edge[:, at.clamp(0, frames - 1), node].masked_fill((at < 0) | (at >= frames), _NEVER)
    return lines.transpose(0, 1).contiguous()


def _straight(lines: Tensor, frames: int) -> Tensor:
    """Inverse of `_skewed`: (T + U, B, U + 1) -> (B, T, U + 1)."""
    node = torch.arange(lines.shape[2], device=lines.device)
    at = torch.arange(frames, device=lines.device)[:, None] + node
    return lines.transpose(0, 1)[:, at, node]
