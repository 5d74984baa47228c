"""The parts of a transducer beside its encoder: a prediction network over what was written, and what joins both.

Source: Graves, 2012, arXiv:1211.3711; the Conformer's paper (arXiv:2005.08100) has one layer of LSTM.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from ssl_lab.nn.linear import Linear

State = tuple[Tensor, ...]  # of a predictor, each (layers, B, ...)


class Predictor(Protocol):
    """A network over tokens; `dim` is the width of what it gives."""

    dim: int

    def __call__(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """(B, U) int64 and the state before them -> (B, U, dim) after each of them, and the state after all."""
        ...


class LSTMPredictor(nn.Module):
    """Embedding and LSTM. It runs in the dtype of its parameters, under autocast too: it is small, and it remembers.

    Args:
        vocab_size: tokens V; the blank stands for the beginning.
        dim: width of the embedding and of the state.
        depth: layers.
        dropout: of the embedding, and between layers.
    """

    def __init__(self, vocab_size: int, dim: int = 320, *, depth: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        self.dim = dim
        self.embed, self.dropout = nn.Embedding(vocab_size, dim), nn.Dropout(dropout)
        self.lstm = nn.LSTM(dim, dim, depth, batch_first=True, dropout=dropout if depth > 1 else 0.0)

    def forward(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        with torch.autocast(tokens.device.type, enabled=False):
            out, state = self.lstm(self.dropout(self.embed(tokens)), state)
        return out, state


class StatelessPredictor(nn.Module):
    """Embeddings of the last tokens, joined by a linear map and ReLU (arXiv:2109.07513): no memory beyond them.

    Args:
        vocab_size: tokens V; the blank stands for the beginning, and for what lies before it.
        dim: width.
        context: how many tokens it sees.
        dropout: of the embeddings.
    """

    def __init__(self, vocab_size: int, dim: int = 320, *, context: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.dim, self.context = dim, context
        self.embed, self.dropout = nn.Embedding(vocab_size, dim), nn.Dropout(dropout)
        self.map = Linear(context * dim, dim)

    def forward(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        # the state is (1, B, context - 1) int64; what lies before the first token is that token, the blank
        before = tokens[:, :1].expand(-1, self.context - 1) if state is None else state[0][0]
        seen = torch.cat([before, tokens], 1)
        embedded = self.dropout(self.embed(seen)).unfold(1, self.context, 1).transpose(2, 3).flatten(2)
        return self.map(embedded).relu(), (seen[None, :, seen.shape[1] - self.context + 1 :],)


class Transducer(nn.Module):
    """Scores of the next token from a frame and from what was written: linear(tanh(heard + said)).

    Args:
        dim: width D of the encoder.
        vocab_size: tokens V, the blank among them.
        predictor: makes the prediction network from V.
        joint_dim: width J in which both are added.
        blank: the token that leads to the next frame.
    """

    def __init__(
        self,
        dim: int,
        vocab_size: int,
        *,
        predictor: Callable[[int], Predictor] = LSTMPredictor,
        joint_dim: int = 320,
        blank: int = 0,
    ) -> None:
        super().__init__()
        self.blank, self.predictor = blank, predictor(vocab_size)
        self.hear = Linear(dim, joint_dim)
        self.say = Linear(self.predictor.dim, joint_dim, bias=False)
        self.out = Linear(joint_dim, vocab_size)

    def heard(self, tokens: Tensor) -> Tensor:
        """The encoder's (B, T, D) -> (B, T, J)."""
        return self.hear(tokens)

    def said(self, labels: Tensor) -> Tensor:
        """Packed labels (B, U), -100 at the end -> (B, U + 1, J) after none of them, the first, the second ..."""
        first = labels.new_full((len(labels), 1), self.blank)
        known = (labels >= 0) & (labels < self.out.out_features)  # the loss refuses others in words of its own
        return self.say(self.predictor(torch.cat([first, labels.where(known, self.blank)], 1))[0])

    def advance(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """(B,) int64 written last, the blank at the beginning -> (B, J), and the state to go on from."""
        out, state = self.predictor(tokens[:, None], state)
        return self.say(out[:, 0]), state

    def log_probs(self, heard: Tensor, said: Tensor) -> Tensor:
        """(..., J) twice -> (..., V), float32 at least."""
        scores = self.out((heard + said).tanh())
        return scores.to(torch.promote_types(scores.dtype, torch.float32)).log_softmax(-1)
