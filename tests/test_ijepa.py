import math
import re

import pytest
import torch
from parity import gap, gradients, images, randomise

from ssl_lab.backbones.timm import Timm
from ssl_lab.backbones.vit import ViT
from ssl_lab.errors import UserError
from ssl_lab.methods.ijepa import IJEPA, Predictor
from ssl_lab.nn.embed import patchify, sincos_2d
from ssl_lab.nn.masking import MultiBlock
from ssl_lab.rng import seed_all

GRID, SIDE = (4, 4), 32


def small(**options) -> ViT:
    options = {"cls_token": False, "positions": "sincos"} | options
    return ViT(dim=32, depth=2, num_heads=4, image_size=SIDE, patch_size=8, **options)


def predictor(dim: int, grid: tuple[int, int]) -> Predictor:
    return Predictor(dim, grid, dim=16, depth=2, num_heads=2)


def method(**options) -> IJEPA:
    torch.manual_seed(0)
    return IJEPA(small(**options), predictor=predictor)


def blocks(batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Places of 5 context patches and of 4 targets of 2 patches, which overlap each other."""
    order = torch.rand(batch, 16, generator=torch.Generator().manual_seed(3)).argsort(1)
    context = order[:, :5].sort(1).values
    targets = torch.stack([order[:, 5 + m : 7 + m].sort(1).values for m in range(4)], 1)
    return context, targets


def linear(layer, x):
    return x @ layer.weight.T + layer.bias


def norm(layer, x):
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    return x * layer.weight + layer.bias


def plain_blocks(network, x):
    """Pre-norm blocks and the final norm on one sequence (L, D), head by head."""
    for block in network.blocks:
        attention, mlp = block["attn"], block["mlp"]
        q, k, v = linear(attention.fn.qkv, norm(attention.norm, x)).chunk(3, -1)
        width = x.shape[1] // attention.fn.num_heads
        heads = []
        for h in range(attention.fn.num_heads):
            part = slice(h * width, (h + 1) * width)
            heads.append((q[:, part] @ k[:, part].T / width**0.5).softmax(-1) @ v[:, part])
        x = x + linear(attention.fn.proj, torch.cat(heads, 1))
        hidden = linear(mlp.fn.fc1, norm(mlp.norm, x))
        x = x + linear(mlp.fn.fc2, 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2))))
    return norm(network.norm, x)


def plain_encoder(network, patches, where):
    x = patches[where] @ network.patch_embed.proj.weight.flatten(1).T + network.patch_embed.proj.bias
    return plain_blocks(network, x + network.pos_embed[0, where])


def plain_loss(ours, image, context, targets):
    """The objective as a loop over images and blocks, one sequence at a time."""
    total, count = 0.0, 0
    for b, patches in enumerate(patchify(image, 8)):
        seen = plain_encoder(ours.student, patches, context[b])
        with torch.no_grad():
            whole = plain_encoder(ours.encoder, patches, torch.arange(16))
            whole = (whole - whole.mean(1, keepdim=True)) / (whole.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        for target in targets[b]:
            net = ours.predictor
            known = linear(net.embed, seen) + net.pos_embed[0, context[b]]
            asked = net.mask_token[0] + net.pos_embed[0, target]
            predicted = linear(net.head, plain_blocks(net, torch.cat([known, asked]))[len(known) :])
            error = (predicted - whole[target]).abs()
            total = total + torch.where(error < 1, error**2 / 2, error - 0.5).sum()
            count += error.numel()
    return total / count


def test_loss_and_gradients_are_those_of_a_plain_loop():
    ours = randomise(method())
    image, (context, targets) = 3 * images(SIDE, 3), blocks()
    loss = ours.predict(image, context, targets)
    loss.backward()
    found = gradients(ours)
    ours.zero_grad()
    expected = plain_loss(ours, image, context, targets)
    expected.backward()
    wanted = gradients(ours)
    assert abs(loss.item() - expected.item()) < 1e-12
    assert {k: gap(found[k], wanted[k]) for k in found if gap(found[k], wanted[k]) > 1e-12} == {}
    trained = [k for k, p in ours.named_parameters() if p.requires_grad]
    assert len(trained) > 40 and all(found[k].abs().max() > 0 for k in trained)
    assert not any(k.startswith("encoder.") for k in trained)


def test_predictor_is_lightlys():
    ijepa_timm = pytest.importorskip("lightly.models.modules.ijepa_timm", reason="needs lightly")
    theirs = ijepa_timm.IJEPAPredictorTIMM(num_patches=16, depth=2, mlp_dim=32, predictor_embed_dim=16, num_heads=2)
    randomise(theirs)
    ours = predictor(32, GRID).double().eval()
    state = {}
    for key, value in theirs.state_dict().items():
        key = re.sub(r"norm1\.", "attn.norm.", re.sub(r"norm2\.", "mlp.norm.", key.removeprefix("decoder.")))
        key = re.sub(r"\.attn\.(qkv|proj)\.", r".attn.fn.\1.", re.sub(r"\.mlp\.(fc\d)\.", r".mlp.fn.\1.", key))
        state[key.replace("predictor_embed", "embed").replace("predictor_proj", "head")] = value
    ours.load_state_dict(state)
    context, targets = blocks()
    tokens = torch.randn(3, 5, 32, dtype=torch.float64)
    expected = theirs(tokens, [context], list(targets.unbind(1)))  # block by block, then image by image
    found = ours(tokens, context, targets)
    assert found.shape == (3, 4, 2, 32)
    assert gap(found.transpose(0, 1).flatten(0, 1), expected) < 1e-12
    expected.square().sum().backward()
    found.square().sum().backward()
    assert gap(ours.embed.weight.grad, theirs.predictor_embed.weight.grad) < 1e-10
    assert gap(ours.mask_token.grad, theirs.decoder.mask_token.grad) < 1e-10


def test_blocks_do_not_see_each_other():
    ours = randomise(method()).predictor
    context, targets = blocks()
    tokens = torch.randn(3, 5, 32, dtype=torch.float64)
    alone = torch.cat([ours(tokens, context, targets[:, m : m + 1]) for m in range(4)], 1)
    assert gap(ours(tokens, context, targets), alone) < 1e-12


def test_the_student_sees_the_context_only():
    ours = randomise(method())
    image, (context, targets) = images(SIDE, 3), blocks()
    hidden = torch.ones(3, 16, dtype=torch.bool).scatter(1, context, False).view(3, 1, 4, 4)
    other = image + hidden.repeat_interleave(8, 2).repeat_interleave(8, 3)
    assert torch.equal(ours.student(image, keep=context).tokens, ours.student(other, keep=context).tokens)
    assert not torch.equal(ours.encoder(image).tokens, ours.encoder(other).tokens)
    assert ours.predict(image, context, targets) != ours.predict(other, context, targets)


def test_the_average_follows_along_a_straight_line_and_is_evaluated():
    ours = method()
    assert [ours.momentum(p) for p in (0.0, 0.25, 1.0)] == pytest.approx([0.996, 0.997, 1.0])
    old = {k: v.clone() for k, v in ours.encoder.named_parameters()}
    with torch.no_grad():
        for p in ours.student.parameters():
            p.add_(torch.randn_like(p) * p.requires_grad)
    for progress in (0.0, 0.5):
        ours.after_step(progress)
    student = dict(ours.student.named_parameters())
    for name, p in ours.encoder.named_parameters():
        torch.testing.assert_close(p, 0.996 * 0.998 * old[name] + (1 - 0.996 * 0.998) * student[name])
    image = images(SIDE).float()
    assert torch.equal(ours.embed({"image": image}), ours.encoder(image).tokens.mean(1))


def test_drop_path_is_the_students():
    ours = method(drop_path=0.5).train()
    torch.manual_seed(0)
    a, b = (ours.encoder(images(SIDE, 8).float()).tokens for _ in range(2))
    assert torch.equal(a, b)
    a, b = (ours.student(images(SIDE, 8).float()).tokens for _ in range(2))
    assert not torch.equal(a, b)


def test_class_and_register_tokens_only_take_part():
    ours = method(cls_token=True, num_registers=2)
    ours.predict(images(SIDE, 3).float(), *blocks()).backward()
    assert ours.encoder(images(SIDE, 3).float()).tokens.shape == (3, 16, 32)
    assert ours.student.cls_token.grad.abs().sum() > 0 and ours.student.registers.grad.abs().sum() > 0


def test_a_step_draws_its_blocks_from_the_seed():
    ours, image = method(), images(SIDE, 4).float()
    losses = []
    for seed in (0, 0, 1):
        seed_all(seed)
        losses.append(ours.step({"image": image}, 0.5).loss.item())
    assert losses[0] == losses[1] != losses[2]
    seed_all(0)
    assert ours.predict(image, *ours.masks(4, GRID)).item() == losses[0]


def test_initial_weights():
    ours = method()
    weights = [m.weight for m in ours.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    assert torch.cat([w.flatten() for w in weights]).std().item() == pytest.approx(0.02, rel=0.05)
    assert 0.01 < ours.predictor.mask_token.std() < 0.03
    assert torch.equal(ours.predictor.pos_embed[0], sincos_2d(16, GRID))
    assert all((m.weight == 1).all() for m in ours.modules() if isinstance(m, torch.nn.LayerNorm))


def test_users_mistakes():
    with pytest.raises(UserError, match="2 x 2"):
        IJEPA(ViT(dim=32, depth=1, num_heads=2, image_size=32, patch_size=16))
    with pytest.raises(UserError, match="backbone=vit"):
        IJEPA(Timm("resnet18"))
    with pytest.raises(UserError, match="min_keep"):
        IJEPA(small(), predictor=predictor, masks=MultiBlock(min_keep=10))


def test_masks_are_of_the_image_that_comes():
    ours = method()
    for side in (48, 16):
        with pytest.raises(UserError, match=rf"{side} x {side} px.* 32 x 32 px.*data.image_size"):
            ours.step({"image": images(side, 2).float()}, 0.5)
    with pytest.raises(UserError, match="multiples of patch_size=8"):
        ours.step({"image": images(36, 2).float()}, 0.5)
    with pytest.raises(UserError, match=r"views@data\.views=ijepa"):
        ours.step({"views": [images(SIDE, 2).float()]}, 0.5)
