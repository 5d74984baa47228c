"""Decoding with a cache gives what the whole gives, in float64 to the last digits."""

import functools

import pytest
import torch

from ssl_lab.nn.bias import RelativeBias, alibi_bias
from ssl_lab.nn.block import Context, Transformer
from ssl_lab.nn.cache import KVCache
from ssl_lab.nn.mask import CAUSAL, AttnMask
from ssl_lab.nn.recipes import gpt_block, llama_block, rms_norm, t5_block, transformer_block
from ssl_lab.nn.rope import rope_1d
from tests.parity import gap, randomise

D, H, DH, L = 32, 4, 8, 23
RECIPES = {
    "gpt": gpt_block,
    "llama": functools.partial(llama_block, num_kv_heads=2),
    "t5": functools.partial(t5_block, cross=True),
    "transformer": functools.partial(transformer_block, cross=True),
}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def stack(block) -> Transformer:
    return randomise(Transformer(lambda layer: block(D, H, layer=layer), 2, D, norm=rms_norm))


def tokens(batch: int = 2, length: int = L) -> torch.Tensor:
    return torch.randn(batch, length, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def run(model, x, past, cache, *, window=None, valid=None, rope=True, memory=None, bias=None):
    at = torch.arange(past, past + x.shape[1])
    if valid is not None:
        at = (valid.long().cumsum(1) - 1).clamp(min=0)[:, -x.shape[1] :]
    ctx = Context(
        mask=AttnMask(causal=True, window=window, valid=valid),
        rope=rope_1d(at, DH) if rope else None,
        bias=None if bias is None else bias(x.shape[1], past + x.shape[1]),
        memory=memory,
        cache=cache,
    )
    return model.encode(x, ctx)[0]


def in_parts(model, x, steps, cache, valid=None, **more):
    """Outputs of parts of so many positions, one after the other, the rest one by one."""
    out, past = [], 0
    for length in [*steps, *[1] * (x.shape[1] - sum(steps))]:
        seen = None if valid is None else valid[:, : past + length]
        out.append(run(model, x[:, past : past + length], past, cache, valid=seen, **more))
        past += length
        assert len(cache) == past
    return torch.cat(out, 1)


@pytest.mark.parametrize("steps", [(), (9,), (4, 6)], ids=str)
@pytest.mark.parametrize("recipe", RECIPES)
def test_cached_equals_the_whole(recipe, steps):
    model, x = stack(RECIPES[recipe]), tokens()
    memory = tokens(length=5) if recipe in ("t5", "transformer") else None
    bias = RelativeBias(H, 8, 12, bidirectional=False).double() if recipe == "t5" else None
    whole = run(model, x, 0, None, memory=memory, bias=bias)
    assert gap(in_parts(model, x, steps, KVCache(), memory=memory, bias=bias), whole) < 1e-12


@pytest.mark.parametrize("length", [0, 10, 200])
def test_a_buffer_may_be_any_size(length):
    model, x = stack(RECIPES["llama"]), tokens(length=70)
    assert gap(in_parts(model, x, (3,), KVCache(length)), run(model, x, 0, None)) < 1e-12


def test_a_step_writes_into_the_buffers_it_has():
    cache = KVCache(100)
    first = cache.append(0, *torch.randn(2, 1, 2, 5, 4))
    again = cache.append(0, *torch.randn(2, 1, 2, 1, 4))
    assert again[0].shape[2] == 6 and all(a.data_ptr() == b.data_ptr() for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("window", [1, 4, 8, 50])
@pytest.mark.parametrize("steps", [(), (3, 7), (17, 2)], ids=str)
def test_a_rolling_cache_equals_the_window_mask(window, steps):
    model, x = stack(RECIPES["llama"]), tokens()
    whole = run(model, x, 0, None, window=window)
    cache = KVCache(window=window)
    assert gap(in_parts(model, x, steps, cache, window=window), whole) < 1e-12
    if window < L:
        assert gap(whole, run(model, x, 0, None)) > 1e-3


def test_a_rolling_cache_does_not_grow():
    cache = KVCache(window=8)
    for _ in range(500):
        k, _ = cache.append(0, *torch.randn(2, 1, 2, 1, 4))
        assert k.shape[2] <= 8
    assert len(cache) == 500 and cache._stores[0].room <= 64


@pytest.mark.parametrize("window", [None, 6])
def test_left_padding_changes_no_row(window):
    model, x = stack(RECIPES["llama"]), tokens()
    pad = 5
    valid = torch.ones(2, L, dtype=torch.bool)
    valid[1, :pad] = False
    whole = run(model, x, 0, None, valid=valid, window=window)
    cached = in_parts(model, x, (8,), KVCache(window=window), valid=valid, window=window)
    assert gap(cached[0], whole[0]) < 1e-12 and gap(cached[1, pad:], whole[1, pad:]) < 1e-12
    alone = run(model, x[1:, pad:], 0, None, window=window)
    assert gap(whole[1:, pad:], alone) < 1e-12


def test_alibi_needs_no_positions_in_the_cache():
    model, x = stack(RECIPES["gpt"]), tokens()
    bias = functools.partial(alibi_bias, H)
    whole = run(model, x, 0, None, rope=False, bias=bias)
    assert gap(in_parts(model, x, (5,), KVCache(), rope=False, bias=bias), whole) < 1e-12


@pytest.mark.parametrize("recipe", ["llama", "transformer"])
def test_beams_are_reordered(recipe):
    """After a reordering the rows go on as if each had had its new past from the start."""
    model, x = stack(RECIPES[recipe]), tokens(3, 12)
    memory = tokens(3, 5) if recipe == "transformer" else None
    cache, rows = KVCache(), torch.tensor([2, 0, 0])
    in_parts(model, x[:, :7], (4,), cache, memory=memory)
    cache.reorder(rows)
    memory = None if memory is None else memory[rows]
    rest = torch.cat([run(model, x[:, i : i + 1], i, cache, memory=memory) for i in range(7, 12)], 1)
    whole = run(model, torch.cat([x[rows, :7], x[:, 7:]], 1), 0, None, memory=memory)
    assert gap(rest, whole[:, 7:]) < 1e-12


def test_the_memory_is_projected_once():
    model, x, cache = stack(RECIPES["transformer"]), tokens(), KVCache()
    run(model, x[:, :3], 0, cache, memory=tokens(length=5))
    projections = [m.fn.kv for block in model.blocks for n, m in block.items() if n == "cross"]
    for projection in projections:
        projection.register_forward_hook(lambda *_: pytest.fail("projected again"))
    run(model, x[:, 3:4], 3, cache, memory=tokens(length=5))


def test_gradients_flow_through_a_cache():
    model, x = stack(RECIPES["llama"]), tokens()
    with torch.enable_grad():
        grads = []
        for cached in (False, True):
            leaf = x.clone().requires_grad_()
            out = in_parts(model, leaf, (20,), KVCache()) if cached else run(model, leaf, 0, None)
            grads.append(torch.autograd.grad(out.square().sum(), leaf)[0])
    assert gap(*grads) < 1e-11


def test_inference_mode():
    model, x = stack(RECIPES["llama"]), tokens()
    with torch.inference_mode():
        cached = in_parts(model, x, (4,), KVCache(window=5), window=5)
    assert gap(cached, run(model, x, 0, None, window=5)) < 1e-12


def test_plain_attention_needs_no_mask_for_one_token():
    assert CAUSAL.dense(1, 40, "cpu") is None
    assert AttnMask(causal=True, window=8).dense(1, 8, "cpu") is None
    assert AttnMask(causal=True, window=8).dense(1, 9, "cpu") is not None
