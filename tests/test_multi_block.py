"""The sampler of I-JEPA's contexts and targets."""

import math
import random

import pytest
import torch
from ranks import on_ranks

from ssl_lab.errors import UserError
from ssl_lab.nn.masking import MultiBlock

GRIDS = [(4, 4), (4, 9), (8, 8), (14, 14), (16, 16)]


def places(grid, index):
    """(B, N) bool of (B, K) places."""
    return torch.zeros(len(index), grid[0] * grid[1], dtype=torch.bool).scatter(1, index, True)


@pytest.mark.parametrize("grid", GRIDS)
def test_contexts_and_targets_of_a_batch(grid):
    N, sampler = grid[0] * grid[1], MultiBlock()
    for seed in range(40):
        torch.manual_seed(seed)
        context, targets = sampler(16, grid)
        K, (B, M) = context.shape[1], targets.shape[:2]
        assert (len(context), B, M) == (16, 16, 4) and context.dtype == targets.dtype == torch.int64
        assert (context.diff(dim=1) > 0).all() and (targets.diff(dim=2) > 0).all()  # raster order, no place twice
        assert context.min() >= 0 and targets.min() >= 0 and max(context.max(), targets.max()) < N
        assert min(10, N // 16) < K < N
        if N < 100:  # on tiny grids a context may have to overlap a target
            continue
        assert not (places(grid, context) & places(grid, targets.flatten(1))).any()


def test_targets_are_rectangles_of_one_size():
    grid = (14, 14)
    torch.manual_seed(0)
    sizes = set()
    for _ in range(50):
        _, targets = MultiBlock()(8, grid)
        row, column = targets // 14, targets % 14
        h, w = ((x.amax(2) - x.amin(2) + 1).unique() for x in (row, column))
        assert len(h) == len(w) == 1 and h * w == targets.shape[2]
        assert row.max() < 13 and column.max() < 13  # the last place of a block is never drawn
        sizes.add((h.item(), w.item()))
    expected = set()
    for r in (i / 200 for i in range(200)):  # one number drives scale and aspect
        area, aspect = int(196 * (0.15 + 0.05 * r)), 0.75 + 0.75 * r
        expected.add((round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))))
    assert sizes == expected and len(sizes) == 5


def test_targets_may_overlap_each_other_and_every_place_but_the_last_is_drawn():
    torch.manual_seed(0)
    sampler = MultiBlock(target_scale=(0.25, 0.25), target_aspect=(1.0, 1.0))  # 4 x 4 on 8 x 8
    _, targets = sampler(2000, (8, 8))
    assert set(targets[..., 0].unique().tolist()) == {y * 8 + x for y in range(4) for x in range(4)}
    assert (places((8, 8), targets.flatten(1)).sum(1) < 64).any()
    first = targets[..., 0].flatten().bincount(minlength=64).float()
    assert first[first > 0].std() < 4 * first[first > 0].mean().sqrt()


def test_blocks_are_a_function_of_the_seed():
    def drawn(seed):
        torch.manual_seed(seed)
        return MultiBlock()(4, (14, 14))

    assert all(torch.equal(a, b) for a, b in zip(drawn(0), drawn(0), strict=True))
    assert not torch.equal(drawn(0)[1][:, :, 0], drawn(1)[1][:, :, 0])


