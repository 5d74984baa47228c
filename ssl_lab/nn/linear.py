"""The linear map of every projection, sent on a CPU to the library that is fast there.

For float32 torch calls MKL, which on processors of other makers stays below their widest vectors: oneDNN does the same
product 2.1 times faster on an AMD EPYC of family 26, 1.0 to 1.4 times on one of family 25 (`docs/performance.md`). With
bfloat16 torch goes to oneDNN, too, but fills the result with the bias first, in a pass of its own.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Linear(nn.Linear):
    """`nn.Linear`, (..., D) -> (..., E); same parameters, same result up to rounding."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    def rows(self, x: Tensor, start: int = 0, stop: int | None = None, add: Tensor | None = None) -> Tensor:
        """Outputs `start` to `stop` alone, (..., D) -> (..., stop - start), with `add` joined to their bias."""
        bias = None if self.bias is None else self.bias[start:stop]
        return linear(x, self.weight[start:stop], add if bias is None else bias if add is None else bias + add)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., D) times weight (E, D) transposed, plus bias (E) -> (..., E)."""
    dtype = _through_onednn(x, weight)
    if dtype is None:
        return F.linear(x, weight, bias)
    if not torch.is_grad_enabled():
        return _product(*_cast(dtype, x, weight, bias))
    out: Tensor = _OneDNN.apply(x, weight, bias, dtype)
    return out


def _through_onednn(x: Tensor, weight: Tensor) -> torch.dtype | None:
    """In which dtype oneDNN makes the product, or None: torch is to do it."""
    if x.device.type != "cpu" or not _AVAILABLE or torch.compiler.is_compiling():
        return None
    if x.numel() // weight.shape[1] * weight.shape[0] < _SMALLEST:
        return None
    if not weight.is_contiguous() and not weight.t().is_contiguous():  # see `_OneDNN.backward`
        return None
    if not torch.is_autocast_enabled("cpu"):
        return x.dtype if x.dtype == weight.dtype and x.dtype in (torch.float32, torch.bfloat16) else None
    narrow = (torch.float32, torch.bfloat16)
    known = x.dtype in narrow and weight.dtype in narrow and torch.get_autocast_dtype("cpu") == torch.bfloat16
    return torch.bfloat16 if known else None


def _cast(dtype: torch.dtype, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _half_used(processor: dict[str, Any]) -> bool:
    """AMD multiplies 512 bits in one pass since Zen 5, the first of its processors with avx_vnni; Zen 4 needs two."""
    return "AMD" in processor.get("cpu_name", "") and bool(processor.get("avx_vnni"))


_SMALLEST = 4096  # numbers in the result: below, oneDNN's fixed cost (about 12 us) is more than it gains
_AVAILABLE = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
MKL_IS_SLOW = _AVAILABLE and _half_used(getattr(torch.cpu, "get_capabilities", dict)())


class _OneDNN(torch.autograd.Function):
    """torch has the product as an operator, without a derivative. Autograd gives gradients their tensors' dtypes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        x, weight, bias = _cast(dtype, x, weight, bias)
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        # oneDNN falls back to a loop a thousand times slower for rows with gaps, as a sum and a cat give gradients.
        rows = grad.flatten(0, -2).contiguous()
        return (
            _product(rows, weight.t()).view(x.shape) if need_x else None,
            _outer(rows, x.flatten(0, -2).contiguous()) if need_weight else None,
            rows.sum(0) if need_bias else None,
            None,
        )


def _outer(grad: Tensor, x: Tensor) -> Tensor:
    """(M, E), (M, D) -> (E, D): the transposed product where that has the fewer rows, which is faster.

    oneDNN copies the side that stands transposed here, which takes what its product gains over an MKL that is not slow.
    """
    if grad.dtype == torch.bfloat16 or not MKL_IS_SLOW:
        return grad.t() @ x
    if grad.shape[1] <= x.shape[1]:
        return _product(grad.t(), x.t())
    return _product(x.t(), grad.t()).t()


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out
