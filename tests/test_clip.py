"""CLIP and SigLIP: towers, cached gradients, dropped patches, frozen parts, a third modality, mistakes."""

import functools
import math

import pytest
import torch
from parity import gap, gradients, randomise
from torch import nn
from training import run, same_end

from ssl_lab.backbones.decoder import Decoder
from ssl_lab.backbones.text import TextEncoder
from ssl_lab.backbones.tower import Tower
from ssl_lab.backbones.vit import ViT
from ssl_lab.errors import UserError
from ssl_lab.losses.pairs import clip_loss, sigmoid_loss
from ssl_lab.methods.clip import CLIP
from ssl_lab.methods.siglip import SigLIP
from ssl_lab.nn.block import encoder_block
from ssl_lab.nn.pool import AttentionPool
from ssl_lab.nn.recipes import gpt_block
from ssl_lab.types import Batch, Embeds, Encoded

VOCAB, LENGTH, SIZE = 40, 12, 6


def image_tower(embed_dim=16, **options):
    torch.manual_seed(1)
    drop_path = options.pop("drop_path", 0.0)
    cls_token = options.pop("cls_token", True)
    vit = ViT(32, 2, 4, image_size=32, patch_size=8, drop_path=drop_path, cls_token=cls_token)
    return Tower(vit, embed_dim, **options)


def text_tower(embed_dim=16, causal=True, **options):
    block = functools.partial(encoder_block, norm=nn.LayerNorm, act="quick_gelu")
    text = TextEncoder(VOCAB, 24, 2, 4, max_length=LENGTH, num_types=0, causal=causal, block=block)
    return Tower(text, embed_dim, **options)


def clip(cls=CLIP, image=None, text=None, **options):
    torch.manual_seed(0)
    return randomise(cls(image or image_tower(), text or text_tower(), **options)).train()


def batch(size=SIZE):
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(1, VOCAB, (size, LENGTH), generator=generator)
    valid = torch.arange(LENGTH) < torch.randint(3, LENGTH + 1, (size, 1), generator=generator)
    image = torch.randn(size, 3, 32, 32, generator=generator, dtype=torch.float64)
    return Batch(image=image, tokens=tokens.where(valid, 0), valid=valid, target=torch.arange(size))


def trained(method, given=None, seed=0):
    """Loss and gradients of a step."""
    torch.manual_seed(seed)
    method.zero_grad()
    loss = method.step(given or batch(), 0.5).loss
    loss.backward()
    return loss.detach(), gradients(method)


def same(one, other, tolerance=1e-12):
    assert gap(one[0], other[0]) < tolerance
    assert {name: gap(g, other[1][name]) for name, g in one[1].items() if gap(g, other[1][name]) > tolerance} == {}


@pytest.mark.parametrize("cls", [CLIP, SigLIP])
def test_a_step_is_the_loss_of_the_towers(cls):
    method, given = clip(cls), batch()
    image, text = method.towers["image"], method.towers["text"]
    a = image.projection(image.backbone(given["image"]).prefix[:, 0])
    encoded = text.backbone(given["tokens"]).tokens
    last = given["valid"].sum(1) - 1
    b = text.projection(encoded[torch.arange(SIZE), last])
    scale = method.logit_scale.exp()
    wanted = clip_loss([a, b], scale) if cls is CLIP else sigmoid_loss([a, b], scale, method.logit_bias)
    step = method.step(given, 0.5)
    assert gap(step.loss, wanted) < 1e-12
    assert step.logs["logit_scale"] == scale.detach()
    assert gap(method.embed_text(given), nn.functional.normalize(b, dim=1)) < 1e-12
    assert gap(method.embed(given), image.backbone(given["image"]).prefix[:, 0]) < 1e-12
    assert isinstance(method, Embeds)


@pytest.mark.parametrize("chunk", [1, 4, 6, 100])
@pytest.mark.parametrize("cls", [CLIP, SigLIP])
def test_cached_gradients_are_those_of_the_whole_batch(cls, chunk):
    same(trained(clip(cls, chunk=chunk)), trained(clip(cls)))


def test_caching_repeats_what_was_random():
    """With dropped paths the pieces draw as they did when they first passed: twice the same step is the same."""
    one = trained(clip(image=image_tower(drop_path=0.5), chunk=2), seed=5)
    same(one, trained(clip(image=image_tower(drop_path=0.5), chunk=2), seed=5))
    other = trained(clip(image=image_tower(drop_path=0.5), chunk=2), seed=6)
    assert gap(one[0], other[0]) > 1e-6
    # The gradient belongs to that loss: a small step along it lowers the loss by its squared length.
    method = clip(image=image_tower(drop_path=0.5), chunk=2)
    loss, found = trained(method, seed=5)
    with torch.no_grad():
        for name, p in method.named_parameters():
            p -= 1e-6 * found[name]
    lower, _ = trained(method, seed=5)
    slope = sum(g.square().sum() for g in found.values())
    assert ((loss - lower) / (1e-6 * slope)).item() == pytest.approx(1.0, abs=1e-3)


