"""Which tokens are seen: index tensors wherever tokens are left out. (Who may attend to whom is `nn/mask.py`.)

The samplers of blocks draw on the CPU from torch's global generator or a given one, so the lengths of what they give
are known without waiting for a device.
"""

import math

import torch
from torch import Tensor


def random_mask(noise: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """Split N tokens per sample by noise (B, N) -> keep (B, K) of the lowest and drop (B, N - K).

    K = int(N * (1 - ratio)), as MAE counts.
    """
    order = noise.argsort(1)
    kept = int(noise.shape[1] * (1 - ratio))
    return order[:, :kept], order[:, kept:]


def take(x: Tensor, index: Tensor) -> Tensor:
    """(B, N, D), (B, K) int64 -> (B, K, D)."""
    return x.flatten(0, 1).index_select(0, _rows(index, x.shape[1])).unflatten(0, index.shape)


def put_back(kept: Tensor, keep: Tensor, fill: Tensor, N: int) -> Tensor:
    """Inverse of `take`: kept (B, K, D) at keep (B, K), every other of the N places holds `fill` (D)."""
    holes = fill.to(kept.dtype).expand(len(kept) * N, -1)
    return holes.index_copy(0, _rows(keep, N), kept.flatten(0, 1)).unflatten(0, (len(kept), N))


def _rows(index: Tensor, N: int) -> Tensor:
    """(B, K) places among N -> (B * K) rows of the batch laid out flat: whole rows move at once, unlike with gather."""
    return (index + torch.arange(len(index), device=index.device)[:, None] * N).flatten()


def block_counts(
    batch: int,
    patches: int,
    *,
    probability: float = 0.5,
    ratio: tuple[float, float] = (0.1, 0.5),
    generator: torch.Generator | None = None,
) -> Tensor:
    """How many patches to mask per image, (B,) int64 for `block_mask` (DINOv2, arXiv:2304.07193).

    int(B * probability) images at random places get a share of their patches, the others none. The range `ratio` is cut
    into as many equal parts as there are masked images, and each draws from a part of its own, so the total varies
    little from step to step.
    """
    masked = int(batch * probability)
    share = (torch.arange(masked) + torch.rand(masked, generator=generator)) / max(1, masked)
    counts = torch.zeros(batch, dtype=torch.int64)
    counts[:masked] = (patches * (ratio[0] + (ratio[1] - ratio[0]) * share)).long()
    return counts[torch.randperm(batch, generator=generator)]


def block_mask(
    grid: tuple[int, int],
    counts: Tensor,
    generator: torch.Generator | None = None,
    *,
    min_patches: int = 4,
    min_aspect: float = 0.3,
    tries: int = 10,
) -> Tensor:
    """Mask rectangles until counts (B,) int64 patches are covered -> (B, N) bool, True = masked, raster order.

    Block-wise masking of BEiT (arXiv:2106.08254, algorithm 1): a block's area is uniform between `min_patches` and what
    is still wanted (at most half of the grid), its aspect log-uniform in [min_aspect, 1 / min_aspect], its place
    uniform; it is taken if it is smaller than the grid on both sides and adds patches, but not too many. After `tries`
    failures in a row the rest is filled with single patches at random, so exactly `counts` are masked.

    Raises:
        ValueError: a count is negative or larger than the grid.
    """
    H, W = grid
    counts = counts.cpu()
    if ((counts < 0) | (counts > H * W)).any():
        raise ValueError(f"counts must lie between 0 and the {H * W} patches of a {H} x {W} grid")
    mask = torch.zeros(len(counts), H, W, dtype=torch.bool)
    wanted, failures = counts.clone(), torch.zeros_like(counts)
    while len(rows := ((wanted > 0) & (failures < tries)).nonzero()[:, 0]):
        u, room = torch.rand(len(rows), 4, generator=generator), wanted[rows].clamp(max=H * W // 2)
        area = min_patches + u[:, 0] * (room - min_patches)
        aspect = torch.exp(math.log(min_aspect) * (1 - 2 * u[:, 1]))
        h, w = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()
        top, left = (u[:, 2] * (H - h + 1)).long(), (u[:, 3] * (W - w + 1)).long()
        fresh = rectangles(grid, top, left, h, w) & ~mask[rows]
        added = fresh.sum((1, 2))
        good = (h < H) & (w < W) & (added > 0) & (added <= room)
        mask[rows] |= fresh & good[:, None, None]
        wanted[rows] -= added * good
        failures[rows] = torch.where(good, 0, failures[rows] + 1)
    flat = mask.flatten(1)
    noise = torch.rand(flat.shape, generator=generator).masked_fill_(flat, 2.0)  # masked ones are last in line
    return flat | (noise.argsort(1).argsort(1) < wanted[:, None])


def rectangles(grid: tuple[int, int], top: Tensor, left: Tensor, h: Tensor | int, w: Tensor | int) -> Tensor:
    """(..., H, W) bool, True inside the rectangle of h x w patches whose first patch is (top, left), each (...)."""
    row, column = (torch.arange(n, device=top.device) for n in grid)
    top, left = top[..., None], left[..., None]
    bottom, right = (
        edge + (size[..., None] if isinstance(size, Tensor) else size) for edge, size in ((top, h), (left, w))
    )
    inside_rows, inside_columns = (row >= top) & (row < bottom), (column >= left) & (column < right)
    return inside_rows[..., :, None] & inside_columns[..., None, :]
