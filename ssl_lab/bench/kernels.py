"""What attention costs by kernel, mask and length: forward and backward through the one door."""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ssl_lab.bench.timing import interleave
from ssl_lab.nn.attend import KERNELS, attend, choose, supports
from ssl_lab.nn.mask import FULL, AttnMask


@dataclass(frozen=True)
class KernelTime:
    """Seconds of forward and backward; None with a `reason` where a kernel cannot serve. `chosen`: what auto takes."""

    kernel: str
    mask: str
    length: int
    median_s: float | None
    flops: int
    reason: str | None = None
    chosen: bool = False


def masks(batch: int, length: int, device: torch.device) -> Mapping[str, AttnMask]:
    """One of each structure that training uses: none, causal, padding, packed documents, a window."""
    position = torch.arange(length, device=device)
    return {
        "full": FULL,
        "causal": AttnMask(causal=True),
        "padding": AttnMask(valid=(position < length - length // 4).expand(batch, -1)),
        "documents": AttnMask(causal=True, segments=(position // max(1, length // 4)).expand(batch, -1)),
        "window": AttnMask(causal=True, window=max(1, length // 4)),
    }


def kernel_times(
    *, batch: int, heads: int, head_dim: int, length: int, dtype: torch.dtype, device: torch.device, rounds: int
) -> Iterator[KernelTime]:
    """Every kernel with every mask on (batch, heads, length, head_dim), kernels of one mask in turn.

    FLOPs are those of all pairs of tokens, 3.5 times those of the two products forward, hidden pairs included: a kernel
    that leaves them out shows more FLOP/s.
    """
    shape, flops = (batch, heads, length, head_dim), 14 * batch * heads * length**2 * head_dim
    for name, mask in masks(batch, length, device).items():
        q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
        chosen, steps = choose(q, k, mask), dict[str, Callable[[], object]]()
        for kernel in KERNELS:
            reason = supports(kernel, dtype=dtype, device=device, head_dim=head_dim, mask=mask)
            if reason is None:
                steps[kernel] = functools.partial(_pass, q, k, v, mask, kernel)
            else:
                yield KernelTime(kernel, name, length, None, flops, reason)
        for served, timing in interleave(steps, device, rounds=rounds).items():
            yield KernelTime(served, name, length, timing.median, flops, chosen=served == chosen)


def _pass(q: Tensor, k: Tensor, v: Tensor, mask: AttnMask, kernel: str) -> None:
    out = attend(q, k, v, mask, kernel=kernel)  # type: ignore[arg-type]
    torch.autograd.grad(out, (q, k, v), out.detach())
