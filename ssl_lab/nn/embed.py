"""From pixels to tokens: patches, their projection, and position tables."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ssl_lab.errors import UserError
from ssl_lab.nn.linear import linear


def patchify(x: Tensor, patch: int, *, channels_last: bool = False) -> Tensor:
    """(B, C, H, W) -> (B, N, C * patch * patch), row-major patches.

    Inside a patch the order is (channel, row, column), as a convolution's weight; with `channels_last` it is
    (row, column, channel), as MAE's target.
    """
    B, C, H, W = x.shape
    x = x.reshape(B, C, H // patch, patch, W // patch, patch)
    x = x.permute(0, 2, 4, 3, 5, 1) if channels_last else x.permute(0, 2, 4, 1, 3, 5)
    return x.reshape(B, (H // patch) * (W // patch), C * patch * patch)


def unpatchify(x: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    """Inverse of `patchify(..., channels_last=True)`: (B, N, patch * patch * C) -> (B, C, H, W)."""
    B, _, size = x.shape
    x = x.reshape(B, *grid, patch, patch, size // patch**2).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(B, -1, grid[0] * patch, grid[1] * patch)


def sincos_2d(dim: int, grid: tuple[int, int], *, prefix: int = 0) -> Tensor:
    """Fixed table (prefix + N, dim): MAE's layout [sin column | cos column | sin row | cos row]; prefix rows are 0."""
    if dim % 4:
        raise ValueError(f"a 2-D sin-cos table needs a width divisible by 4, not {dim}")
    omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    parts = [f(axis.reshape(-1, 1) * omega) for axis in (columns, rows) for f in (torch.sin, torch.cos)]
    return torch.cat([torch.zeros(prefix, dim, dtype=torch.float64), torch.cat(parts, 1)]).float()


class PatchEmbed(nn.Module):
    """Project patches (B, K, C * p * p) to (B, K, D): a convolution with stride p, as the matrix product that it is.

    The weight keeps the convolution's shape (D, C, p, p), so public checkpoints fit; working on patches lets a masked
    encoder drop them before the projection.

    Args:
        patch_size: side p of a patch.
        dim: width D.
        in_chans: image channels C.
        bias: of the projection; CLIP has none.
        norm: makes from D a norm of the whole sequence, prefix included, before the first block (CLIP); None = no norm.
    """

    def __init__(
        self,
        patch_size: int,
        dim: int,
        *,
        in_chans: int = 3,
        bias: bool = True,
        norm: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, dim, patch_size, patch_size, bias=bias)
        self.norm = nn.Identity() if norm is None else norm(dim)

    def forward(self, patches: Tensor) -> Tensor:
        return linear(patches, self.proj.weight.flatten(1), self.proj.bias)

    def patches(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """(B, C, H, W) -> (B, N, C * p * p) and the grid (rows, columns).

        Raises:
            UserError: H or W is no multiple of the patch size, or C differs.
        """
        p, chans = self.patch_size, self.proj.in_channels
        if x.dim() != 4 or x.shape[1] != chans or x.shape[2] % p or x.shape[3] % p:
            raise UserError(
                f"images of shape {tuple(x.shape)} do not fit: expected (B, {chans}, H, W) with H and W multiples of "
                f"patch_size={p}; change data.image_size, for local views data.views.multiple_of, or the patch_size"
            )
        return patchify(x, p), (x.shape[2] // p, x.shape[3] // p)


def square_grid(tokens: int) -> tuple[int, int]:
    """The grid of a square table with that many tokens."""
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ValueError(f"{tokens} positions are no square grid")
    return side, side
