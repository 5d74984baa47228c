"""Rotary position embedding for text, audio (1-D) and image grids (2-D) (RoFormer, arXiv:2104.09864)."""

import torch
from torch import Tensor

Rope = tuple[Tensor, Tensor]


def rope_1d(positions: Tensor, head_dim: int, *, base: float = 10000.0) -> Rope:
    """cos and sin (..., L, Dh) float32 for integer or float positions (..., L); halves are paired (i, i + Dh/2)."""
    frequency = base ** -(torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim)
    angle = positions.float()[..., None] * frequency
    angle = torch.cat([angle, angle], -1)
    return angle.cos(), angle.sin()


def rope_2d(height: int, width: int, head_dim: int, *, base: float = 100.0, device: torch.device | None = None) -> Rope:
    """cos and sin (height * width, Dh) for a grid: half of the frequencies follow the row, half the column.

    Positions are patch centres scaled to [-1, 1] times pi, so a table means the same at another resolution.
    """
    if head_dim % 4:
        raise ValueError(f"2-D RoPE needs a head width divisible by 4, not {head_dim}")
    frequency = base ** -(torch.arange(0, head_dim, 4, device=device, dtype=torch.float32) / head_dim * 2)
    y = ((torch.arange(height, device=device) + 0.5) / height * 2 - 1) * torch.pi
    x = ((torch.arange(width, device=device) + 0.5) / width * 2 - 1) * torch.pi
    rows, columns = torch.meshgrid(y, x, indexing="ij")
    angle = torch.cat([rows.reshape(-1, 1) * frequency, columns.reshape(-1, 1) * frequency], -1)
    angle = torch.cat([angle, angle], -1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotate (B, H, L, Dh) by cos and sin (L | B x 1 x L, Dh). The last rows rotate when the table is shorter.

    Leading tokens without a position (class, registers) stay as they are. Computed in float32 as the references do.
    """
    cos, sin = rope
    prefix = x.shape[-2] - cos.shape[-2]
    head, tail = x[..., :prefix, :], x[..., prefix:, :]
    wide = tail.float() if tail.dtype in (torch.bfloat16, torch.float16) else tail
    first, second = wide.chunk(2, -1)
    turned = (wide * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)
    return torch.cat([head, turned], -2) if prefix else turned
