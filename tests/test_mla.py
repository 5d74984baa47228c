"""Latent attention: transformers' DeepSeek-V3, absorbed = naive, decoding from latents."""

import functools

import pytest
import torch

from ssl_lab.nn.block import Context
from ssl_lab.nn.cache import KVCache
from ssl_lab.nn.mask import CAUSAL, AttnMask
from ssl_lab.nn.mla import MLA
from ssl_lab.nn.recipes import mla_block
from ssl_lab.nn.rope import YaRN, from_interleaved, rope_1d, yarn_mscale
from tests.parity import gap, randomise, weigh

D, H, L = 32, 4, 9
SHAPE = {"kv_rank": 16, "nope_dim": 8, "rope_dim": 4, "v_dim": 6}


def tokens() -> torch.Tensor:
    return torch.randn(2, L, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def context(**more) -> Context:
    return Context(mask=CAUSAL, rope=rope_1d(torch.arange(L), SHAPE["rope_dim"]), **more)


@pytest.mark.parametrize("q_rank", [None, 12])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("yarn", [False, True])
def test_equals_transformers(q_rank, interleaved, yarn):
    transformers = pytest.importorskip("transformers", reason="the reference is transformers")
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as reference

    rope = {"rope_type": "default", "rope_theta": 1e4}
    scaling, scale = None, None
    if yarn:
        rope |= {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
        rope |= {"mscale": 1.0, "mscale_all_dim": 1.0}
        scaling, scale = YaRN(4.0, 64, attention_factor=1.0), 12**-0.5 * yarn_mscale(4.0) ** 2
    config = transformers.DeepseekV3Config(
        hidden_size=D, num_attention_heads=H, num_key_value_heads=H, q_lora_rank=q_rank, kv_lora_rank=16,
        qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6, rope_interleave=interleaved, rope_parameters=rope,
        attn_implementation="eager",
    )  # fmt: skip
    theirs = randomise(reference.DeepseekV3Attention(config, layer_idx=0))
    given = theirs.state_dict()
    down, up = given["kv_a_proj_with_mqa.weight"], "q_b_proj.weight" if q_rank else "q_proj.weight"
    if interleaved:
        given[up] = from_interleaved(given[up], 12, 4)
        down = from_interleaved(down, len(down), 4)
    state = {
        "kv_down.weight": down, "kv_norm.weight": given["kv_a_layernorm.weight"],
        "kv_up.weight": given["kv_b_proj.weight"], "proj.weight": given["o_proj.weight"],
        "q.2.weight" if q_rank else "q.weight": given[up],
    }  # fmt: skip
    if q_rank:
        state |= {"q.0.weight": given["q_a_proj.weight"], "q.1.weight": given["q_a_layernorm.weight"]}
    ours = MLA(D, H, q_rank=q_rank, scale=scale, **SHAPE).double()
    ours.load_state_dict(state)
    x = tokens().requires_grad_()
    embedding = reference.DeepseekV3RotaryEmbedding(config)(x, torch.arange(L)[None])
    mask = torch.full((L, L), -1e30, dtype=torch.float64).triu(1)[None, None]
    expected = theirs(x, embedding, mask)[0]
    out = ours(x, Context(mask=CAUSAL, rope=rope_1d(torch.arange(L), 4, scaling=scaling)))
    assert gap(out, expected) < 2e-6  # their norms and softmax work in float32 at any precision
    a, b = (torch.autograd.grad(weigh(o), x)[0] for o in (out, expected))
    assert b.abs().max() > 1e-3 and gap(a, b) < 5e-6


@pytest.mark.parametrize("kernel", ["auto", "eager", "sdpa"])
@pytest.mark.parametrize("mask", [CAUSAL, AttnMask(causal=True, valid=torch.arange(L)[None] > 2)])
def test_absorbed_equals_naive(kernel, mask):
    attention = randomise(MLA(D, H, kernel=kernel, **SHAPE))
    leaves = [torch.randn(2, h, L, w, dtype=torch.float64).requires_grad_() for h, w in ((H, 8), (H, 4), (1, 20))]
    grads = []
    for read in (attention.naive, attention.absorbed):
        out = read(*leaves, Context(mask=mask))
        grads.append([out, *torch.autograd.grad(weigh(out), [*leaves, attention.kv_up.weight])])
    assert all(gap(a, b) < 1e-12 and a.abs().max() > 1e-3 for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("steps", [(1,) * L, (4, *(1,) * 5), (3, 4, 2)], ids=str)
@pytest.mark.parametrize("grad", [False, True])
def test_decoding_from_latents_equals_the_whole(steps, grad):
    attention, x, ctx = randomise(MLA(D, H, q_rank=12, **SHAPE)), tokens(), context()
    cache, parts, past = KVCache(), [], 0
    with torch.set_grad_enabled(grad):
        for length in steps:
            rows = slice(past, past + length)
            part = Context(mask=CAUSAL, rope=(ctx.rope[0][rows], ctx.rope[1][rows]), cache=cache)
            parts.append(attention(x[:, rows], part))
            past += length
        assert gap(torch.cat(parts, 1), attention(x, ctx)) < 1e-12
    (kept,) = cache.append(0, torch.zeros(2, 1, 0, 20, dtype=torch.float64))
    assert kept.shape == (2, 1, L, 16 + 4)


def test_the_recipe_trains_every_parameter():
    block = mla_block(D, H, attention=functools.partial(MLA, q_rank=12, **SHAPE), layer=3, dropout=0.1)
    assert block["attn"].fn.layer == 3 and block["attn"].fn.dropout == 0.1 and block["attn"].fn.rotary_dim == 4
    weigh(block(tokens().float(), context())).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in block.parameters())
