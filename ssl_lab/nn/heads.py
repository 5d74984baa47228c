"""What sits on an encoder while it is trained, and is thrown away after: projectors, predictors, prototypes."""

import itertools
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_lab.nn.dropout import Dropout
from ssl_lab.nn.linear import Linear, linear
from ssl_lab.nn.norm import BatchNorm


def mlp_head(
    dims: Sequence[int],
    *,
    norm: bool = True,
    last_norm: Literal["none", "affine", "plain"] = "none",
    act: Callable[[], nn.Module] = nn.ReLU,
) -> nn.Sequential:
    """(B, dims[0]) -> (B, dims[-1]): Linear, [BatchNorm], activation; ...; Linear, [last BatchNorm].

    Args:
        dims: widths from input to output; two of them make one Linear.
        norm: a BatchNorm after every hidden Linear, which then has no bias.
        last_norm: BatchNorm after the last Linear (then without bias): none, with gain and bias, or without ("plain").
        act: makes the activation between two layers.
    """
    layers: list[nn.Module] = []
    for wide, narrow in itertools.pairwise(dims[:-1]):
        layers += [Linear(wide, narrow, bias=not norm), *([BatchNorm(narrow)] if norm else []), act()]
    layers.append(Linear(dims[-2], dims[-1], bias=last_norm == "none" and not (norm and len(dims) > 2)))
    if last_norm != "none":
        layers.append(BatchNorm(dims[-1], affine=last_norm == "affine"))
    return nn.Sequential(*layers)


class DINOHead(nn.Module):
    """(B, D) -> (B, K) similarities to K prototypes: MLP, L2 norm, weight-normalised linear map (DINO, section 3.1).

    Args:
        dim: width D of the encoder.
        prototypes: their number K.
        hidden: width of the MLP.
        bottleneck: width in which prototypes live.
        depth: Linear layers of the MLP.
        norm_prototypes: keep every prototype at length 1; else its length is learned.
    """

    def __init__(
        self,
        dim: int,
        prototypes: int = 65536,
        *,
        hidden: int = 2048,
        bottleneck: int = 256,
        depth: int = 3,
        norm_prototypes: bool = True,
    ) -> None:
        super().__init__()
        self.mlp = mlp_head([dim, *[hidden] * (depth - 1), bottleneck], norm=False, act=nn.GELU)
        for module in self.mlp.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.prototypes = Linear(bottleneck, prototypes, bias=False)  # torch's init, as in the official code
        self.length = nn.Parameter(torch.ones(prototypes, 1), requires_grad=not norm_prototypes)

    def forward(self, x: Tensor) -> Tensor:
        weight = F.normalize(self.prototypes.weight, dim=1)
        if self.length.requires_grad:
            weight = weight * self.length
        x = self.mlp(x)
        # float16 has no room for the default's 1e-12 in the denominator
        return linear(F.normalize(x, dim=-1, eps=1e-6 if x.dtype == torch.float16 else 1e-12), weight)


class MaskedLMHead(nn.Module):
    """BERT's output for masked tokens: Linear, GELU, LayerNorm, then the embedding and a bias of its own.

    Args:
        dim: width D of the encoder.
        vocab_size: tokens V.
        eps: of the norm.
    """

    def __init__(self, dim: int, vocab_size: int, *, eps: float = 1e-12) -> None:
        super().__init__()
        self.dense, self.norm = Linear(dim, dim), nn.LayerNorm(dim, eps=eps)
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        nn.init.trunc_normal_(self.dense.weight, std=0.02)
        nn.init.zeros_(self.dense.bias)

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """(..., D), and the embedding (V, D) -> logits (..., V)."""
        return linear(self.norm(F.gelu(self.dense(x))), weight, self.bias)


class PoolerHead(nn.Module):
    """BERT's classifier of a text: Linear and tanh on [CLS], then classes; for next sentence 0 = it is the next.

    Args:
        dim: width D of the encoder.
        num_classes: classes.
        dropout: before the last layer.
    """

    def __init__(self, dim: int, num_classes: int = 2, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.dense, self.dropout, self.out = Linear(dim, dim), Dropout(dropout), Linear(dim, num_classes)
        for layer in (self.dense, self.out):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) class token -> (B, num_classes) logits."""
        return self.out(self.dropout(self.dense(x).tanh()))
