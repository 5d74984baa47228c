"""What is done to a network before training: float8, precision of the residual stream, checkpointing, compilation."""

from dataclasses import dataclass

from torch import nn

from ssl_lab.errors import UserError
from ssl_lab.nn.block import Block, Transformer
from ssl_lab.nn.float8 import Float8


@dataclass
class Parallel:
    """State-dict keys never change: all act in place.

    Args:
        checkpoint_blocks: recompute a block's activations in the backward pass: less memory, about a third more work.
        compile: torch.compile each block; the first steps take minutes on a CPU, later ones run faster.
        fp32_residual: see `Transformer`; matters under mixed precision only.
        float8: products of blocks' linear maps in 8 bits. It comes first: what is compiled holds the converted maps.
    """

    checkpoint_blocks: bool = False
    compile: bool = False
    fp32_residual: bool = False
    float8: Float8 | None = None

    def __call__(self, network: nn.Module) -> None:
        """Apply to every `Transformer` and `Block` of `network`.

        Raises:
            UserError: see `require`.
        """
        self.require(network)
        if self.float8 is not None:
            self.float8(network)
        for module in network.modules():
            if isinstance(module, Transformer):
                module.fp32_residual = self.fp32_residual
            if isinstance(module, Block):
                module.checkpointing = self.checkpoint_blocks
                if self.compile and module._compiled_call_impl is None:
                    module.compile()

    def require(self, network: nn.Module) -> None:
        """Check before training that there is something to act on.

        Raises:
            UserError: checkpointing or compilation is wanted, and no part of `network` is made of `Block`s.
        """
        asked = [key for key in ("checkpoint_blocks", "compile") if getattr(self, key)]
        if asked and not any(isinstance(module, Block) for module in network.modules()):
            raise UserError(
                f"{asked[0]}=true acts on blocks of this library, and {type(network).__name__} has none (a network "
                f"of timm or transformers): leave it out, or take another backbone="
            )
