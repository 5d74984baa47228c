"""Cross-rank operations. On one process each is the identity, so the same line serves a laptop and a cluster."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as td
from torch import Tensor

_alone = False  # of the process: backward of CUDA has threads of its own, which a ContextVar does not reach


@contextmanager
def alone() -> Iterator[None]:
    """Something that this process does by itself: there is one rank, and the others are not waited for."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def rank() -> int:
    """Index of this process, 0 on one process."""
    return td.get_rank() if _joined() else 0


def world_size() -> int:
    """Number of processes, 1 on one process."""
    return td.get_world_size() if _joined() else 1


def _joined() -> bool:
    return td.is_available() and td.is_initialized() and not _alone


def local(x: Tensor) -> Tensor:
    """This rank's part of a tensor that is divided among the ranks (FSDP2), any other tensor as it is."""
    return x.to_local() if hasattr(x, "to_local") else x


class _Gather(torch.autograd.Function):
    """All-gather whose backward sums the gradients of every rank and keeps the local rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = x.shape[0]
        return _all_gather(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        td.all_reduce(grad)
        return grad.narrow(0, rank() * ctx.rows, ctx.rows)


def _all_gather(x: Tensor) -> Tensor:
    parts = [torch.empty_like(x) for _ in range(world_size())]
    td.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def gather(x: Tensor, *, grad: bool = True) -> Tensor:
    """(B, ...) -> (world * B, ...) in rank order. With `grad` the gradient flows back to the rank that owns a row.

    Every rank must bring the same number of rows.
    """
    if world_size() == 1:
        return x if grad else x.detach()
    return _Gather.apply(x) if grad else _all_gather(x.detach())


def pass_on(x: Tensor) -> Tensor:
    """Give `x` to the next rank and get that of the one before, the last rank's to the first; without gradient."""
    world, me = world_size(), rank()
    if world == 1:
        return x
    x, received = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    swap = [td.P2POp(td.isend, x, (me + 1) % world), td.P2POp(td.irecv, received, (me - 1) % world)]
    for request in td.batch_isend_irecv(swap):
        request.wait()
    return received


class _Sum(torch.autograd.Function):
    """All-reduce whose backward sums the gradients of every rank."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        td.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone()
        td.all_reduce(grad)
        return grad


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum of `x` over ranks; the gradient of every rank's use of it flows back."""
    return x if world_size() == 1 else _Sum.apply(x)


def all_reduce_max(x: Tensor) -> Tensor:
    """Largest `x` over ranks, elementwise, without gradient."""
    x = x.detach()
    if world_size() > 1:
        x = x.clone()
        td.all_reduce(x, td.ReduceOp.MAX)
    return x


def all_reduce_mean(x: Tensor) -> Tensor:
    """Mean of `x` over ranks, without gradient."""
    if world_size() == 1:
        return x.detach()
    x = x.detach().clone()
    td.all_reduce(x)
    return x / world_size()


def broadcast(x: Tensor) -> Tensor:
    """Rank 0's `x` on every rank, without gradient. It must lie where the ranks talk: on the GPU with NCCL."""
    x = x.detach()
    if world_size() > 1:
        x = x.clone()
        td.broadcast(x, 0)
    return x


def barrier() -> None:
    """Wait until every rank is here."""
    if world_size() > 1:
        td.barrier()
