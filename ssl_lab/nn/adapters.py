"""Bottleneck adapters (Houlsby et al., 2019, arXiv:1902.00751): a narrow network after every sublayer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast, get_args

from torch import Tensor, nn

from ssl_lab.errors import UserError
from ssl_lab.nn.block import Block
from ssl_lab.nn.ffn import ACTIVATIONS, Activation
from ssl_lab.nn.linear import Linear
from ssl_lab.nn.tuning import Tuning, fits, require_fit


@dataclass(kw_only=True)
class Adapters(Tuning):
    """An `Adapter` after the sublayers of every block, before the way around joins; it begins as the identity.

    The paper lets the norms learn too: `also: ["*norm*"]`.

    Args:
        hidden: width of the bottleneck; 8 to 256 in the paper, 64 for its main results.
        act: activation.
        after: which sublayers, by pattern over their names in a block (`attn`, `mlp`, `cross`, `conv`, ...). The paper
            has both of BERT; `mlp` alone costs half and does nearly as well (arXiv:2005.00247).
    """

    hidden: int = 64
    act: Activation = "gelu"
    after: Sequence[str] = ("*",)

    def __post_init__(self) -> None:
        if self.hidden < 1 or self.act not in get_args(Activation):
            raise UserError(
                f"tuning.hidden={self.hidden} is at least 1, and tuning.act={self.act} one of {', '.join(ACTIVATIONS)}"
            )

    def change(self, network: nn.Module, path: str) -> None:
        """See `Tuning.change`.

        Raises:
            UserError: a network that is not made of our blocks, or a name that fits no sublayer.
        """
        blocks = [module for module in network.modules() if isinstance(module, Block)]
        if not blocks:
            raise UserError(f"tuning=adapter: {path} is not made of our blocks; tuning=lora serves any network")
        require_fit(self.after, [name for block in blocks for name in block], "tuning.after")
        for block in blocks:
            like = next(block.parameters())
            for name, residual in block.items():
                if fits(name, self.after):
                    adapter = Adapter(cast(int, residual.dim), self.hidden, act=self.act)
                    residual.adapter = adapter.to(like.device, like.dtype)


class Adapter(nn.Module):
    """h + W_up act(W_down h), (..., D) -> (..., D); W_up begins at 0, so that the network is what it was.

    The paper begins both near 0 instead.

    Args:
        dim: width D.
        hidden: width of the bottleneck.
        act: activation.
    """

    beside = "adapters"

    def __init__(self, dim: int, hidden: int, *, act: Activation = "gelu") -> None:
        super().__init__()
        self.down, self.up, self.act = Linear(dim, hidden), Linear(hidden, dim), ACTIVATIONS[act]
        for parameter in self.up.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(self.act(self.down(x)))