class Passes(nn.Module):
    """Counts what goes through a backbone and whether a graph is kept of it."""

    def __init__(self, backbone):
        super().__init__()
        self.inner, self.dim, self.sizes = backbone, backbone.dim, []

    def forward(self, x, **options):
        self.sizes.append(len(x))
        return self.inner(x, **options)


def test_caching_holds_the_activations_of_one_chunk():
    def kept(chunk):
        tower = Tower(Passes(ViT(32, 2, 4, image_size=32, patch_size=8)), 16)
        method, held = clip(image=tower, chunk=chunk), []

        def pack(tensor):
            held.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = method.step(batch(), 0.5).loss
        loss.backward()
        return sum(held), tower.backbone.sizes

    whole, sizes = kept(None)
    assert sizes == [SIZE]
    cached, sizes = kept(2)
    assert sizes == [2, 2, 2] * 2  # once without a graph, once when the loss is known
    assert cached - batch()["image"].numel() < whole / 50  # the images themselves are kept either way


def test_dropped_patches():
    method, given, seen = clip(keep=0.5), batch(), []
    method.encoder.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    one = trained(method, seed=1)
    assert seen == [1 + 8]
    assert gap(trained(method, seed=2)[0], one[0]) > 1e-6
    same(trained(clip(keep=0.5, chunk=2), seed=1), one)
    seen.clear()
    method.embed_image(given)
    assert seen == [17]  # judged by the whole image


def test_a_frozen_tower_neither_learns_nor_drops():
    image = image_tower(frozen=True, drop_path=0.9)
    assert not image.backbone.training  # before anybody calls `train`
    for chunk in (None, 2):
        method = clip(image=image, chunk=chunk)
        assert not image.backbone.training and image.training
        before = {name: p.clone() for name, p in method.named_parameters()}
        loss, found = trained(method)
        same((loss, {}), (trained(method, seed=9)[0], {}))
        held = [name for name, g in found.items() if not g.abs().sum()]
        assert held and all(name.startswith("towers.image.backbone.") for name in held)
        assert found["towers.image.projection.weight"].abs().sum() > 0
        optimizer = method.configure_optimizers()
        optimizer.step()
        moved = {name for name, p in method.named_parameters() if not torch.equal(p, before[name])}
        assert moved == {name for name in found if name not in held}


