"""The one door that every attention goes through: pick a kernel, check that it can serve, run it."""

import functools
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from ssl_lab.errors import UserError
from ssl_lab.nn.kernels import exchanged, flash_attn, flex, sdpa, varlen
from ssl_lab.nn.kernels.case import Case
from ssl_lab.nn.kernels.eager import eager
from ssl_lab.nn.linear import MKL_IS_SLOW
from ssl_lab.nn.mask import FULL, AttnMask

KernelName = Literal[
    "auto", "eager", "sdpa", "flash", "efficient", "cudnn", "math", "flex", "varlen", "flash_attn", "flash3", "flash4"
]
Kernel = Callable[[Tensor, Tensor, Tensor, AttnMask, float, float, Tensor | None], Tensor]

KERNELS: dict[KernelName, Kernel] = {
    "eager": eager,
    "sdpa": sdpa.sdpa,
    **{name: functools.partial(sdpa.sdpa, backend=name) for name in sdpa.BACKENDS},
    "flex": flex.flex,
    "varlen": varlen.varlen,
    "flash_attn": flash_attn.flash_attn,
    **{name: functools.partial(exchanged.exchanged, name=name) for name in exchanged.IMPLEMENTATIONS},
}
REFUSALS: dict[str, Callable[[Case], str | None]] = {  # eager, and sdpa when torch may choose, serve everything
    **{name: functools.partial(sdpa.refuses, backend=name) for name in sdpa.BACKENDS},
    "flex": flex.refuses,
    "varlen": varlen.refuses,
    "flash_attn": flash_attn.refuses,
    **{name: functools.partial(exchanged.refuses, name=name) for name in exchanged.IMPLEMENTATIONS},
}
BIASED = ("auto", "eager", "sdpa")  # kernels that add a bias to the scores


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: AttnMask = FULL,
    *,
    bias: Tensor | None = None,
    overwrite_bias: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    kernel: KernelName = "auto",
) -> Tensor:
    """Scaled dot-product attention, (B, H, L, Dh), (B, Hkv, S, Dh), (B, Hkv, S, Dv) -> (B, H, L, Dv), Hkv divides H.

    Args:
        q: queries.
        k: keys.
        v: values.
        mask: who may attend to whom; a query without any key gives 0.
        bias: (B | 1, H, L, S) float, added to the scaled scores.
        overwrite_bias: the caller needs `bias` no more, so a kernel may make its scores in the same memory.
        scale: factor on the scores, Dh ** -0.5 by default.
        dropout_p: probability of dropping an attention weight.
        kernel: a name of `KERNELS`, or "auto" (see `choose`).

    Raises:
        UserError: the kernel named explicitly cannot serve these tensors.
    """
    if torch.is_autocast_enabled(q.device.type):  # q and k leave a norm or a rotation in float32
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if kernel == "auto":
        kernel = choose(q, k, mask, dropout_p, bias=bias is not None, v_dim=v.shape[-1])
    elif not torch.compiler.is_compiling():
        check(
            kernel,
            dtype=q.dtype,
            device=q.device,
            head_dim=q.shape[-1],
            mask=mask,
            dropout_p=dropout_p,
            bias=bias is not None,
            v_dim=v.shape[-1],
            lengths=(q.shape[2], k.shape[2]),
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if overwrite_bias and kernel == "eager":
        return eager(q, k, v, mask, scale, dropout_p, bias, overwrite=True)
    return KERNELS[kernel](q, k, v, mask, scale, dropout_p, bias)


def choose(
    q: Tensor, k: Tensor, mask: AttnMask, dropout_p: float = 0.0, *, bias: bool = False, v_dim: int | None = None
) -> KernelName:
    """The kernel of "auto": a fixed rule from measurements, never timed, so a resumed run chooses the same.

    On 2-core AVX-512 machines, forward and backward of torch's CPU flash kernel gain nothing from bf16 and lose on
    short rows in fp32, where plain matrix products run 1.2 to 12 times faster; long rows and thin heads in fp32 are
    the opposite (`docs/performance.md`). Accelerators: torch's own choice, flex for masks with structure
    but in decoding, where each step would be compiled anew.
    varlen, flash_attn, flash3 and flash4 are taken by name alone: none has been measured here against these.
    Values of another width than the keys (`v_dim`) have no fused kernel on CPU.
    """
    length, dim = k.shape[2], q.shape[-1]
    if q.device.type == "cpu":
        if v_dim not in (None, dim):
            return "eager"
        if q.shape[2] == 1 and not torch.is_grad_enabled():  # decoding: one fused call instead of three
            return "sdpa"
        if bias and torch.is_grad_enabled():  # no fused kernel has the derivative of a bias
            return "eager"
        if q.dtype in (torch.bfloat16, torch.float16):
            return "eager" if length <= 1024 else "sdpa"
        return "eager" if _written_out(length, dim) else "sdpa"
    structured = not bias and q.shape[2] > 1 and not mask.plain and length >= 1024 and dropout_p == 0
    return "flex" if structured and supports("flex", device=q.device, mask=mask) is None else "sdpa"


def _written_out(length: int, dim: int) -> bool:
    """Whether plain products in float32 are the faster way on this CPU; up to 512 keys, as they keep all weights."""
    if MKL_IS_SLOW:
        return length < 80 and dim >= 32
    if not torch.is_grad_enabled():
        return length < 100
    return length < 128 or (length <= 512 and dim >= 32)


def check(
    kernel: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    head_dim: int = 64,
    mask: AttnMask = FULL,
    dropout_p: float = 0.0,
    bias: bool = False,
    v_dim: int | None = None,
    lengths: tuple[int, int] | None = None,
) -> None:
    """Raise `UserError` with the reason when `kernel` cannot serve; see `supports`."""
    reason = supports(
        kernel,
        dtype=dtype,
        device=device,
        head_dim=head_dim,
        mask=mask,
        dropout_p=dropout_p,
        bias=bias,
        v_dim=v_dim,
        lengths=lengths,
    )
    if reason is not None:
        raise UserError(f"attention={kernel} cannot run here: {reason}; attention=auto picks one that can")


def supports(
    kernel: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    head_dim: int = 64,
    mask: AttnMask = FULL,
    dropout_p: float = 0.0,
    bias: bool = False,
    v_dim: int | None = None,
    lengths: tuple[int, int] | None = None,
) -> str | None:
    """None when `kernel` can serve, else the reason in words; the arguments are those of `Case`.

    `bias`: something is added to the scores.
    """
    if kernel not in KERNELS and kernel != "auto":
        return f"there is no such kernel; there are auto, {', '.join(KERNELS)}"
    if bias and kernel not in BIASED:
        return "it takes no score bias"
    refuses = REFUSALS.get(kernel)
    return refuses and refuses(Case(dtype, torch.device(device), head_dim, mask, dropout_p, v_dim, lengths))
