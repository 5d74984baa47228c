"""Batched matrix products of attention, with large float32 ones sent head by head to oneDNN where MKL is slow.

That is on a CPU whose widest vectors MKL leaves unused (see `ssl_lab.nn.linear`). Elsewhere its one call for all heads
is as fast or faster, up to 2.8 times.
"""

import torch
from torch import Tensor

from ssl_lab.nn import linear

AT_A_TIME = 1 << 24  # bytes of scores on a CPU: larger tensors go back to the system and return page by page
_SMALLEST = 1 << 20  # multiplications in one product: below, oneDNN's fixed cost is more than it gains


def at_a_time(samples: int, each: int) -> int:
    """Samples of about equal pieces whose scores, of `each` bytes a sample, take no more than `AT_A_TIME` together."""
    pieces = -(-samples // max(1, AT_A_TIME // each))
    return -(-samples // pieces)


def product(a: Tensor, b: Tensor, *, alpha: float = 1.0, plus: Tensor | None = None, overwrite: bool = False) -> Tensor:
    """alpha * a b + plus, (N, M, K), (N, K, P), (N, M, P) -> (N, M, P); not for autograd to follow.

    A matrix may be a transposed view; every other layout than that is copied first. `overwrite`: the result may take
    the place of `plus`. The result may be a transposed view, too.
    """
    if not _through_onednn(a, b):
        if plus is None and _turned(a, b):
            out = torch.baddbmm(a.new_empty(()), b.transpose(1, 2), a.transpose(1, 2), beta=0, alpha=alpha)
            return out.transpose(1, 2)
        if plus is None:
            return torch.baddbmm(a.new_empty(()), a, b, beta=0, alpha=alpha)
        return plus.baddbmm_(a, b, alpha=alpha) if overwrite else torch.baddbmm(plus, a, b, alpha=alpha)
    out = torch.stack([_single(x, y) for x, y in zip(a, b, strict=True)])
    if alpha != 1.0:
        out.mul_(alpha)
    return out if plus is None else out.add_(plus)


def _through_onednn(a: Tensor, b: Tensor) -> bool:
    return (
        a.device.type == "cpu"
        and a.dtype == b.dtype == torch.float32
        and a.shape[1] * a.shape[2] * b.shape[2] >= _SMALLEST
        and linear.MKL_IS_SLOW
        and not torch.compiler.is_compiling()
    )


def _turned(a: Tensor, b: Tensor) -> bool:
    """A large transposed matrix times a narrow one: the transposed product takes as it lies what is copied otherwise.

    On a CPU with avx512_bf16 it is 1.2 to 2 times as fast for heads of up to 48 channels, 1.05 to 1.5 times for 64 to
    128; short rows gain nothing for certain, nor does float16.
    """
    return (
        a.device.type == "cpu"
        and a.dtype == torch.bfloat16
        and a.stride(1) == 1 != a.stride(2)
        and min(a.shape[1], a.shape[2]) >= 4 * b.shape[2]
    )


def _single(x: Tensor, y: Tensor) -> Tensor:
    """(M, K), (K, P) -> (M, P); where x is transposed and tall, the transposed product is faster."""
    x, y = _dense(x), _dense(y)
    if not x.is_contiguous() and y.shape[1] < x.shape[0]:
        return linear._product(y.t(), x).t()
    return linear._product(x, y.t())


def _dense(x: Tensor) -> Tensor:
    """oneDNN falls back to a loop a thousand times slower for rows with gaps between them."""
    return x if x.is_contiguous() or x.t().is_contiguous() else x.contiguous()
