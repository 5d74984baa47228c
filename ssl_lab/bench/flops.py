"""How much arithmetic a step holds, so that a time says how well the device was used."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ssl_lab.nn.attend import KernelName
from ssl_lab.nn.attention import Attention
from ssl_lab.nn.block import Block

DRAWS = 16  # of a step whose work is drawn; see `count`


def count(call: Callable[[], object], network: nn.Module, *, draws: int = 1) -> int:
    """FLOPs of the matrix products and convolutions in `call()`, forward and backward, as torch's counter sees them.

    Where what is drawn decides on the work, as I-JEPA's masks do, it is the mean of `draws` calls, each with a seed of
    its own; where the first two agree there are no more.

    It is the work of the definition: attention has two products forward and four backward, whatever a kernel computes
    again, and blocks are without checkpointing. Attention is written out on a CPU; elsewhere torch's fused kernels,
    which keep no scores in memory, are counted as if it were. Norms, activations and the optimizer are left out.
    """
    kernel: KernelName = "eager" if all(p.device.type == "cpu" for p in network.parameters()) else "sdpa"
    found: list[int] = []
    with _as_defined(network, kernel), torch.random.fork_rng(enabled=draws > 1):
        for seed in range(draws):
            if draws > 1:
                torch.manual_seed(seed)
            with FlopCounterMode(display=False, custom_mapping=_known()) as counter:
                call()
            found.append(int(counter.get_total_flops()))
            if seed == 1 and found[0] == found[1]:
                break
    return sum(found) // len(found)


def _known() -> dict[Any, Callable[..., int]]:
    """Operators that torch's counter does not know, or counts otherwise."""
    known: dict[Any, Callable[..., int]] = {
        getattr(torch.ops.aten, f"_scaled_dot_product_{name}_backward"): _attention_backward_flops
        for name in ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention")
    }
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        known[torch.ops.mkldnn._linear_pointwise] = _linear_flops
    return known


def _attention_backward_flops(
    grad: Sequence[int], q: Sequence[int], k: Sequence[int], v: Sequence[int], *_: Any, **__: Any
) -> int:
    """Of the four products that the derivative has; the kernels compute the scores again, which is a fifth."""
    batch, heads, length, dim = q
    return 4 * batch * heads * length * k[2] * (dim + v[3])


def _linear_flops(x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    """Of the operator that float32 goes through on a CPU; torch's counter does not know it."""
    return 2 * math.prod(x) * weight[0]


@contextmanager
def _as_defined(network: nn.Module, kernel: KernelName) -> Iterator[None]:
    attentions = [m for m in network.modules() if isinstance(m, Attention)]
    blocks = [m for m in network.modules() if isinstance(m, Block)]
    before = [a.kernel for a in attentions], [b.checkpointing for b in blocks]
    try:
        for attention in attentions:
            attention.kernel = kernel
        for block in blocks:
            block.checkpointing = False
        yield
    finally:
        for attention, own in zip(attentions, before[0], strict=True):
            attention.kernel = own
        for block, checkpointing in zip(blocks, before[1], strict=True):
            block.checkpointing = checkpointing
