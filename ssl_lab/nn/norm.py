"""Norms: over the batch of all ranks, and by the root mean square of a token."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ssl_lab import dist
from ssl_lab.errors import UserError


class BatchNorm(nn.BatchNorm1d):
    """BatchNorm1d on (B, D) whose statistics cover every rank, so that N ranks compute what one would.

    torch's SyncBatchNorm does the same but only on GPUs. Statistics are float32 at least, also under autocast.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or dist.world_size() == 1:
            if self.training and len(input) < 2:
                raise UserError("batch norm of one sample has no statistics: set data.batch_size to at least 2")
            return super().forward(input)
        x = input.float() if input.dtype in (torch.bfloat16, torch.float16) else input
        count = dist.all_reduce_sum(x.new_tensor(float(len(x)))).clamp(
            min=1
        )  # ranks may hold different numbers of rows
        mean = dist.all_reduce_sum(x.sum(0)) / count
        centred = x - mean
        variance = dist.all_reduce_sum(centred.square().sum(0)) / count
        self._remember(mean.detach(), variance.detach() * count / (count - 1).clamp(min=1))
        out = centred * (variance + self.eps).rsqrt()
        return out if self.weight is None else torch.addcmul(self.bias, out, self.weight)

    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        weight = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), weight)
        self.running_var.lerp_(variance.to(self.running_var.dtype), weight)


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv:1910.07467); the output has the dtype of x.

    torch has one kernel for it on a GPU, but some twenty operations on a CPU; there this takes five, and nine backward.
    """

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight is not None and self.eps is not None
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            out: Tensor = _RMSNorm.apply(x, self.weight, self.eps)
            return out
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class _RMSNorm(torch.autograd.Function):
    """Statistics in float32 at least, then rounded to the dtype of x: half precision normalises in half precision."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        rate = torch.rsqrt(length.square_().div_(x.shape[-1]).add_(eps))
        ctx.save_for_backward(x, weight, rate)
        return torch.mul(x, rate.to(x.dtype)).mul_(weight.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, rate = ctx.saved_tensors
        rate, narrow = rate.to(x.dtype), weight.to(x.dtype)
        normed = x * rate
        both = grad * normed
        share = torch.mv(both.flatten(0, -2), narrow).view(rate.shape).div_(-x.shape[-1])
        into = torch.mul(grad, narrow).addcmul_(normed, share).mul_(rate)
        return into, (both.flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None), None


def l2_normalize(x: Tensor) -> Tensor:
    """Rows of (..., D) divided by their length, in float32 at least (half precision has no room for the square)."""
    return F.normalize(x.float() if x.dtype in (torch.bfloat16, torch.float16) else x, dim=-1)
