"""Prompt tuning: learned tokens before the input of a frozen network (Lester et al., 2021, arXiv:2104.08691)."""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ssl_lab.errors import UserError
from ssl_lab.nn.positions import Positions
from ssl_lab.nn.tuning import Tuning


@dataclass(kw_only=True)
class Prompts(Tuning):
    """Learned tokens before the input.

    Text and sound: they take the first positions, which all others may see, also in packed rows, and their outputs are
    left out (an encoder and decoder: they stand before the source, and the decoder sees them). Positions that are
    computed become so many more, so that texts may be as long as before; a learned table has no more. Images: they
    join the register tokens, as in VPT-shallow (arXiv:2203.12119), and then all registers learn.

    Args:
        length: how many tokens, 20 to 100 in the paper.
        from_words: they begin as rows of a text network's embedding, drawn at random, as the paper advises; else normal
            with the deviation of such rows, or 0.02.
    """

    length: int = 20
    from_words: bool = True

    def __post_init__(self) -> None:
        if self.length < 1:
            raise UserError(f"tuning.length={self.length}: give at least one token")

    @torch.no_grad()
    def change(self, network: nn.Module, path: str) -> None:
        """See `Tuning.change`.

        Raises:
            UserError: a network that takes no prompt.
        """
        if getattr(network, "window", None) is not None:
            raise UserError(f"tuning=prompt: {path} has a window, which hides a prompt; choose tuning=prefix")
        like, dim = next(network.parameters()), cast(int, network.dim)
        table = getattr(network, "embed", None)
        std = float(table.weight.float().std()) if isinstance(table, nn.Embedding) else 0.02
        tokens = torch.randn(self.length, dim, device=like.device, dtype=like.dtype) * std
        if self.from_words and isinstance(table, nn.Embedding):
            tokens = table.weight[torch.randint(len(table.weight), (self.length,))].clone()
        if getattr(network, "scaled", None) == "embedding":
            tokens *= dim**0.5
        if hasattr(network, "registers"):
            former = cast(Tensor | None, network.registers)
            tokens = tokens[None] if former is None else torch.cat([former, tokens[None]], 1)
            network.registers = nn.Parameter(tokens)
        elif hasattr(network, "prompt"):
            network.prompt = Prompt(tokens)
            positions = getattr(network, "source_positions", getattr(network, "positions", None))
            if isinstance(positions, Positions):
                positions.lengthen(self.length)
        else:
            raise UserError(f"tuning=prompt: {path} takes no tokens before its input; tuning=lora serves any network")


class Prompt(nn.Module):
    """P learned tokens of width D.

    Args:
        tokens: (P, D), what they begin as.
    """

    beside = "a prompt"

    def __init__(self, tokens: Tensor) -> None:
        super().__init__()
        self.tokens = nn.Parameter(tokens.clone())

    def __len__(self) -> int:
        return len(self.tokens)

    def before(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, P + L, D)."""
        return torch.cat([self.tokens.to(x.dtype).expand(len(x), -1, -1), x], 1)

    def places(self, at: Tensor) -> Tensor:
        """Positions (L,) or (B, L) of the input -> (P + L,) or (B, P + L): the input's move by P."""
        first = torch.arange(len(self), device=at.device)
        return torch.cat([first.expand(*at.shape[:-1], -1), at + len(self)], -1)
