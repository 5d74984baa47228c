"""Linear attention equals its quadratic definition; windows with global positions equal Longformer's."""

import pytest
import torch

from ssl_lab.errors import UserError
from ssl_lab.nn.attention import Attention
from ssl_lab.nn.block import Context
from ssl_lab.nn.cache import KVCache
from ssl_lab.nn.linear_attention import LinearAttention, elu_plus_one, linear_attention
from ssl_lab.nn.mask import CAUSAL, FULL, AttnMask
from ssl_lab.nn.rope import rope_1d
from tests.parity import gap, randomise, weigh

D, H, L = 32, 4, 12
VALID = torch.arange(L)[None] >= torch.tensor([[0], [5]])


def tokens() -> torch.Tensor:
    return torch.randn(2, L, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize("chunk", [1, 5, 64])
@pytest.mark.parametrize("mask", [FULL, CAUSAL, AttnMask(valid=VALID), AttnMask(causal=True, valid=VALID)])
def test_equals_the_quadratic_form(mask, chunk):
    q, k = (elu_plus_one(torch.randn(2, H, L, 8, dtype=torch.float64)).requires_grad_() for _ in range(2))
    v = torch.randn(2, H, L, 6, dtype=torch.float64, requires_grad=True)
    out, state = linear_attention(q, k, v, causal=mask.causal, valid=mask.valid, chunk=chunk)
    weights = q @ k.mT
    allowed = mask.dense(L, L, "cpu")
    weights = weights if allowed is None else weights * allowed
    total = weights.sum(-1, keepdim=True)
    expected = weights @ v / total.masked_fill(total == 0, 1)
    assert gap(out, expected) < 1e-12
    if mask.causal and mask.valid is not None:
        assert out[1, :, :5].abs().sum() == 0
    for a, b in zip(*(torch.autograd.grad(weigh(o), [q, k, v]) for o in (out, expected)), strict=True):
        assert b.abs().max() > 1e-3 and gap(a, b) < 1e-12
    assert state.shape == (2, H, 8, 7)


@pytest.mark.parametrize("steps", [(1,) * L, (7, 1, 4)], ids=str)
def test_decoding_carries_a_state(steps):
    attention, x = randomise(LinearAttention(D, H, chunk=3)), tokens()
    cache, parts, past = KVCache(), [], 0
    for length in steps:
        seen = AttnMask(causal=True, valid=VALID[:, : past + length])
        parts.append(attention(x[:, past : past + length], Context(mask=seen, cache=cache)))
        past += length
        assert len(cache) == past
    whole = attention(x, Context(mask=AttnMask(causal=True, valid=VALID)))
    assert gap(torch.cat(parts, 1), whole) < 1e-12
    kept = cache.state(0)
    cache.reorder(torch.tensor([1, 1, 0]))
    assert torch.equal(cache.state(0), kept[[1, 1, 0]]) and len(cache) == L


def test_what_has_no_linear_form_is_refused():
    attention, x = LinearAttention(D, H), tokens().float()
    with pytest.raises(UserError, match="no window"):
        attention(x, Context(mask=AttnMask(causal=True, window=3)))
    with pytest.raises(UserError, match="rotary"):
        attention(x, Context(rope=rope_1d(torch.arange(L), 8)))
    with pytest.raises(UserError, match="causal"):
        attention(x, Context(cache=KVCache()))


def test_half_precision_sums_in_float32():
    attention, x = randomise(LinearAttention(D, H)), tokens()
    exact = attention(x, Context(mask=CAUSAL))
    with torch.autocast("cpu", torch.bfloat16):
        half = attention.float()(x.float(), Context(mask=CAUSAL))
    assert half.dtype == torch.bfloat16 and gap(half.double(), exact) < 0.05


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_windows_with_global_positions_equal_longformer(kernel):
    """Where the second set of projections, for global positions, is a copy of the first."""
    transformers = pytest.importorskip("transformers", reason="the reference is transformers")
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    config = transformers.LongformerConfig(
        hidden_size=D, num_attention_heads=H, attention_window=[4], attention_probs_dropout_prob=0.0
    )
    theirs = randomise(LongformerSelfAttention(config, 0))
    for name in ("query", "key", "value"):
        getattr(theirs, f"{name}_global").load_state_dict(getattr(theirs, name).state_dict())
    ours = Attention(D, H, kernel=kernel).double()
    parts = [getattr(theirs, name) for name in ("query", "key", "value")]
    with torch.no_grad():
        ours.qkv.weight.copy_(torch.cat([p.weight for p in parts]))
        ours.qkv.bias.copy_(torch.cat([p.bias for p in parts]))
        ours.proj.weight.copy_(torch.eye(D))
        ours.proj.bias.zero_()
    everyone = torch.zeros(2, L, dtype=torch.bool)
    everyone[0, 0], everyone[1, [2, 7]] = True, True
    valid = torch.arange(L)[None] < torch.tensor([[L], [10]])
    x = tokens()
    expected = theirs(
        x.clone(),
        attention_mask=torch.where(valid, 0.0, -10000.0).double() + everyone * 10000.0,
        is_index_masked=~valid,
        is_index_global_attn=everyone,
        is_global_attn=True,
    )[0]
    out = ours(x, Context(mask=AttnMask(window=3, everyone=everyone, valid=valid)))
    assert gap(out[valid], expected[valid]) < 1e-6  # a softmax of theirs is float32
    plain = ours(x, Context(mask=AttnMask(window=3, valid=valid)))
    assert gap(out[valid], plain[valid]) > 1e-3
