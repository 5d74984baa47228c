"""Convolutions over time: the Conformer's convolution module and the subsampling before its blocks.

Both know which frames are real, so that padding never changes a result, be it in training or not.
"""

from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ssl_lab import dist
from ssl_lab.errors import UserError
from ssl_lab.nn.dropout import Dropout
from ssl_lab.nn.linear import Linear
from ssl_lab.nn.norm import BatchNorm
from ssl_lab.nn.recompute import recomputing

if TYPE_CHECKING:
    from ssl_lab.nn.block import Context


class ConvModule(nn.Module):
    """Pointwise map to 2 D, GLU, depthwise convolution, norm, Swish, pointwise map: (B, T, D) -> (B, T, D).

    The Conformer's module (arXiv:2005.08100, figure 2) without the norm before and the dropout after it, which belong
    to the residual. Padded frames are set to 0 before the depthwise convolution mixes them in: not before the pointwise
    map, whose bias would make them different from 0 again.

    Args:
        dim: width D.
        kernel_size: frames that the convolution sees.
        norm: batch norm over the valid frames of all ranks, as in the paper, or layer norm, which streams.
        causal: the convolution sees a frame and those before it only.
        bias: of all three maps.

    Raises:
        UserError: an even kernel that is not causal has no middle.
    """

    takes_context = True

    def __init__(
        self,
        dim: int,
        kernel_size: int = 31,
        *,
        norm: Literal["batch", "layer"] = "batch",
        causal: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if kernel_size % 2 == 0 and not causal:
            raise UserError(f"kernel_size={kernel_size} has no middle frame: choose an odd number, or causal=true")
        self.expand, self.project = Linear(dim, 2 * dim, bias), Linear(dim, dim, bias)
        self.depthwise = nn.Conv1d(dim, dim, kernel_size, groups=dim, bias=bias)
        self.norm = FrameNorm(dim) if norm == "batch" else nn.LayerNorm(dim)
        self.before, self.after = (kernel_size - 1, 0) if causal else (kernel_size // 2, kernel_size // 2)

    def forward(self, x: Tensor, ctx: "Context") -> Tensor:
        valid = ctx.mask.valid
        x = F.glu(self.expand(x), -1)
        if valid is not None:
            x = x.masked_fill(~valid[..., None], 0)
        if self.before != self.after:
            x = F.pad(x, (0, 0, self.before, 0))
        x = depthwise(x, self.depthwise.weight, self.depthwise.bias, padding=self.after)
        x = self.norm(x, valid) if isinstance(self.norm, FrameNorm) else self.norm(x)
        return self.project(F.silu(x))


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, *, padding: int) -> Tensor:
    """A convolution of each channel over time, x (B, T, D), weight (D, 1, K) -> (B, T + 2 padding - K + 1, D).

    On a CPU it never leaves the layout (B, T, D): as a 2-D convolution in channels-last order the forward pass is 30
    times faster than `conv1d` with its transposes, forward and backward 3 to 5 times.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        out: Tensor = _Depthwise.apply(x, weight, bias, padding)
        return out
    return F.conv1d(x.transpose(1, 2), weight, bias, padding=padding, groups=x.shape[2]).transpose(1, 2)


class _Depthwise(torch.autograd.Function):
    """oneDNN has fast kernels for time along the image's width, but for the weight's gradient along its height."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.padding = padding
        image, kernel = x.transpose(1, 2).unsqueeze(2), weight.unsqueeze(2)
        return F.conv2d(image, kernel, bias, padding=(0, padding), groups=x.shape[2]).squeeze(2).transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        into_x = _backward(grad, x, weight, ctx.padding, 2)[0] if need_x else None
        into_weight = _backward(grad, x, weight, ctx.padding, 3)[1] if need_weight else None
        return into_x, into_weight, grad.sum((0, 1)) if need_bias else None, None


def _backward(grad: Tensor, x: Tensor, weight: Tensor, padding: int, axis: int) -> tuple[Tensor | None, Tensor | None]:
    """Gradient of the input (axis 2) or of the weight (axis 3), time being the other axis of the image."""
    image, out = x.transpose(1, 2).unsqueeze(axis), grad.transpose(1, 2).unsqueeze(axis)
    pads, of_input = ([0, padding], True) if axis == 2 else ([padding, 0], False)
    wanted = [of_input, not of_input, False]
    into_x, into_weight, _ = torch.ops.aten.convolution_backward(
        out, image, weight.unsqueeze(axis), None, [1, 1], pads, [1, 1], False, [0, 0], x.shape[2], wanted
    )
    return (into_x.squeeze(2).transpose(1, 2), None) if of_input else (None, into_weight.squeeze(3))


class FrameNorm(BatchNorm):
    """Batch norm of (B, T, D) whose statistics cover the valid frames of all ranks and nothing else.

    A batch with fewer than two valid frames is normalised by the running statistics. What activation checkpointing
    recomputes does not count towards these a second time.
    """

    def forward(self, input: Tensor, valid: Tensor | None = None) -> Tensor:
        rows = input.flatten(0, 1)
        if not self.training:
            return super().forward(rows).view(input.shape)
        real = None if valid is None else valid.flatten().nonzero()[:, 0]
        frames = rows if real is None else rows.index_select(0, real)
        out = super().forward(frames) if dist.world_size() > 1 else self._normed(frames)
        if real is not None:
            out = torch.zeros_like(rows, dtype=out.dtype).index_copy(0, real, out)
        return out.view(input.shape)

    def _normed(self, frames: Tensor) -> Tensor:
        several, counts = len(frames) > 1, not recomputing()
        if several and counts and self.num_batches_tracked is not None:
            self.num_batches_tracked += 1
        weight = (0.1 if self.momentum is None else self.momentum) * counts
        return F.batch_norm(
            frames, self.running_mean, self.running_var, self.weight, self.bias, several, weight, self.eps
        )

    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        if not recomputing():
            super()._remember(mean, variance)


class ConvSubsampling(nn.Module):
    """A quarter of the frames: two 3 x 3 convolutions of stride 2 with ReLU, then a linear map to D.

    (B, T, F) -> (B, T', D), T' = ((T - 1) // 2 - 1) // 2: nothing is padded, so token t stands for the frames
    4 t ... 4 t + 6 exactly, is valid if they are, and may be had when the last of them is (streaming).

    Args:
        num_mels: mel bins F.
        dim: width D.
        channels: of the convolutions, D by default; their work grows with the square of it, and with the blocks of a
            small model they cost more than those.
        dropout: of the output.
    """

    stride, receptive = 4, 7

    def __init__(self, num_mels: int, dim: int, *, channels: int | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        channels = channels or dim
        self.conv1, self.conv2 = nn.Conv2d(1, channels, 3, 2), nn.Conv2d(channels, channels, 3, 2)
        bins = ((num_mels - 1) // 2 - 1) // 2
        self.proj, self.dropout = Linear(channels * bins, dim), Dropout(dropout)

    def forward(self, features: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Features (B, T, F) and their valid frames (B, T) bool, all by default -> (B, T', D) and (B, T') bool.

        An input of fewer than 7 frames gives one token that is not valid.
        """
        lengths = features.new_full((len(features),), features.shape[1], dtype=torch.int64)
        lengths = self.tokens(lengths if valid is None else valid.sum(1))
        features = F.pad(features, (0, 0, 0, max(0, self.receptive - features.shape[1])))
        features = features.to(self.conv1.weight.dtype)  # log-mels are exact, also where the weights are bf16
        x = F.relu(self.conv2(F.relu(self.conv1(features[:, None]))))
        x = self.dropout(self.proj(x.permute(0, 2, 3, 1).flatten(2)))
        return x, torch.arange(x.shape[1], device=x.device) < lengths[:, None]

    def tokens(self, frames: Tensor) -> Tensor:
        """How many tokens so many frames give; 0 if they are fewer than 7."""
        return (((frames - 1) // 2 - 1) // 2).clamp(min=0)
