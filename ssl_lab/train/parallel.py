"""What is done to a network before training, block by block: activation checkpointing, then compilation."""

from dataclasses import dataclass

from torch import nn

from ssl_lab.nn.block import Block


@dataclass
class Parallel:
    """State-dict keys never change: both act in place.

    Args:
        checkpoint_blocks: recompute a block's activations in the backward pass: less memory, about a third more work.
        compile: torch.compile each block; the first steps take minutes on a CPU, later ones run faster.
    """

    checkpoint_blocks: bool = False
    compile: bool = False

    def __call__(self, network: nn.Module) -> None:
        """Apply to every `Block` of `network`."""
        for block in network.modules():
            if isinstance(block, Block):
                block.checkpointing = self.checkpoint_blocks
                if self.compile and block._compiled_call_impl is None:
                    block.compile()
