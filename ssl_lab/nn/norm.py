"""Batch normalisation over the batch of all ranks, on every device."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_lab import dist


class BatchNorm(nn.BatchNorm1d):
    """BatchNorm1d on (B, D) whose statistics cover every rank, so that N ranks compute what one would.

    torch's SyncBatchNorm does the same but only on GPUs. Statistics are float32 at least, also under autocast.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or dist.world_size() == 1:
            return super().forward(input)
        x = input.float() if input.dtype in (torch.bfloat16, torch.float16) else input
        count = len(x) * dist.world_size()
        mean = dist.all_reduce_sum(x.sum(0)) / count
        centred = x - mean
        variance = dist.all_reduce_sum(centred.square().sum(0)) / count
        self._remember(mean.detach(), variance.detach() * count / max(1, count - 1))
        out = centred * (variance + self.eps).rsqrt()
        return out if self.weight is None else torch.addcmul(self.bias, out, self.weight)

    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        weight = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), weight)
        self.running_var.lerp_(variance.to(self.running_var.dtype), weight)


def l2_normalize(x: Tensor) -> Tensor:
    """Rows of (..., D) divided by their length, in float32 at least (half precision has no room for the square)."""
    return F.normalize(x.float() if x.dtype in (torch.bfloat16, torch.float16) else x, dim=-1)
