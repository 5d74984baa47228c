"""What a kernel is asked to serve, and the refusals that several kernels share. A reason is None, or one phrase."""

import importlib
import sys
from dataclasses import dataclass

import torch

from ssl_lab.nn.mask import AttnMask


@dataclass(frozen=True)
class Case:
    """One call of `attend` without its numbers.

    Args:
        dtype: of queries, keys and values.
        device: where they are.
        head_dim: width Dh of queries and keys.
        mask: who may attend to whom.
        dropout_p: probability of dropping an attention weight.
        v_dim: width Dv of the values; None = Dh.
        lengths: (L, S) of queries and keys; None = not known yet.
    """

    dtype: torch.dtype
    device: torch.device
    head_dim: int
    mask: AttnMask
    dropout_p: float
    v_dim: int | None = None
    lengths: tuple[int, int] | None = None


def off_cuda(case: Case) -> str | None:
    """For kernels that only CUDA has."""
    return None if case.device.type == "cuda" else f"this kernel is for CUDA only, not for {case.device.type}"


def not_half(case: Case) -> str | None:
    """For kernels in half precision."""
    if case.dtype in (torch.bfloat16, torch.float16):
        return None
    return f"it needs bf16 or fp16, not {str(case.dtype).removeprefix('torch.')}: set trainer.precision=bf16-mixed"


def too_wide(case: Case, most: int = 256) -> str | None:
    """For kernels whose registers hold whole heads."""
    return None if case.head_dim <= most else f"its heads are at most {most} wide, not {case.head_dim}"


def fused(case: Case, *, multiple: int = 1) -> str | None:
    """What FlashAttention asks of device, dtype and widths; `multiple`: heads must be so many times some number."""
    if reason := off_cuda(case) or not_half(case) or too_wide(case):
        return reason
    if case.head_dim % multiple:
        return f"the width of its heads is a multiple of {multiple}, not {case.head_dim}"
    if case.v_dim not in (None, case.head_dim):
        return f"its values are as wide as its keys, not {case.v_dim} beside {case.head_dim}"
    return None


def absent(module: str, remedy: str) -> str | None:
    """None when `module` can be imported, else why not; `remedy` says how it is installed."""
    if sys.modules.get(module) is not None:  # asked on every call of a kernel
        return None
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        return f"the module {error.name} is not installed: {remedy}"
    except (ImportError, OSError) as error:  # built for another torch, say
        return f"{module} cannot be imported ({str(error).splitlines()[0]}): {remedy}"
    return None
