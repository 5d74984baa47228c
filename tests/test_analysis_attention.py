"""Attention maps are the weights that the network uses, whichever kernel computes it."""

import functools

import pytest
import torch
from parity import TINY, gap, images, randomise
from torch import nn

from ssl_lab.analysis.attention import attention_maps, attention_weights, heat
from ssl_lab.backbones.conformer import Conformer
from ssl_lab.backbones.timm import Timm
from ssl_lab.backbones.vit import ViT
from ssl_lab.errors import UserError
from ssl_lab.nn.block import encoder_block
from ssl_lab.nn.prefix import Prefix
from ssl_lab.weights import io
from ssl_lab.weights.rename import rename
from ssl_lab.weights.tables import hf_dinov2, hf_vit


def pairs():
    transformers = pytest.importorskip("transformers")
    yield transformers.ViTModel(transformers.ViTConfig(**hf_vit.arguments(TINY)), add_pooling_layer=False), hf_vit, TINY
    architecture = TINY | {"layer_scale": 0.1, "num_registers": 3}
    config = transformers.Dinov2WithRegistersConfig(**hf_dinov2.arguments(architecture))
    yield transformers.Dinov2WithRegistersModel(config), hf_dinov2, architecture


@pytest.mark.parametrize("which", [0, 1], ids=["vit", "dinov2_with_registers"])
def test_weights_are_those_of_transformers(which):
    theirs, table, architecture = list(pairs())[which]
    randomise(theirs)
    theirs.set_attn_implementation("eager")
    ours = io.vit(architecture).double().eval()
    ours.load_state_dict(rename(theirs.state_dict(), table.TABLE))
    expected = theirs(images(), output_attentions=True).attentions
    close = 1e-7 if which == 0 else 1e-12  # their ViT takes the softmax in float32
    for layer in (-1, 0):
        found, _ = attention_weights(ours, images(), layer)
        assert gap(found, expected[layer]) <= close
    prefix = 1 + architecture["num_registers"]
    maps = attention_maps(ours, images())
    assert gap(maps.flatten(2), expected[-1][:, :, 0, prefix:]) <= close and maps.shape[2:] == (4, 4)


def vit(**settings):
    return randomise(ViT(32, 2, 4, image_size=32, patch_size=8, **settings))


@pytest.mark.parametrize("kernel", ["eager", "sdpa", "math"])
def test_weights_times_values_give_the_output_of_the_kernel(kernel):
    """With queries and keys normed, a class token and registers."""
    norm = functools.partial(nn.LayerNorm, eps=1e-6)
    encoder = vit(num_registers=2, block=functools.partial(encoder_block, kernel=kernel, qk_norm=norm))
    attention, caught = encoder.blocks[-1]["attn"].fn, {}
    attention.qkv.register_forward_hook(lambda *call: caught.update(v=call[2][..., 64:]))
    attention.proj.register_forward_pre_hook(lambda _, args: caught.update(out=args[0]))
    weights, _ = attention_weights(encoder, images())
    value = caught["v"].unflatten(-1, (4, 8)).transpose(1, 2)
    assert gap((weights @ value).transpose(1, 2).flatten(2), caught["out"]) <= 1e-12
    assert weights.shape == (2, 4, 19, 19) and gap(weights.sum(-1), torch.ones(2, 4, 19).double()) <= 1e-12


def test_an_own_scale_and_a_tuned_prefix_count():
    """What the prefix takes is missing from the sums; without it and at the same scale they are 1."""
    encoder = vit(block=functools.partial(encoder_block, kernel="eager"))
    attention, caught = encoder.blocks[-1]["attn"].fn, {}
    attention.scale = 0.7
    attention.prefix = randomise(Prefix(3, 4, 8))
    attention.qkv.register_forward_hook(lambda *call: caught.update(v=call[2][..., 64:]))
    attention.proj.register_forward_pre_hook(lambda _, args: caught.update(out=args[0]))
    weights, _ = attention_weights(encoder, images())
    left = 1 - weights.sum(-1)
    assert weights.shape == (2, 4, 17, 17) and (left > 0).all()
    attention.prefix = None
    alone, _ = attention_weights(encoder, images())
    assert gap(weights / weights.sum(-1, keepdim=True), alone) <= 1e-12
    value = caught["v"].unflatten(-1, (4, 8)).transpose(1, 2)
    assert gap((alone @ value).transpose(1, 2).flatten(2), caught["out"]) <= 1e-12


def test_without_a_class_token_patches_are_averaged():
    encoder = vit(cls_token=False, num_registers=2)
    weights, _ = attention_weights(encoder, images())
    maps = attention_maps(encoder, images())
    assert gap(maps.flatten(2), weights[:, :, 2:, 2:].mean(2)) <= 1e-14


def test_oblong_images_and_autocast():
    encoder = vit().float()
    image = images(width=64).float()
    plain = attention_maps(encoder, image)
    assert plain.shape == (2, 4, 4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        half = attention_maps(encoder, image)
    assert half.dtype == torch.float32 and 0 < gap(half, plain) < 0.02


def test_no_hook_stays_and_the_output_is_unchanged():
    encoder = vit()
    before = encoder(images()).tokens
    _, encoded = attention_weights(encoder, images())
    assert torch.equal(encoded.tokens, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in encoder.modules())


def test_other_networks_are_named():
    with pytest.raises(UserError, match="Timm has no blocks of ours"):
        attention_maps(Timm("resnet18"), images().float())
    encoder = vit()
    with pytest.raises(UserError, match="block -1 of Conformer has no self-attention"):
        attention_weights(Conformer(16, 1, 2, positions="relative"), torch.zeros(1, 8000))
    encoder.blocks[-1] = nn.Identity()
    with pytest.raises(UserError, match="block -1 of ViT has no self-attention"):
        attention_maps(encoder, images())


def test_heat_goes_from_dark_to_light_in_blocks():
    maps = torch.tensor([[[0.0, 0.1], [0.2, 0.4]], [[0.0, 0.0], [0.0, 0.0]]])
    out = heat(maps, (8, 4))
    assert out.shape == (2, 3, 8, 4) and out.dtype == torch.uint8
    brightness = out[0].float().mean(0)[::4, ::2].flatten()
    assert brightness.tolist() == sorted(set(brightness.tolist())) and brightness[0] < 30 and brightness[3] > 200
    assert torch.equal(out[0][:, ::4, ::2].repeat_interleave(4, 1).repeat_interleave(2, 2), out[0])
    assert (out[1].float().mean(0) < 30).all()
    assert torch.equal(heat(maps * 7, (8, 4)), out)
