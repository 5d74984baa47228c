"""Dropout (Srivastava et al., 2014) that costs little on a CPU, where most of torch's time goes into drawing bits."""

import math

import torch
from torch import Tensor, nn

_LEVELS = 1 << 16  # four elements share one draw of 64 bits: p is met to 1/131072


class Dropout(nn.Dropout):
    """`nn.Dropout`; on a CPU it draws other elements than torch does from the same seed."""

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p, self.training)


def dropout(x: Tensor, p: float, training: bool = True) -> Tensor:
    """Elements of any x zeroed with probability p, the others divided by 1 - p; same shape and dtype."""
    if not training or p == 0:
        return x
    if x.device.type != "cpu" or p == 1 or not x.is_floating_point() or torch.compiler.is_compiling():
        return torch.dropout(x, p, True)
    mask, share = kept(x.shape, p, x.dtype)
    return x * mask.mul_(1 / share)


def kept(shape: torch.Size, p: float, dtype: torch.dtype) -> tuple[Tensor, float]:
    """A mask of that shape on the CPU, 1 = kept and 0 = dropped, and the share of ones that is expected, about 1 - p.

    The bits come from torch's generator, so that a resumed run draws the same.
    """
    dropped, n = round(p * _LEVELS), math.prod(shape)
    bits = torch.empty((n + 3) // 4, dtype=torch.int64).random_(-(2**63), None).view(torch.int16)[:n]
    mask = torch.empty(shape, dtype=dtype)
    torch.ge(bits.view(shape), dropped - _LEVELS // 2, out=mask)
    return mask, 1 - dropped / _LEVELS
