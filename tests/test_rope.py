"""Rotary tables: every stretching equals transformers', positions per row, imported pairings."""

import functools

import pytest
import torch

from ssl_lab.nn.attention import Attention
from ssl_lab.nn.block import Context
from ssl_lab.nn.mask import CAUSAL
from ssl_lab.nn.rope import (
    LinearScaling,
    Llama3Scaling,
    NTKScaling,
    YaRN,
    frequencies,
    from_interleaved,
    rope_1d,
    rotate,
    yarn_mscale,
)
from tests.parity import gap, randomise

BASE, DIM = 10000.0, 64
STRETCHED = {
    "linear": (LinearScaling(4.0), {"rope_type": "linear", "factor": 4.0}),
    "yarn": (YaRN(4.0, 256), {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}),
    "yarn_bounds": (
        YaRN(8.0, 2048, beta_fast=16.0, beta_slow=2.0, attention_factor=1.25, truncate=False),
        {
            "rope_type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 2048,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "attention_factor": 1.25,
            "truncate": False,
        },
    ),
    "llama3": (
        Llama3Scaling(8.0, original_length=512),
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 512,
        },
    ),
}


@pytest.mark.parametrize("name", [*STRETCHED, "ntk"])
def test_stretching_equals_transformers(name):
    transformers = pytest.importorskip("transformers", reason="the reference is transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    seq_len = None
    if name == "ntk":  # theirs follows the text's length; at three times the trained one its factor is 3
        scaling, parameters, seq_len = NTKScaling(3.0), {"rope_type": "dynamic", "factor": 1.0}, 768
    else:
        scaling, parameters = STRETCHED[name]
    config = transformers.LlamaConfig(
        hidden_size=DIM,
        num_attention_heads=1,
        max_position_embeddings=256,
        rope_parameters={"rope_theta": BASE, **parameters},
    )
    theirs, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu", seq_len)
    ours, our_factor = scaling(frequencies(DIM, BASE), BASE)
    assert our_factor == pytest.approx(factor, abs=1e-12)
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-6)
    assert gap(ours, frequencies(DIM, BASE)) > 1e-4
    cos, sin = rope_1d(torch.arange(5), DIM, scaling=scaling)
    torch.testing.assert_close(cos.square() + sin.square(), torch.full_like(cos, factor**2))


def test_interpolation_is_a_smaller_step():
    at = torch.arange(12)
    torch.testing.assert_close(rope_1d(at, DIM, scaling=LinearScaling(4.0)), rope_1d(at / 4, DIM), atol=1e-6, rtol=1e-5)


def test_yarn_sharpens_by_the_papers_rule():
    assert yarn_mscale(1.0) == 1.0 and yarn_mscale(40.0) == pytest.approx(1.368888, abs=1e-6)


def test_rotation_entry_by_entry():
    x, at = torch.randn(1, 1, 3, 8, dtype=torch.float64), torch.tensor([0, 1, 7])
    turned = rotate(x, rope_1d(at, 8))
    for row, position in enumerate(at):
        for i in range(4):
            angle = position * torch.tensor(10000.0) ** (-2 * i / 8)
            a, b = x[0, 0, row, i], x[0, 0, row, i + 4]
            torch.testing.assert_close(turned[0, 0, row, i], a * angle.cos() - b * angle.sin(), atol=1e-6, rtol=0)
            torch.testing.assert_close(turned[0, 0, row, i + 4], b * angle.cos() + a * angle.sin(), atol=1e-6, rtol=0)


def test_every_row_may_have_its_own_positions():
    attention = randomise(Attention(32, 4, num_kv_heads=2))
    x = torch.randn(2, 6, 32, dtype=torch.float64)
    at = torch.stack([torch.arange(6), torch.arange(6) + 5])
    together = attention(x, Context(mask=CAUSAL, rope=rope_1d(at, 8)))
    for row in range(2):
        alone = attention(x[row : row + 1], Context(mask=CAUSAL, rope=rope_1d(at[row], 8)))
        assert gap(together[row : row + 1], alone) < 1e-12


@pytest.mark.parametrize("rotary", [None, 4])
def test_an_interleaved_projection_is_reordered(rotary):
    """Scores are the same: neighbours turned before, halves turned after the reordering of both projections."""
    torch.manual_seed(0)
    heads, width = 2, 8
    turned = rotary or width
    wq, wk = torch.randn(2, heads * width, 16, dtype=torch.float64)
    x = torch.randn(5, 16, dtype=torch.float64)
    angle = torch.arange(5)[:, None] * frequencies(turned, BASE)
    spin = torch.polar(torch.ones_like(angle), angle).to(torch.complex128)

    def neighbours(weight):
        kept, last = (x @ weight.t()).view(5, heads, width).transpose(0, 1).split([width - turned, turned], -1)
        pairs = torch.view_as_complex(last.unflatten(-1, (-1, 2)).contiguous())
        return torch.cat([kept, torch.view_as_real(pairs * spin).flatten(-2)], -1)

    def halves(weight):
        moved = (x @ from_interleaved(weight, width, rotary).t()).view(5, heads, width).transpose(0, 1)
        kept, last = moved.split([width - turned, turned], -1)
        return torch.cat([kept, rotate(last, rope_1d(torch.arange(5), turned))], -1)

    theirs, ours = (f(wq) @ f(wk).transpose(1, 2) for f in (neighbours, halves))
    assert gap(theirs, ours) < 1e-5
    assert gap(halves(wq), neighbours(wq)) > 1e-2


def test_joint_rotation_of_queries_and_keys_equals_one_by_one():
    attention = randomise(Attention(32, 4, num_kv_heads=2))
    normed = Attention(32, 4, num_kv_heads=2, qk_norm=functools.partial(torch.nn.Identity)).double()
    normed.load_state_dict(attention.state_dict())
    x, ctx = torch.randn(2, 6, 32, dtype=torch.float64), Context(mask=CAUSAL, rope=rope_1d(torch.arange(6), 8))
    assert gap(attention(x, ctx), normed(x, ctx)) < 1e-13


@pytest.mark.parametrize("head_dim", [36, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_in_half_precision_rotates_as_float64_does(head_dim, dtype):
    table = rope_1d(torch.arange(50), head_dim)
    x = torch.randn(2, 50, 3 * head_dim, generator=torch.Generator().manual_seed(0)).to(dtype)
    x = x.unflatten(-1, (3, -1)).transpose(1, 2).requires_grad_()  # strided, as a projection gives it
    exact = x.detach().double().requires_grad_()
    turned, wanted = rotate(x, table), rotate(exact, tuple(part.double() for part in table))
    assert turned.dtype == dtype and turned.is_contiguous()
    (back,) = torch.autograd.grad(turned.sum(), x)
    (wanted_back,) = torch.autograd.grad(wanted.sum(), exact)
    close = {"rtol": 0.0, "atol": 5 * torch.finfo(dtype).eps}
    torch.testing.assert_close(turned.double(), wanted, **close)
    torch.testing.assert_close(back.double(), wanted_back, **close)
