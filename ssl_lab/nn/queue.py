"""A queue of the latest keys, the same on every rank (MoCo, arXiv:1911.05722, section 3.2)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_lab import dist
from ssl_lab.errors import UserError


class Queue(nn.Module):
    """Ring of `size` unit vectors of width `dim`, random at first; both buffers are part of a checkpoint.

    Attributes:
        items: (size, dim) float32.
        pointer: () int64, the row that the next key takes.
    """

    items: Tensor
    pointer: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("items", F.normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Keys (B, dim) of every rank, in rank order, take the places of the oldest.

        Raises:
            UserError: `size` is no multiple of the global batch, so that some keys would grow older than others.
        """
        size, total = len(self.items), len(keys) * dist.world_size()
        if size % total:
            fit = " or ".join(str(n) for n in (size // total * total, (size // total + 1) * total) if n)
            raise UserError(
                f"a queue of {size} keys is no multiple of the global batch of {total}: set method.queue_size to {fit}"
            )
        keys = dist.gather(keys, grad=False).to(self.items.dtype)
        rows = (self.pointer + torch.arange(total, device=keys.device)) % size  # the device need not be waited for
        self.items.index_copy_(0, rows, keys)
        self.pointer.add_(total).remainder_(size)
