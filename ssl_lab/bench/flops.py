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
from ssl_lab.nn.recompute import recomputing

DRAWS = 16  # of a step whose work is drawn; see `count`


def count(call: Callable[[], object], network: nn.Module, *, draws: int = 1) -> int:
    """FLOPs of the matrix products and convolutions in `call()`, forward and backward, as torch's counter sees them.

    Where what is drawn decides on the work, as I-JEPA's masks do, it is the mean of `draws` calls, each with a seed of
    its own; where the first two agree there are no more.

    It is the work of the definition: attention has two products forward and four backward, whatever a kernel computes
    again, and what checkpointed blocks compute again is left out, as are norms, activations and the optimizer. Memory
    is that of a step: blocks stay checkpointed, and attention has its own kernel, or torch's where the counter would
    not see it.
    """
    found: list[int] = []
    with _visible(network), torch.random.fork_rng(devices=[], enabled=draws > 1):
        for seed in range(draws):
            if draws > 1:
                torch.manual_seed(seed)
            with FlopCounterMode(display=False, custom_mapping=_known()) as counter:
                again = _Recomputed(network, counter)
                try:
                    call()
                finally:
                    again.remove()
            found.append(int(counter.get_total_flops()) - again.flops)
            if seed == 1 and found[0] == found[1]:
                break
    return sum(found) // len(found)


def _known() -> dict[Any, Callable[..., int]]:
    """Operators that torch's counter does not know, or counts otherwise."""
    known: dict[Any, Callable[..., int]] = {
        getattr(torch.ops.aten, f"_scaled_dot_product_{name}_backward"): _attention_backward_flops
        for name in ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention")
    }
    known[torch.ops.aten.convolution_backward] = _convolution_backward_flops
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        known[torch.ops.mkldnn._linear_pointwise] = _linear_flops
    return known


def _attention_backward_flops(
    grad: Sequence[int], q: Sequence[int], k: Sequence[int], v: Sequence[int], *_: Any, **__: Any
) -> int:
    """Of the four products that the derivative has; the kernels compute the scores again, which is a fifth."""
    batch, heads, length, dim = q
    return 4 * batch * heads * length * k[2] * (dim + v[3])


def _convolution_backward_flops(
    grad: Sequence[int],
    x: Sequence[int],
    weight: Sequence[int],
    _bias: object,
    _stride: object,
    _padding: object,
    _dilation: object,
    transposed: bool,
    _added: object,
    _groups: int,
    wanted: Sequence[bool],
    **_: Any,
) -> int:
    """Of the gradients of input and weight, each as much as forward; torch's counter takes groups for dense."""
    one = 2 * grad[0] * math.prod((x if transposed else grad)[2:]) * math.prod(weight)
    return one * (wanted[0] + wanted[1])


def _linear_flops(x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    """Of the operator that float32 goes through on a CPU; torch's counter does not know it."""
    return 2 * math.prod(x) * weight[0]


@contextmanager
def _visible(network: nn.Module) -> Iterator[None]:
    """Attention by kernels that the counter sees: elsewhere than on a CPU "auto" may be one that it does not."""
    attentions = [m for m in network.modules() if isinstance(m, Attention)]
    before = [attention.kernel for attention in attentions]
    on_cpu = all(p.device.type == "cpu" for p in network.parameters())
    seen: list[KernelName] = ["eager", "sdpa", "auto"] if on_cpu else ["eager", "sdpa"]
    try:
        for attention in attentions:
            attention.kernel = attention.kernel if attention.kernel in seen else "sdpa"
        yield
    finally:
        for attention, own in zip(attentions, before, strict=True):
            attention.kernel = own


class _Recomputed:
    """FLOPs of the second forward passes of checkpointed blocks, by `counter`, which sees them like any others."""

    def __init__(self, network: nn.Module, counter: FlopCounterMode) -> None:
        self.flops, self._counter, self._depth, self._start = 0, counter, 0, 0
        blocks = [m for m in network.modules() if isinstance(m, Block) and m.checkpointing]
        residuals = dict.fromkeys(residual for block in blocks for residual in block.values())
        self._hooks = [r.register_forward_pre_hook(self._enter) for r in residuals]
        self._hooks += [r.register_forward_hook(self._leave, always_call=True) for r in residuals]

    def _enter(self, *_: object) -> None:
        if recomputing():
            if self._depth == 0:
                self._start = self._counter.get_total_flops()
            self._depth += 1

    def _leave(self, *_: object) -> None:
        if recomputing():
            self._depth -= 1
            if self._depth == 0:
                self.flops += self._counter.get_total_flops() - self._start

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
