"""Feed-forward networks: the per-token half of a block."""

import functools
import math
from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from ssl_lab.nn.dropout import Dropout
from ssl_lab.nn.linear import Linear

Activation = Literal["gelu", "gelu_tanh", "quick_gelu"]


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), an approximation of GELU (CLIP, iGPT), as a SiLU: that has one kernel for its slope."""
    return F.silu(x * 1.702) * (1 / 1.702)


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "quick_gelu": quick_gelu,
}


def ratio(hidden: int, dim: int) -> float:
    """`hidden / dim`, such that int(dim * ratio) is `hidden` again: that is how every library uses it."""
    ratio = hidden / dim
    return ratio if int(dim * ratio) == hidden else math.nextafter(ratio, math.inf)


class MLP(nn.Module):
    """Linear, activation, Linear: (B, L, D) -> (B, L, D)."""

    per_position = True

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        act: Callable[[Tensor], Tensor] = F.gelu,
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = Linear(dim, hidden, bias), act, Linear(hidden, dim, bias)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.dropout(self.act(self.fc1(x))))


class GLU(nn.Module):
    """W_down (act(W_gate x) * W_up x): (B, L, D) -> (B, L, D) (Shazeer, 2020, arXiv:2002.05202).

    SwiGLU with the default activation, GEGLU with `F.gelu`.
    """

    per_position = True

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        act: Callable[[Tensor], Tensor] = F.silu,
        bias: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.gate, self.up, self.act = Linear(dim, hidden, bias), Linear(dim, hidden, bias), act
        self.down, self.dropout = Linear(hidden, dim, bias), Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.dropout(self.act(self.gate(x)) * self.up(x)))


SwiGLU = GLU