def test_a_third_tower_needs_no_other_loss():
    class Audio(nn.Module):
        dim = 8

        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(5, 8)

        def forward(self, x, *, valid=None, tokens=True):
            x = self.linear(x)
            return Encoded(x, x[:, :0], valid=valid, has_cls=False)

    for cls in (CLIP, SigLIP):
        method = clip(cls, others={"audio": Tower(Audio(), 16)})
        given = batch()
        given["audio"] = torch.randn(SIZE, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        given["audio_valid"] = torch.arange(7) < torch.arange(1, SIZE + 1)[:, None]
        loss, found = trained(method, given)
        assert found["towers.audio.backbone.linear.weight"].abs().sum() > 0
        given["audio"] = given["audio"].where(given["audio_valid"][..., None], 99.0)
        assert gap(trained(method, given)[0], loss) < 1e-12


@pytest.mark.parametrize("pooling", [None, "mean", functools.partial(AttentionPool, num_heads=4)])
@pytest.mark.parametrize("kind", ["causal", "both sides", "decoder"])
def test_padding_is_never_seen(kind, pooling):
    if kind == "decoder":
        decoder = Decoder(VOCAB, 24, 2, 4, max_length=LENGTH, block=gpt_block)
        tower = Tower(decoder, 16, pooling=pooling)
    else:
        tower = text_tower(causal=kind == "causal", pooling=pooling)
    tower, given = randomise(tower), batch()
    tokens, valid = given["tokens"], given["valid"]
    found = tower(tokens, valid=valid)
    assert gap(tower(tokens.where(valid, 7), valid=valid), found) < 1e-12
    alone = torch.cat([tower(t[None, :n]) for t, n in zip(tokens, valid.sum(1), strict=True)])
    assert gap(alone, found) < 1e-12


def test_padding_that_is_seen():
    tower, given = randomise(text_tower(causal=False, pooling="last", padding="seen")), batch()
    found = tower(given["tokens"], valid=given["valid"])
    assert gap(found, tower.projection(tower.backbone(given["tokens"]).tokens[:, -1])) < 1e-12


def test_the_last_block_answers_for_one_position():
    """The result and all gradients are those of a pass through all positions."""
    tower, given = randomise(text_tower()).train(), batch()
    last = given["valid"].sum(1, keepdim=True) - 1
    narrow = tower.backbone(given["tokens"], rows=last).tokens
    narrow.square().sum().backward()
    found = gradients(tower)
    tower.zero_grad()
    wide = tower.backbone(given["tokens"]).tokens[torch.arange(SIZE)[:, None], last]
    wide.square().sum().backward()
    assert gap(narrow, wide) < 1e-12
    same((narrow, found), (wide, gradients(tower)))


def test_first_values():
    method = CLIP(Tower(ViT(64, 3, 4, image_size=32, patch_size=4), 48), text_tower(48))
    assert method.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    vit, text = method.towers["image"], method.towers["text"]
    assert vit.backbone.pos_embed.std().item() == pytest.approx(64**-0.5, rel=0.05)
    assert vit.projection.weight.std().item() == pytest.approx(64**-0.5, rel=0.05)
    assert vit.backbone.blocks[0]["attn"].fn.qkv.weight.std().item() == pytest.approx((2 / (64 * 4)) ** 0.5, rel=0.05)
    assert text.projection.weight.std().item() == pytest.approx(24**-0.5, rel=0.1)
    assert text.backbone.positions.weight.std().item() == pytest.approx(0.01, rel=0.2)
    assert text.backbone.embed.weight.std().item() == pytest.approx(0.02, rel=0.1)
    method = SigLIP(image_tower(), text_tower(causal=False))
    assert (method.logit_scale.item(), method.logit_bias.item()) == (pytest.approx(math.log(10)), -10)
    qkv = method.towers["text"].backbone.blocks[0]["attn"].fn.qkv
    assert qkv.weight.abs().max().item() == pytest.approx((6 / 48) ** 0.5, rel=0.01) and not qkv.bias.any()


@pytest.mark.parametrize(("value", "kept"), [(9.0, math.log(100)), (-1.0, 0.0), (2.0, 2.0)])
def test_the_scale_stays_within_bounds(value, kept):
    method = clip()
    with torch.no_grad():
        method.logit_scale.fill_(value)
    method.after_step(0.5)
    assert method.logit_scale.item() == pytest.approx(kept)


def test_the_scale_of_siglip_has_no_bounds():
    method = clip(SigLIP)
    with torch.no_grad():
        method.logit_scale.fill_(4.7215)  # of a published one
    method.after_step(0.5)
    assert method.logit_scale.item() == pytest.approx(4.7215)


def test_mistakes_are_one_line_before_training():
    with pytest.raises(UserError, match=r"keep=0\.05 of 16 patches leaves none"):
        clip(keep=0.05).step(batch(), 0.5)
    with pytest.raises(UserError, match=r"image 16, text 8.*embed_dim"):
        CLIP(image_tower(16), text_tower(8))
    with pytest.raises(UserError, match="gives 32 numbers, not embed_dim=16"):
        image_tower(16, projection="none")
    with pytest.raises(UserError, match="needs a ViT"):
        CLIP(Tower(Passes(image_tower().backbone), 16), text_tower(), keep=0.5)
    with pytest.raises(UserError, match="chunk=0"):
        clip(chunk=0)
    with pytest.raises(UserError, match="text tower reads tokens"):
        clip().step(Batch(image=batch()["image"]), 0.5)
    method, given = clip(), batch()
    given["tokens"] = torch.ones(SIZE, LENGTH + 1, dtype=torch.int64)
    given["valid"] = torch.ones(SIZE, LENGTH + 1, dtype=torch.bool)
    with pytest.raises(UserError, match="longer than the model's context"):
        method.step(given, 0.5)


WORDS = [
    "data.train.length=40",
    "data.test.length=16",
    "data.batch_size=8",
    "method.image.backbone.dim=32",
    "method.image.backbone.depth=2",
    "method.image.backbone.num_heads=2",
    "method.image.backbone.patch_size=8",
    "method.text.backbone.dim=32",
    "method.text.backbone.depth=1",
    "method.text.backbone.num_heads=2",
    "method.keep=0.5",
    "method.chunk=4",
    "duration=8steps",
    "save_steps=2",
    "trainer.log_every_n_steps=1",
    "trainer.accelerator=cpu",
    "data.tokenizer.vocab_size=300",
]


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_a_killed_run_goes_on_to_the_same_bits(name, tmp_path):
    words = [f"method={name}", *WORDS, *(["method.text.embed_dim=16", "method.image.embed_dim=16"] * (name == "clip"))]
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert run([*words, f"out={whole}"]) == 0
    assert run([*words, f"out={out}"], ("backward", 6)) == -9
    assert run([*words, f"out={out}"]) == 0
    same_end(whole, out)
