import math
import random

import pytest
import torch

from ssl_lab.nn.masking import block_counts, block_mask, put_back, random_mask, take


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_random_mask_splits_and_put_back_undoes_take():
    keep, drop = random_mask(torch.rand(3, 10, generator=seeded()), 0.75)
    assert keep.shape == (3, 2) and drop.shape == (3, 8)
    assert torch.equal(torch.cat([keep, drop], 1).sort(1).values, torch.arange(10).expand(3, -1))
    x, fill = torch.randn(3, 10, 4), torch.randn(4)
    back = put_back(take(x, keep), keep, fill, 10)
    seen = torch.zeros(3, 10, dtype=torch.bool).scatter(1, keep, True)
    assert torch.equal(back, torch.where(seen[..., None], x, fill))


@pytest.mark.parametrize("grid", [(4, 4), (4, 7), (8, 8), (14, 14), (16, 16)])
def test_block_mask_masks_exactly_the_counts(grid):
    N = grid[0] * grid[1]
    counts = torch.cat([torch.arange(N + 1), torch.randint(0, N // 2, (100,), generator=seeded())])
    mask = block_mask(grid, counts, seeded())
    assert mask.shape == (len(counts), N) and mask.dtype == torch.bool
    assert torch.equal(mask.sum(1), counts)
    assert torch.equal(mask, block_mask(grid, counts, seeded()))
    assert not torch.equal(mask, block_mask(grid, counts, seeded(1)))
    torch.manual_seed(0)
    first = block_mask(grid, counts)
    torch.manual_seed(0)
    assert torch.equal(first, block_mask(grid, counts))


def same_neighbours(mask):
    """Share of the pairs of horizontal or vertical neighbours that are both masked or both seen."""
    return torch.cat([(mask[:, 1:] == mask[:, :-1]).flatten(1), (mask[:, :, 1:] == mask[:, :, :-1]).flatten(1)], 1)


def test_block_mask_is_made_of_blocks():
    counts = torch.full((500,), 60)
    blocks = block_mask((14, 14), counts, seeded()).view(-1, 14, 14)
    single = torch.rand(500, 196, generator=seeded()).argsort(1).argsort(1).view(-1, 14, 14) < 60
    assert same_neighbours(single).float().mean() < 0.6 < 0.8 < same_neighbours(blocks).float().mean()


def test_block_mask_favours_no_place_and_no_direction():
    mask = block_mask((8, 8), torch.full((8000,), 16), seeded()).view(-1, 8, 8).float().mean(0)
    for turned in (mask.flip(0), mask.flip(1), mask.T):
        assert (mask - turned).abs().max() < 0.03
    assert mask[3:5, 3:5].mean() > mask[0, 0] + 0.1  # a block covers the middle more often than a corner
    assert mask[0, 0] > 0.03  # but every corner is reached: the last place of a block counts too


def plain_block_mask(grid, count, tries, random):
    """BEiT's algorithm for one image as a plain loop: the places that its blocks cover."""
    H, W = grid
    seen = set()
    while len(seen) < count:
        room = min(count - len(seen), H * W // 2)
        for _ in range(tries):
            area, aspect = random.uniform(4, room), math.exp(random.uniform(math.log(0.3), -math.log(0.3)))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h < H and w < W:
                top, left = random.randint(0, H - h), random.randint(0, W - w)
                fresh = {y * W + x for y in range(top, top + h) for x in range(left, left + w)} - seen
                if 0 < len(fresh) <= room:
                    seen |= fresh
                    break
        else:
            break
    return seen


@pytest.mark.parametrize(
    ("grid", "count", "tries"),
    [((8, 8), 24, 10), ((4, 6), 12, 10), ((8, 8), 58, 10), ((8, 8), 44, 10), ((8, 8), 24, 2)],
)
def test_block_mask_is_distributed_as_the_plain_loop(grid, count, tries):
    runs, N, source = 3000, grid[0] * grid[1], random.Random(0)
    theirs = torch.zeros(runs, N, dtype=torch.bool)
    for row in theirs:
        seen = plain_block_mask(grid, count, tries, source)
        rest = source.sample(sorted(set(range(N)) - seen), count - len(seen))
        row[[*seen, *rest]] = True
    ours = block_mask(grid, torch.full((runs,), count), seeded(), tries=tries)
    a, b = (same_neighbours(m.view(-1, *grid)).float().sum(1) for m in (ours, theirs))
    assert abs(a.mean() - b.mean()) < 4 * b.std() * (2 / runs) ** 0.5
    assert abs(a.std() / b.std() - 1) < 0.1
    assert (ours.float().mean(0) - theirs.float().mean(0)).abs().max() < 0.05  # 4 deviations of the larger ones


def test_block_counts_give_half_of_the_images_a_share():
    counts = block_counts(64, 196, generator=seeded())
    masked = counts[counts > 0]
    assert len(masked) == 32 and masked.min() >= 19 and masked.max() <= 98
    expected = 196 * (0.1 + 0.4 * torch.arange(33) / 32)  # one draw from every part of the range
    ordered = masked.sort().values
    assert (ordered >= expected[:-1].floor()).all() and (ordered <= expected[1:]).all()
    assert not torch.equal(counts, block_counts(64, 196, generator=seeded(1)))
    assert not (counts[:32] > 0).all()
    assert not block_counts(8, 16, probability=0.0).any() and not block_counts(1, 16).any()


def test_block_mask_refuses_impossible_counts():
    for counts in ([17], [-1]):
        with pytest.raises(ValueError, match="16 patches"):
            block_mask((4, 4), torch.tensor(counts))
