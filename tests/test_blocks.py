"""The core's recipes, activation checkpointing, compilation, and the bookkeeping of tokens."""

import functools

import pytest
import torch
from torch import nn

from ssl_lab.backbones.vit import ViT
from ssl_lab.errors import UserError
from ssl_lab.nn.attention import Attention
from ssl_lab.nn.block import Block, Context, Residual, encoder_block
from ssl_lab.nn.cache import KVCache
from ssl_lab.nn.embed import patchify, sincos_2d, unpatchify
from ssl_lab.nn.ffn import MLP, SwiGLU
from ssl_lab.nn.mask import CAUSAL
from ssl_lab.nn.masking import put_back, random_mask, take
from ssl_lab.nn.rope import rope_1d, rope_2d, rotate
from ssl_lab.train.parallel import Parallel
from ssl_lab.types import Encoded


def tiny(**kwargs) -> ViT:
    torch.manual_seed(0)
    return ViT(32, 2, 4, image_size=32, patch_size=8, **kwargs)


def recipes() -> dict[str, Block]:
    rms = functools.partial(nn.RMSNorm, eps=1e-6)
    return {
        "encoder": encoder_block(32, 4, layer_scale=1e-2, qk_norm=nn.LayerNorm),
        "llama": Block(
            attn=Residual(32, Attention(32, 4, num_kv_heads=2, qkv_bias=False, proj_bias=False), norm=rms),
            mlp=Residual(32, SwiGLU(32, 64), norm=rms),
        ),
        "post_norm": Block(
            attn=Residual(32, Attention(32, 4), place="post"), mlp=Residual(32, MLP(32, 64), place="post")
        ),
        "cross": Block(
            attn=Residual(32, Attention(32, 4)), cross=Residual(32, Attention(32, 4, cross=True), gate=True)
        ),
    }


def context() -> Context:
    return Context(
        mask=CAUSAL,
        rope=rope_1d(torch.arange(6), 8),
        memory=torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0)),
    )


def test_a_block_has_several_names_and_one_that_does_not_exist_is_named():
    vit, x = tiny(), torch.randn(1, 3, 32, 32)
    hidden = vit(x, layers=[1, -1, -2]).hidden
    assert sorted(hidden) == [-2, -1, 1] and hidden[1] is hidden[-1]
    for wrong in (2, -3):
        with pytest.raises(UserError, match=rf"layers={wrong}: there are 2 blocks; the last is -1"):
            vit(x, layers=[0, wrong])


@pytest.mark.parametrize("name", recipes())
def test_checkpointing_keeps_every_gradient(name):
    block = recipes()[name]
    if "cross" in block:
        nn.init.constant_(block["cross"].gate, 0.5)
    x = torch.randn(2, 6, 32)
    grads = []
    for on in (False, True):
        block.checkpointing = on
        block.zero_grad()
        block(x, context()).square().sum().backward()
        grads.append({n: p.grad.clone() for n, p in block.named_parameters()})
    for n, g in grads[0].items():
        assert g.abs().sum() > 0, n
        torch.testing.assert_close(g, grads[1][n])


@pytest.mark.parametrize("frozen", [False, True])
def test_checkpointing_keeps_nothing_inside_of_a_block_that_hands_a_gradient_through(frozen):
    block = recipes()["encoder"].requires_grad_(not frozen).train(not frozen)
    kept, grads = [], []
    for block.checkpointing in (False, True):
        x, saved = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(1)).requires_grad_(), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, into=saved: into.append(t.numel()) or t, lambda t: t):
            out = block(x, Context())
        kept.append(sum(saved))
        grads.append(torch.autograd.grad(out.square().sum(), x)[0])
    assert kept[1] < kept[0] / 4
    torch.testing.assert_close(*grads)


@pytest.mark.slow
@pytest.mark.parametrize("name", recipes())
def test_a_block_compiles_without_a_graph_break(name):
    block, x = recipes()[name], torch.randn(2, 6, 32)
    torch.testing.assert_close(
        torch.compile(block, fullgraph=True)(x, context()), block(x, context()), atol=1e-5, rtol=1e-4
    )


