"""What a training step of an experiment holds and costs, from two small batches: the facts that a plan is made of."""

import contextlib
import ctypes
import gc
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ssl_lab.bench.flops import DRAWS, count
from ssl_lab.bench.step import TrainStep
from ssl_lab.bench.timing import timed
from ssl_lab.nn.attention import Attention


@dataclass(frozen=True)
class Probe:
    """Bytes and FLOPs of one step at one batch size on one device.

    Attributes:
        batch_size: rows.
        flops: of forward and backward, see `bench.flops.count`.
        saved: bytes that forward keeps for backward besides parameters and buffers.
        inputs: bytes of the batch.
        seconds: median of the timed steps; None if none was timed.
    """

    batch_size: int
    flops: int
    saved: int
    inputs: int
    seconds: float | None = None


def probe(step: TrainStep, network: nn.Module, batch_size: int, inputs: int, *, rounds: int) -> Probe:
    """Count one forward and backward of `step`, then time `rounds` whole steps (0 = none)."""
    flops = count(step.forward_backward, network, draws=DRAWS)
    step.optimizer.zero_grad(set_to_none=True)
    saved = saved_bytes(step.forward_backward, network)
    step.optimizer.zero_grad(set_to_none=True)
    seconds = None
    if rounds:
        step()  # the first makes the optimizer's state
        seconds = statistics.median(timed(step, step.device) for _ in range(rounds))
    return Probe(batch_size, flops, saved, inputs, seconds)


def saved_bytes(call: Callable[[], object], network: nn.Module) -> int:
    """Bytes of the tensors that autograd keeps during `call()`, each storage once, parameters and buffers left out."""
    own = {t.untyped_storage().data_ptr() for t in (*network.parameters(), *network.buffers())}
    seen: dict[int, int] = {}
    alive = []  # else a freed storage's address would come again

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if (at := storage.data_ptr()) not in own and at not in seen:
            seen[at] = storage.nbytes()
            alive.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        call()
    return sum(seen.values())


@contextmanager
def fused_attention(network: nn.Module) -> Iterator[None]:
    """Attention that keeps no scores, as an accelerator's kernels do, while a step is counted on a CPU."""
    attentions = [m for m in network.modules() if isinstance(m, Attention)]
    before = [a.kernel for a in attentions]
    try:
        for attention in attentions:
            attention.kernel = "sdpa"
        yield
    finally:
        for attention, kernel in zip(attentions, before, strict=True):
            attention.kernel = kernel


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of an optimizer's state after its first step."""
    tensors = (value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def tensor_bytes(tree: Any) -> int:
    """Bytes of all tensors in nested dicts and lists."""
    if isinstance(tree, Tensor):
        return tree.numel() * tree.element_size()
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ()
    return sum(tensor_bytes(part) for part in parts)


def free() -> None:
    """Give back what a probe held, so that the next one's memory is its own."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
