"""The transducer's loss on a joint network whose scores, (B, T, U + 1, V) of them, are made in pieces.

Their memory would be the largest of a training by far: 16 utterances of 400 frames and 100 of 1000 tokens have 2.6 GB
of scores in float32, and several times as much with their derivative. Here a piece has at most 16 MiB, of which three
exist at a time, forward and again backward; of all nodes three numbers are kept, and three more by the lattice: 15 MB
in that example. The price is that scores are computed twice. Nothing is pruned: the loss is exact.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear, pad

from ssl_lab.losses.ctc import packed
from ssl_lab.losses.lm import IGNORE, mean_over_known
from ssl_lab.losses.transducer import Lattice, lengths_of, require_fit

_NUMBERS = 1 << 22  # of a piece
_Piece = tuple[slice, slice, slice]  # rows, frames, nodes


def joint_loss(
    heard: Tensor,
    said: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    valid: Tensor | None = None,
    *,
    blank: int = 0,
) -> tuple[Tensor, Tensor]:
    """Nats per token of the transcripts of all ranks, and the share of rows without frames; see `joint_nll`."""
    nll, fits = joint_nll(heard, said, weight, bias, labels, valid, blank=blank)
    return mean_over_known(nll, labels.masked_fill(~fits[:, None], IGNORE)), (~fits).float().mean()


def joint_nll(
    heard: Tensor,
    said: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    valid: Tensor | None = None,
    *,
    blank: int = 0,
) -> tuple[Tensor, Tensor]:
    """`transducer_nll` of the logits linear(tanh(heard_t + said_u), weight, bias), which never exist all at once.

    What lies beyond an utterance's own frames or tokens is not computed at all where it has a piece of its own.

    Args:
        heard: (B, T, J) of the encoder.
        said: (B, U + 1, J) of the prediction network, after no token, the first, the second ...
        weight: (V, J).
        bias: (V,).
        labels: (B, U) int64 token ids, -100 = padding, wherever it stands.
        valid: (B, T) bool, False = padding, which stands at the end.
        blank: the token that leads to the next frame.

    Raises:
        UserError: a label that is the blank or no token, or tokens of another number than the labels.
    """
    require_fit(labels, (len(said), said.shape[1] - 1), len(weight), blank)
    lengths, counts = lengths_of(heard, valid), (labels != IGNORE).sum(1)
    pieces = _pieces(lengths.tolist(), counts.tolist(), max(weight.shape))
    half = heard.dtype
    if torch.is_autocast_enabled(heard.device.type):
        half = torch.get_autocast_dtype(heard.device.type)
    with torch.autocast(heard.device.type, enabled=False):
        exact = torch.promote_types(heard.dtype, torch.float32)
        wanted = pad(packed(labels).clamp(min=0), (0, 1))
        parts = (heard.to(exact), said.to(exact), weight.to(half), bias.to(exact))
        silent, token = _Joint.apply(*parts, wanted, blank, pieces)
        nll: Tensor = Lattice.apply(silent, token[:, :, :-1], lengths, counts)
    return nll, lengths > 0


def _pieces(frames: list[int], tokens: list[int], width: int) -> list[_Piece]:
    """Neighbouring rows as long as they fit into a piece, cut to the longest of them; one that does not fit, in parts.

    `width` is how many numbers a node takes.
    """
    found: list[_Piece] = []
    start = 0
    while start < len(frames):
        stop, longest, most = start + 1, frames[start], tokens[start] + 1
        while stop < len(frames):
            grown = max(longest, frames[stop]), max(most, tokens[stop] + 1)
            if (stop + 1 - start) * grown[0] * grown[1] * width > _NUMBERS:
                break
            stop, (longest, most) = stop + 1, grown
        step = max(1, longest if stop - start > 1 else _NUMBERS // (most * width))
        found += [(slice(start, stop), slice(t, min(t + step, longest)), slice(most)) for t in range(0, longest, step)]
        start = stop
    return found


class _Joint(torch.autograd.Function):
    """Log probabilities of a blank and of the next token, (B, T, U + 1) each, 0 outside of the pieces."""

    @staticmethod
    def forward(
        ctx: Any,
        heard: Tensor,
        said: Tensor,
        weight: Tensor,
        bias: Tensor,
        wanted: Tensor,
        blank: int,
        pieces: list[_Piece],
    ) -> tuple[Tensor, Tensor]:
        silent, token, total = (heard.new_zeros(*heard.shape[:2], said.shape[1]) for _ in range(3))
        for piece in pieces:
            rows, _, nodes = piece
            scores = linear(_hidden(heard, said, piece).to(weight.dtype), weight).to(bias.dtype).add_(bias)
            sums = scores.logsumexp(-1)
            own = wanted[rows, None, nodes, None].expand(-1, scores.shape[1], -1, -1)
            silent[piece], token[piece] = scores[..., blank] - sums, scores.gather(3, own)[..., 0] - sums
            total[piece] = sums
        ctx.save_for_backward(heard, said, weight, bias, wanted, total)
        ctx.blank, ctx.pieces = blank, pieces
        return silent, token

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, from_silent: Tensor, from_token: Tensor) -> tuple[Tensor | None, ...]:
        heard, said, weight, bias, wanted, total = ctx.saved_tensors
        into_heard, into_said, into_bias = (torch.zeros_like(x) for x in (heard, said, bias))
        into_weight = torch.zeros_like(weight, dtype=bias.dtype)
        for piece in ctx.pieces:
            rows, frames, nodes = piece
            hidden = _hidden(heard, said, piece)
            narrow = hidden.to(weight.dtype)
            scores = linear(narrow, weight).to(bias.dtype).add_(bias)
            silent, token = from_silent[piece], from_token[piece]
            scores = scores.sub_(total[piece][..., None]).exp_().mul_(-(silent + token)[..., None])
            scores[..., ctx.blank] += silent
            own = wanted[rows, None, nodes, None].expand(-1, scores.shape[1], -1, -1)
            scores.scatter_add_(3, own, token[..., None])
            into_bias += scores.sum((0, 1, 2))
            scores = scores.to(weight.dtype).flatten(0, 2)
            into_weight += scores.t() @ narrow.flatten(0, 2)
            into = (scores @ weight).to(bias.dtype).view(hidden.shape).mul_(1 - hidden.square())
            into_heard[rows, frames] += into.sum(2)
            into_said[rows, nodes] += into.sum(1)
        return into_heard, into_said, into_weight.to(weight.dtype), into_bias, None, None, None


def _hidden(heard: Tensor, said: Tensor, piece: _Piece) -> Tensor:
    """(rows, frames, nodes, J)."""
    rows, frames, nodes = piece
    return (heard[rows, frames, None] + said[rows, None, nodes]).tanh_()