def test_compiling_in_place_keeps_the_keys():
    vit = tiny()
    keys = list(vit.state_dict())
    Parallel(compile=True, checkpoint_blocks=True)(vit)
    assert list(vit.state_dict()) == keys
    assert all(b.checkpointing for b in vit.blocks)


@pytest.mark.parametrize("key", ["checkpoint_blocks", "compile"])
def test_a_network_without_blocks_is_told(key):
    Parallel()(nn.Linear(2, 2))
    with pytest.raises(UserError, match=f"{key}=true acts on blocks .* Linear has none"):
        Parallel(**{key: True})(nn.Linear(2, 2))


def test_a_closed_gate_leaves_the_input():
    block = Block(cross=Residual(32, Attention(32, 4, cross=True), gate=True))
    x = torch.randn(2, 6, 32)
    assert torch.equal(block(x, context()), x)


def test_cached_decoding_equals_the_whole():
    attention = Attention(32, 4, num_kv_heads=2).double()
    x = torch.randn(1, 6, 32, dtype=torch.float64)
    rope = rope_1d(torch.arange(6), 8)
    whole = attention(x, Context(mask=CAUSAL, rope=rope))
    cache, parts = KVCache(), []
    for i in range(6):
        ctx = Context(mask=CAUSAL, rope=(rope[0][i : i + 1], rope[1][i : i + 1]), cache=cache)
        parts.append(attention(x[:, i : i + 1], ctx))
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-6, rtol=0)
    assert len(cache) == 6


def test_rotation_depends_on_distance_alone():
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def score(i, j):
        a, b = (rotate(x, rope_1d(torch.tensor([p]), 16)) for x, p in ((q, i), (k, j)))
        return (a * b).sum()

    torch.testing.assert_close(score(3, 1), score(13, 11), atol=1e-5, rtol=1e-5)
    assert (score(3, 1) - score(3, 2)).abs() > 1e-4


def test_rotation_leaves_the_prefix():
    x = torch.randn(2, 4, 1 + 12, 16)
    turned = rotate(x, rope_2d(3, 4, 16))
    assert torch.equal(turned[:, :, :1], x[:, :, :1])
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))


def test_keep_equals_dropping_the_other_tokens():
    vit, image = tiny(num_registers=2), torch.randn(2, 3, 32, 32)
    keep = torch.stack([torch.arange(16), torch.randperm(16)])
    whole, kept = vit(image), vit(image, keep=keep)
    torch.testing.assert_close(kept.tokens, take(whole.tokens, keep), atol=1e-5, rtol=0)
    few = vit(image, keep=keep[:, :5])
    assert few.tokens.shape == (2, 5, 32) and few.prefix.shape == (2, 3, 32)
    changed = image.clone()
    changed[0, :, -8:, -8:] += 1  # the last patch is not among the five kept of the first sample
    assert torch.equal(vit(changed, keep=keep[:, :5]).tokens[0], few.tokens[0])


def test_hidden_layers():
    vit, image = tiny(), torch.randn(1, 3, 32, 32)
    out = vit(image, layers=(0, -1))
    assert set(out.hidden) == {0, -1} and out.hidden[0].shape == (1, 17, 32)
    torch.testing.assert_close(vit.norm(out.hidden[-1])[:, 1:], out.tokens)


def test_wrong_images_are_named():
    with pytest.raises(UserError, match="patch_size=8"):
        tiny()(torch.zeros(1, 3, 30, 32))


def test_drop_path_grows_with_depth_and_keeps_the_mean():
    rates = [getattr(b.mlp.drop_path, "drop_prob", 0.0) for b in ViT(32, 3, 4, image_size=16, drop_path=0.2).blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2])