def plain_context(grid, size, targets, keep, random):
    """One image as a plain loop: the context as a set of places, and how many targets it may overlap."""
    (H, W), (h, w) = grid, size
    failures = 0
    while True:
        top, left = random.randrange(H - h), random.randrange(W - w)
        kept = {y * W + x for y in range(top, top + h) for x in range(left, left + w)}
        for target in targets[: max(0, len(targets) - failures // 20)]:
            kept -= target
        if len(kept) > keep:
            return kept, failures // 20
        failures += 1


@pytest.mark.parametrize("min_keep", [None, 18, 25, 30])
def test_contexts_are_those_of_the_plain_loop(min_keep):
    """Length of contexts and overlap with targets, also where constraints must be dropped one by one."""
    grid, source, sampler = (8, 8), random.Random(0), MultiBlock(min_keep=min_keep)
    keep = 4 if min_keep is None else min_keep
    torch.manual_seed(0)
    ours, theirs, hits = [], [], torch.zeros(2, 4)
    for _ in range(60):
        r = torch.rand(2).tolist()
        th, tw = sampler._size(grid, sampler.target_scale, sampler.target_aspect, r[0])
        size = sampler._size(grid, sampler.context_scale, (1.0, 1.0), r[1])
        assert size == (7, 7) and th * tw in (9, 10, 12)
        top, left = torch.randint(0, 8 - th, (16, 4)), torch.randint(0, 8 - tw, (16, 4))
        blocks = [
            [{y * 8 + x for y in range(t, t + th) for x in range(s, s + tw)} for t, s in zip(*r)]
            for r in zip(top.tolist(), left.tolist())
        ]
        free = torch.ones(16, 4, 64, dtype=torch.bool)
        for b, row in enumerate(blocks):
            for m, block in enumerate(row):
                free[b, m, list(block)] = False
        found = sampler._context(free.view(16, 4, 8, 8), size, keep)
        for b, row in enumerate(blocks):
            kept, _ = plain_context(grid, size, row, keep, source)
            ours.append(found[b].sum().item())
            theirs.append(len(kept))
            for m, block in enumerate(row):
                hits[0, m] += found[b, list(block)].any()
                hits[1, m] += bool(kept & block)
    ours, theirs = torch.tensor(ours).float(), torch.tensor(theirs).float()
    assert ours.min() > keep and theirs.min() > keep
    assert abs(ours.mean() - theirs.mean()) < 4 * theirs.std() * (2 / len(ours)) ** 0.5 + 1e-6
    assert (hits[0] - hits[1]).abs().max() < 4 * hits[1].max().sqrt() + 4
    if min_keep == 30:
        assert hits[0, 3] > hits[0, 2] > hits[0, 0]  # the last target goes first


@pytest.mark.parametrize("dropped", [0, 1, 2, 4])
def test_a_target_is_given_up_after_twenty_failures(dropped):
    """All that matters is the target that leaves nothing; with the last `dropped` gone there is room at once."""
    free = torch.ones(1, 4, 8, 8, dtype=torch.bool)
    if dropped:
        free[:, 4 - dropped] = False
    torch.manual_seed(0)
    context = MultiBlock()._context(free, (7, 7), 4)
    state = torch.get_rng_state()
    assert context.sum() == 49
    torch.manual_seed(0)
    for _ in range(2 * (20 * dropped + 1)):  # a row and a column per draw
        torch.randint(0, 1, (1,))
    assert torch.equal(torch.get_rng_state(), state)


def test_contexts_are_cut_to_the_shortest_of_the_batch(monkeypatch):
    whole, draw = [], MultiBlock._context

    def record(*args):
        whole.append(draw(*args).clone())
        return whole[-1].clone()

    monkeypatch.setattr(MultiBlock, "_context", record)
    torch.manual_seed(0)
    context, _ = MultiBlock()(16, (14, 14))
    lengths = whole[0].sum(1)
    assert lengths.min() == context.shape[1] < lengths.max()
    for row, kept in zip(whole[0], context, strict=True):
        assert torch.equal(row.nonzero()[: context.shape[1], 0], kept)


@pytest.mark.parametrize(("grid", "sampler"), [((2, 2), MultiBlock()), ((8, 8), MultiBlock(min_keep=49))])
def test_a_grid_that_is_too_small_is_a_users_mistake(grid, sampler):
    for seed in range(5):
        torch.manual_seed(seed)
        with pytest.raises(UserError, match="patch_size"):
            sampler(2, grid)


def drawn(rank):
    torch.manual_seed(rank)
    found = [MultiBlock()(4, (14, 14))[1] for _ in range(5)]
    return [(x.shape[2], x[:, :, 0].tolist(), x[0, 0, -1].item() - x[0, 0, 0].item()) for x in found]


def test_ranks_agree_on_sizes_and_not_on_places(tmp_path):
    one, two = on_ranks(drawn, tmp_path)
    assert [(a, c) for a, _, c in one] == [(a, c) for a, _, c in two]
    assert all(a != b for (_, a, _), (_, b, _) in zip(one, two, strict=True))
    assert len({(a, c) for a, _, c in one}) > 1
