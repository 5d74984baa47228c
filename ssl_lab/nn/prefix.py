"""Prefix tuning (Li and Liang, 2021, arXiv:2101.00190): learned keys and values before those of every attention."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_lab.errors import UserError
from ssl_lab.nn.attention import Attention
from ssl_lab.nn.linear import Linear
from ssl_lab.nn.mask import AttnMask
from ssl_lab.nn.tuning import Tuning


@dataclass(kw_only=True)
class Prefixes(Tuning):
    """A `Prefix` in every attention of a network, of self- and of cross-attention.

    Every query sees them: padding, packed documents, windows and causality hide none. They have no position, so that
    those of the input stay what they were; with rotations or distances a prefix looks alike from everywhere.

    Args:
        length: how many.
        hidden: width of a tanh network that they come from while they learn, which makes learning steadier (section
            4.3 of the paper; there one such network serves all layers); None = they are parameters themselves.
    """

    length: int = 16
    hidden: int | None = None

    def __post_init__(self) -> None:
        if self.length < 1:
            raise UserError(f"tuning.length={self.length}: give at least one key and value")

    def change(self, network: nn.Module, path: str) -> None:
        """See `Tuning.change`.

        Raises:
            UserError: a network without our attention.
        """
        layers = [module for module in network.modules() if isinstance(module, Attention)]
        if not layers:
            raise UserError(
                f"tuning=prefix: {path} has no attention with keys and values; tuning=lora serves any network"
            )
        for layer in layers:
            like = next(layer.parameters())
            prefix = Prefix(self.length, layer.num_kv_heads, layer.head_dim, hidden=self.hidden)
            layer.prefix = prefix.to(like.device, like.dtype)


class Prefix(nn.Module):
    """Keys and values (B, Hkv, S, Dh) -> (B, Hkv, P + S, Dh), the mask and the score bias that go with them.

    Args:
        length: P.
        num_heads: key and value heads Hkv.
        head_dim: width Dh.
        hidden: see `Prefixes`.
    """

    beside = "prefixes"

    def __init__(self, length: int, num_heads: int, head_dim: int, *, hidden: int | None = None) -> None:
        super().__init__()
        self.length, width = length, num_heads * head_dim
        self.num_heads = num_heads
        self.tokens = nn.Parameter(torch.empty(length, 2 * width if hidden is None else width))
        nn.init.normal_(self.tokens, std=0.02 if hidden is None else 1.0)
        self.net: nn.Module | None = None
        if hidden is not None:
            self.net = nn.Sequential(Linear(width, hidden), nn.Tanh(), Linear(hidden, 2 * width))

    def forward(
        self, k: Tensor, v: Tensor, mask: AttnMask, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor, AttnMask, Tensor | None]:
        tokens = self.tokens if self.net is None else self.net(self.tokens)
        heads = tokens.unflatten(1, (2, self.num_heads, -1)).permute(1, 2, 0, 3).to(k.dtype)
        keys, values = (each.expand(len(k), -1, -1, -1) for each in heads)
        bias = None if bias is None else F.pad(bias, (self.length, 0))
        return torch.cat([keys, k], 2), torch.cat([values, v], 2), mask.after(self.length), bias
