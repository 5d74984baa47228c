"""How much arithmetic a step holds, so that a time says how well the device was used."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ssl_lab.nn.attention import Attention
from ssl_lab.nn.block import Block


def count(call: Callable[[], object], network: nn.Module) -> int:
    """FLOPs of the matrix products and convolutions in `call()`, forward and backward, as torch's counter sees them.

    It is the work of the definition: attention is counted written out (two products forward, four backward, nothing
    recomputed) and blocks without checkpointing, so that a kernel which recomputes earns no credit for it. Norms,
    activations and the optimizer are left out.
    """
    onednn = (
        {torch.ops.mkldnn._linear_pointwise: _linear_flops} if hasattr(torch.ops.mkldnn, "_linear_pointwise") else {}
    )
    with _as_defined(network), FlopCounterMode(display=False, custom_mapping=onednn) as counter:
        call()
    return int(counter.get_total_flops())


def _linear_flops(x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    """Of the operator that float32 goes through on a CPU; torch's counter does not know it."""
    return 2 * math.prod(x) * weight[0]


@contextmanager
def _as_defined(network: nn.Module) -> Iterator[None]:
    attentions = [m for m in network.modules() if isinstance(m, Attention)]
    blocks = [m for m in network.modules() if isinstance(m, Block)]
    before = [a.kernel for a in attentions], [b.checkpointing for b in blocks]
    try:
        for attention in attentions:
            attention.kernel = "eager"
        for block in blocks:
            block.checkpointing = False
        yield
    finally:
        for attention, kernel in zip(attentions, before[0], strict=True):
            attention.kernel = kernel
        for block, checkpointing in zip(blocks, before[1], strict=True):
            block.checkpointing = checkpointing