def test_patchify_orders_and_inverse():
    image = torch.arange(2 * 3 * 8 * 12).reshape(2, 3, 8, 12).float()
    patches = patchify(image, 4, channels_last=True)
    assert torch.equal(unpatchify(patches, 4, (2, 3)), image)
    expected = torch.einsum("bchpwq->bhwpqc", image.reshape(2, 3, 2, 4, 3, 4)).reshape(2, 6, 48)
    assert torch.equal(patches, expected)
    conv = nn.Conv2d(3, 5, 4, 4)
    ours = patchify(image, 4) @ conv.weight.flatten(1).T + conv.bias
    torch.testing.assert_close(ours, conv(image).flatten(2).transpose(1, 2), atol=1e-3, rtol=1e-5)


def test_sincos_table_entry_by_entry():
    table = sincos_2d(8, (2, 3), prefix=1)
    assert torch.equal(table[0], torch.zeros(8))
    row, column = 1, 2
    expected = []
    for position in (column, row):
        angles = [position / 10000 ** (k / 2) for k in range(2)]
        expected += [torch.tensor(angles).sin(), torch.tensor(angles).cos()]
    torch.testing.assert_close(table[1 + row * 3 + column], torch.cat(expected))


def test_masks_split_all_tokens_per_sample():
    noise = torch.rand(64, 10)
    keep, drop = random_mask(noise, 0.75)
    assert keep.shape == (64, 2) and drop.shape == (64, 8)
    assert torch.equal(torch.cat([keep, drop], 1).sort(1).values, torch.arange(10).expand(64, 10))
    assert len(keep.unique(dim=0)) > 1
    x = torch.randn(64, 10, 4)
    back = put_back(take(x, keep), keep, torch.zeros(4), 10)
    assert torch.equal(take(back, keep), take(x, keep)) and take(back, drop).abs().sum() == 0


def test_pooling():
    tokens, prefix = torch.randn(2, 4, 3), torch.randn(2, 1, 3)
    valid = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]], dtype=torch.bool)
    encoded = Encoded(tokens, prefix, valid)
    torch.testing.assert_close(encoded.pooled("mean")[1], tokens[1, :2].mean(0))
    torch.testing.assert_close(encoded.pooled("last")[1], tokens[1, 1])
    assert torch.equal(encoded.pooled(), prefix[:, 0])
    registers = Encoded(tokens, prefix, valid, has_cls=False)
    assert torch.equal(registers.pooled(), registers.pooled("mean"))
    for bare in (registers, Encoded(tokens, prefix[:, :0])):
        with pytest.raises(ValueError, match="class token"):
            bare.pooled("cls")


def test_registers_alone_are_no_class_token():
    vit, image = tiny(num_registers=2, cls_token=False), torch.randn(2, 3, 32, 32)
    encoded = vit(image, tokens=False)
    torch.testing.assert_close(encoded.pooled(), encoded.tokens.mean(1))
    assert encoded.tokens.shape == (2, 16, 32)


def outputs(vit, image, **more):
    vit.zero_grad()
    encoded = vit(image, **more)
    encoded.prefix.square().sum().backward()
    return encoded, {n: p.grad.clone() for n, p in vit.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("place", ["pre", "post"])
def test_leaving_out_unwanted_positions_changes_nothing(place):
    vit, image = tiny(num_registers=2).double(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for residual in (r for block in vit.blocks for r in block.values()):
        residual.place = place
    whole, gradients = outputs(vit, image)
    part, same = outputs(vit, image, tokens=False)
    assert part.tokens.shape[1] == 0
    torch.testing.assert_close(part.prefix, whole.prefix, atol=1e-12, rtol=0)
    torch.testing.assert_close(same, gradients, atol=1e-12, rtol=1e-10)


def test_unwanted_positions_are_computed_where_others_need_them():
    vit, image = tiny(), torch.randn(2, 3, 32, 32)
    assert vit(image, tokens=False, layers=(-1,)).hidden[-1].shape[1] == 1 + 16
    assert not vit.blocks[-1].narrows(Context(mask=CAUSAL))
    conv = Residual(32, torch.nn.Conv1d(4, 4, 1))
    assert not Block(attn=vit.blocks[0]["attn"], conv=conv).narrows(Context())
