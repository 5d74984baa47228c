"""A network that follows another one as an exponential moving average: teacher, momentum encoder, target encoder."""

import copy
from typing import TypeVar

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from ssl_lab.dist import local

M = TypeVar("M", bound=nn.Module)


def follower(student: M) -> M:
    """A copy of `student` that takes no gradient and drops no path; it stays in train mode, for batch statistics.

    Registering it in a method puts it into every checkpoint.
    """
    teacher = copy.deepcopy(student).requires_grad_(False)
    for module in teacher.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.0
    return teacher


@torch.no_grad()
def follow_(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, for parameters only: buffers stay the teacher's own.

    DINO (arXiv:2104.14294), MoCo (arXiv:1911.05722, eq. 2) and I-JEPA (arXiv:2301.08243) average in this way.
    """
    pairs = [(t, s) for t, s in zip(teacher.parameters(), student.parameters(), strict=True) if s.requires_grad]
    if not pairs:
        return  # of a frozen network
    mine: list[Tensor] = [local(t) for t, _ in pairs]
    theirs: list[Tensor] = [local(s.detach()) for _, s in pairs]
    torch._foreach_lerp_(mine, theirs, 1.0 - momentum)


def scaled_momentum(momentum: float, batch: int, reference: int | None) -> float:
    """The momentum that moves as far per sample with steps of `batch` samples as `momentum` with `reference` ones.

    momentum ** (batch / reference), the EMA scaling rule (Busbridge et al., 2023, arXiv:2307.13813); without a
    reference nothing is scaled.
    """
    return momentum if reference is None else momentum ** (batch / reference)
