"""FlashAttention-3 (Shah et al., 2024, arXiv:2407.08608) and -4 in the place of torch's own flash kernel.

torch can exchange that kernel for the whole process. Here it is exchanged for one forward or one backward pass and put
back, so that nothing else notices; the passes of one call are therefore an autograd function of their own. Exchanging
and putting back took 55 microseconds on one CPU core.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import attention

from ssl_lab.errors import UserError
from ssl_lab.nn.kernels.case import Case, absent, fused
from ssl_lab.nn.mask import AttnMask

Name = Literal["flash3", "flash4"]

# torch's name, the module that torch imports for it, how to get it, and the compute capabilities it is made for
IMPLEMENTATIONS: dict[Name, tuple[str, str, str, tuple[int, ...]]] = {
    "flash3": ("FA3", "flash_attn_interface", "install the folder hopper of Dao-AILab/flash-attention", (9,)),
    "flash4": ("FA4", "flash_attn.cute.interface", "pip install flash-attn-4", (9, 10)),
}
_NEEDED = [f"{what}_flash_attention_impl" for what in ("activate", "current", "restore")]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def exchanged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: AttnMask,
    scale: float,
    dropout_p: float,
    bias: Tensor | None = None,
    *,
    name: Name,
) -> Tensor:
    """(B, H, L, Dh), (B, Hkv, S, Dh) x2 -> (B, H, L, Dh). Both count causal positions from the end, as we do."""
    assert bias is None and dropout_p == 0
    out: Tensor = _Attention.apply(q, k, v, scale, mask.causal and q.shape[2] > 1, IMPLEMENTATIONS[name][0])
    return out


def refuses(case: Case, *, name: Name) -> str | None:
    """None when this kernel can serve, else the reason."""
    known, module, remedy, capabilities = IMPLEMENTATIONS[name]
    if reason := fused(case, multiple=8):
        return reason
    if not case.mask.plain:
        return "flash attention takes only plain or causal masks"
    if case.dropout_p > 0:
        return f"torch's {known} has no dropout"
    if not all(hasattr(attention, needed) for needed in _NEEDED):
        return f"torch {torch.__version__} cannot exchange its flash kernel and put it back: take a newer torch"
    if known not in attention.list_flash_attention_impls():
        return f"torch {torch.__version__} knows no {known}: take a newer torch"
    if reason := absent(module, remedy):
        return reason
    if torch.cuda.is_available() and torch.cuda.get_device_capability(case.device)[0] not in capabilities:
        return f"{known} needs a GPU of compute capability {' or '.join(f'{major}.0' for major in capabilities)}"
    return None


@contextlib.contextmanager
def _active(known: str) -> Iterator[None]:
    """torch's flash kernel is `known` in here; then it is what it was before."""
    before = attention.current_flash_attention_impl()
    try:
        try:
            attention.activate_flash_attention_impl(known)
        except (ImportError, RuntimeError) as error:
            raise UserError(f"torch cannot activate {known}: {str(error).splitlines()[0]}") from error
        yield
    finally:
        if before is not None:
            attention.activate_flash_attention_impl(before)
        elif attention.current_flash_attention_impl() is not None:
            attention.restore_flash_attention_impl()


class _Attention(torch.autograd.Function):
    """Both passes by one implementation: autograd would run the backward after torch's own has been put back."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, known: str) -> Tensor:
        with _active(known):
            out, lse, of_q, of_k, longest_q, longest_k, seed, offset, _ = (
                torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)
            )
        ctx.save_for_backward(q, k, v, out, lse, of_q, of_k, seed, offset)
        ctx.longest, ctx.scale, ctx.causal, ctx.known = (longest_q, longest_k), scale, causal, known
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *saved, seed, offset = ctx.saved_tensors
        with _active(ctx.known):
            of_q, of_k, of_v = torch.ops.aten._scaled_dot_product_flash_attention_backward(
                grad, *saved, *ctx.longest, 0.0, ctx.causal, seed, offset, scale=ctx.scale
            )
        return of_q, of_k, of_v, None, None, None
