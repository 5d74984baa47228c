"""Which tokens are seen: index tensors wherever tokens are left out. (Who may attend to whom is `nn/mask.py`.)

The samplers of blocks draw on the CPU from torch's global generator or a given one, so the lengths of what they give
are known without waiting for a device.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ssl_lab import dist
from ssl_lab.errors import UserError


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


@dataclass(frozen=True)
class MultiBlock:
    """Multi-block masking of I-JEPA (arXiv:2301.08243, section 3): one large context block minus several target blocks.

    One size of block is drawn per batch, the same on every rank, and one place per image and block. Of the range of
    places the last one is never drawn, as in the authors' code. Where a context is left with too few patches it is
    drawn again, and after 20 failures in a row the last target that still counts may overlap it.

    Args:
        num_targets: target blocks M per image; they may overlap each other.
        target_scale: range of a target's share of the grid.
        target_aspect: range of its height / width; scale and aspect follow the same uniform number.
        context_scale: range of the share of the square context block, before targets are taken out.
        min_keep: a context keeps more patches than this; None = 10, but at most 1/16 of the grid.
    """

    num_targets: int = 4
    target_scale: tuple[float, float] = (0.15, 0.2)
    target_aspect: tuple[float, float] = (0.75, 1.5)
    context_scale: tuple[float, float] = (0.85, 1.0)
    min_keep: int | None = None

    def __call__(self, batch: int, grid: tuple[int, int], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Context (B, K) and targets (B, M, T), int64 places in raster order, drawn from torch's global generator.

        K is the smallest context of the batch: longer ones lose their last patches.

        Raises:
            UserError: the grid is too small for these blocks.
        """
        (H, W), keep = grid, self.check(grid)
        draw = torch.rand(2)
        if dist.world_size() > 1:
            draw = dist.broadcast(draw.to(device))
        target_r, context_r = draw.tolist()
        th, tw = self._size(grid, self.target_scale, self.target_aspect, target_r)
        ch, cw = self._size(grid, self.context_scale, (1.0, 1.0), context_r)
        top, left = (torch.randint(0, n, (batch, self.num_targets)) for n in (H - th, W - tw))
        block = torch.arange(th)[:, None] * W + torch.arange(tw)
        targets = (top * W + left)[..., None] + block.flatten()
        free = ~rectangles(grid, top, left, th, tw)
        context = self._context(free, (ch, cw), keep)
        context &= context.cumsum(1) <= context.sum(1).min()
        return context.nonzero()[:, 1].view(batch, -1).to(device), targets.to(device)

    def check(self, grid: tuple[int, int]) -> int:
        """The number of patches that a context must exceed on this grid.

        Raises:
            UserError: some draw of the sizes would not fit.
        """
        keep = min(10, grid[0] * grid[1] // 16) if self.min_keep is None else self.min_keep
        for r in (i / 32 for i in range(33)):
            target = self._size(grid, self.target_scale, self.target_aspect, r)
            context = self._size(grid, self.context_scale, (1.0, 1.0), r)
            if min(*target, *context) < 1 or context[0] * context[1] <= keep:
                raise UserError(
                    f"I-JEPA's blocks do not fit a grid of {grid[0]} x {grid[1]} patches (a context must keep more "
                    f"than {keep}): take larger images, a smaller patch_size or a smaller masks.min_keep"
                )
        return keep

    def _context(self, free: Tensor, size: tuple[int, int], keep: int) -> Tensor:
        """(B, N) bool, True in the context, for free (B, M, H, W): False in each target."""
        batch, targets, H, W = free.shape
        allowed = torch.cat([torch.ones(batch, 1, H, W, dtype=torch.bool), free.cummin(1).values], 1)
        context = torch.zeros(batch, H, W, dtype=torch.bool)
        rows, failures = torch.arange(batch), 0
        while len(rows):
            top, left = (torch.randint(0, n - m, (len(rows),)) for n, m in zip((H, W), size, strict=True))
            drawn = rectangles((H, W), top, left, *size) & allowed[rows, max(0, targets - failures // 20)]
            context[rows] = drawn
            rows, failures = rows[drawn.sum((1, 2)) <= keep], failures + 1
        return context.flatten(1)

    @staticmethod
    def _size(
        grid: tuple[int, int], scale: tuple[float, float], aspect: tuple[float, float], r: float
    ) -> tuple[int, int]:
        """Height and width of a block at the place r in [0, 1) of both ranges, smaller than the grid on both sides."""
        (s0, s1), (a0, a1) = scale, aspect
        area, ratio = int(grid[0] * grid[1] * (s0 + r * (s1 - s0))), a0 + r * (a1 - a0)
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        return min(h, grid[0] - 1), min(w, grid[1] - 1)


def rectangles(grid: tuple[int, int], top: Tensor, left: Tensor, h: Tensor | int, w: Tensor | int) -> Tensor:
    """(..., H, W) bool, True inside the rectangle of h x w patches whose first patch is (top, left), each (...)."""
    row, column = (torch.arange(n, device=top.device) for n in grid)
    top, left = top[..., None], left[..., None]
    bottom, right = (
        edge + (size[..., None] if isinstance(size, Tensor) else size) for edge, size in ((top, h), (left, w))
    )
    inside_rows, inside_columns = (row >= top) & (row < bottom), (column >= left) & (column < right)
    return inside_rows[..., :, None] & inside_columns[..., None, :]
