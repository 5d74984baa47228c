"""Parameter groups, rates and decay over progress, against values worked out by hand and a naive formula."""

import pytest
import timm
import torch
from torch import nn

from ssl_lab.backbones.vit import ViT
from ssl_lab.backbones.wav2vec2 import Wav2Vec2
from ssl_lab.errors import UserError
from ssl_lab.methods.rnnt import RNNT
from ssl_lab.nn.relative import RelativeAttention
from ssl_lab.nn.waveform import ConvFeatures, ConvPositions
from ssl_lab.rng import fold, uniform
from ssl_lab.schedules import Constant, Cosine, Linear, Warmup
from ssl_lab.train.optim import Optim


def test_schedules_at_their_landmarks():
    cosine = Cosine(0.996, 1.0)
    assert [cosine(p) for p in (0, 0.5, 1)] == pytest.approx([0.996, 0.998, 1.0])
    assert Linear(1, 3)(0.25) == 1.5 and Constant(2)(0.7) == 2
    warm = Warmup(0.0, 1.0, 0.1, Cosine(1.0, 0.0))
    assert [warm(p) for p in (0, 0.05, 0.1, 0.55, 1)] == pytest.approx([0, 0.5, 1, 0.5, 0])


def test_rates_follow_the_batch_and_progress():
    optim = Optim(lr=1.5e-4, scale_lr="linear", warmup=0.1, min_lr=0.0)
    assert optim.peak_lr(4096) == pytest.approx(2.4e-3)
    assert [optim.lr_factor(p) for p in (0, 0.05, 0.1, 0.55, 1)] == pytest.approx([0, 0.5, 1, 0.5, 0], abs=1e-12)
    assert Optim(lr=1.0, scale_lr="sqrt").peak_lr(1024) == 2.0


def test_decay_skips_vectors_and_follows_its_schedule():
    model = nn.Linear(3, 2)
    optim = Optim(lr=0.1, warmup=0.0, weight_decay=Cosine(0.04, 0.4))
    optimizer = optim.build(model.named_parameters(), 256)
    optim.update(optimizer, 0.5)
    decay = {p: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decay[model.weight] == pytest.approx(0.22) and decay[model.bias] == 0
    assert all(g["lr"] == pytest.approx(0.05) for g in optimizer.param_groups)


def test_layer_decay_counts_from_the_head():
    vit = ViT(32, 3, 4, image_size=16)
    model = nn.ModuleDict({"encoder": vit, "head": nn.Linear(32, 2)})
    optim = Optim(lr=1.0, warmup=0.0, layer_decay=0.5)
    rates = {p: g["lr"] for g in optim.build(model.named_parameters(), 256).param_groups for p in g["params"]}
    assert rates[model["head"].weight] == 1.0 and rates[vit.norm.weight] == 1.0
    assert [rates[b.mlp.fn.fc1.weight] for b in vit.blocks] == [0.125, 0.25, 0.5]
    assert rates[vit.patch_embed.proj.weight] == rates[vit.cls_token] == 0.0625


def test_all_decays_and_the_patch_projection_has_a_rate_of_its_own():
    vit = ViT(32, 2, 4, image_size=16)
    groups = Optim(lr=1.0, warmup=0.0, decay="all", weight_decay=0.1, patch_lr=0.2).build(vit.named_parameters(), 256)
    assert all(g["weight_decay"] == 0.1 for g in groups.param_groups)
    rates = {p: g["lr"] for g in groups.param_groups for p in g["params"]}
    assert rates[vit.patch_embed.proj.weight] == rates[vit.patch_embed.proj.bias] == pytest.approx(0.2)
    assert rates[vit.cls_token] == rates[vit.norm.weight] == 1.0


def test_linear_and_inverse_sqrt():
    line = Optim(lr=2.0, min_lr=0.5, schedule="linear", warmup=0.2)
    assert [line.lr_factor(p) for p in (0.1, 0.2, 0.6, 1.0)] == pytest.approx([0.5, 1.0, 0.625, 0.25])
    steps, warmup, dim = 1000, 100, 64  # arXiv:1706.03762, equation 3
    paper = [dim**-0.5 * min(n**-0.5, n * warmup**-1.5) for n in range(1, steps + 1)]
    ours = Optim(lr=(dim * warmup) ** -0.5, schedule="inverse_sqrt", warmup=warmup / steps)
    assert [ours.lr * ours.lr_factor(n / steps) for n in range(1, steps + 1)] == pytest.approx(paper)
    with pytest.raises(UserError, match=r"optim\.warmup above 0"):
        Optim(schedule="inverse_sqrt", warmup=0.0)


def test_step_schedule_of_moco():
    optim = Optim(schedule="step", warmup=0.0)
    assert [optim.lr_factor(e / 200) for e in (0, 119, 120, 159, 160, 199)] == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01, 0.01]
    )


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars", "muon", "larc"])
def test_every_optimizer_learns(name):
    torch.manual_seed(0)
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(8, 8)]), "head": nn.Linear(8, 1)})
    optim = Optim(name=name, lr={"lars": 0.05, "sgd": 0.05}.get(name, 0.02), warmup=0.0, betas=(0.9, 0.95))
    optimizer, x = optim.build(model.named_parameters(), 256), torch.randn(64, 8)
    losses = []
    for i in range(60):
        loss = (model["head"](model["blocks"][0](x).relu()) - x[:, :1] * x[:, 1:2]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optim.update(optimizer, i / 60)
        optimizer.step()
        losses.append(loss.item())
    assert (
        losses[-1] < {"lars": 0.99}.get(name, 0.7) * losses[0]
    )  # LARS moves a matrix by 0.1 % of its norm per unit of lr


def test_lars_equals_its_formula():
    """One step on a matrix: p -= lr * 0.001 |p| / (|g| + wd |p|) * (g + wd p) (You et al., 2017, eq. 6)."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(4, 3, dtype=torch.float64))
    before, g = p.detach().clone(), torch.randn(4, 3, dtype=torch.float64)
    optim = Optim(name="lars", lr=0.5, warmup=0.0, weight_decay=0.1)
    optimizer = optim.build([("w", p)], 256)
    p.grad = g.clone()
    optim.update(optimizer, 0.0)
    optimizer.step()
    trust = 0.001 * before.norm() / (g.norm() + 0.1 * before.norm())
    expected = before - 0.5 * trust * (g + 0.1 * before)
    torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["lars", "larc"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lars_neither_decays_nor_adapts_biases_and_gains(name, decay):
    """Three steps by hand, with SimCLR's exclusions; a decay of 0 (MAE's linear probe) still adapts matrices.

    LARC (apex, solo-learn): trust 0.02, and the ratio is cut where it would lift the rate of a tensor above lr.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
        model[0].weight.mul_(10.0)
    optim = Optim(name=name, lr=0.5, warmup=0.0, schedule="constant", weight_decay=decay, betas=(0.9, 0.999))
    optimizer = optim.build(model.named_parameters(), 256)
    expected = {n: p.detach().clone() for n, p in model.named_parameters()}
    speed = {n: torch.zeros_like(p) for n, p in expected.items()}
    ratios = []
    for step in range(3):
        for n, p in model.named_parameters():
            p.grad = g = torch.randn_like(p) * 10.0**-step
            q, g = expected[n], g.clone()
            if p.ndim > 1:
                ratio = {"lars": 0.001, "larc": 0.02}[name] * q.norm() / (g.norm() + decay * q.norm())
                ratio = min(ratio / 0.5, torch.ones(())) if name == "larc" else ratio
                ratios.append(float(ratio))
                g = ratio * (g + decay * q)
            speed[n] = 0.9 * speed[n] + g
            expected[n] = q - 0.5 * speed[n]
        optim.update(optimizer, 0.5)
        optimizer.step()
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), expected[n], rtol=1e-6, atol=1e-8, msg=n)
    if name == "larc" and decay == 0.0:
        assert min(ratios) < 1 and max(ratios) == 1


def test_the_mask_token_of_dinov2_is_a_part_of_the_stem():
    named = {"mask_token": nn.Parameter(torch.ones(2)), "decoder.mask_token": nn.Parameter(torch.ones(2))}
    named |= {f"student.blocks.{i}.w": nn.Parameter(torch.ones(2)) for i in range(3)}
    groups = Optim(lr=1.0, warmup=0.0, layer_decay=0.5).build(named.items(), 256).param_groups
    rates = {p: g["lr"] for g in groups for p in g["params"]}
    assert rates[named["mask_token"]] == 0.0625 and rates[named["decoder.mask_token"]] == 1.0


def test_mistakes_are_named():
    with pytest.raises(UserError, match="adamw, sgd, lars, muon, larc"):
        Optim(name="adam")
    frozen = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(UserError, match="nothing to train"):
        Optim().build(frozen.named_parameters(), 1)


def test_draws_belong_to_seed_and_position():
    positions = torch.arange(5000)
    draws = uniform(0, positions, 4)
    assert torch.equal(uniform(0, positions[100:103], 4), draws[100:103])
    assert torch.equal(uniform(0, positions, 2), draws[:, :2])
    assert not torch.equal(uniform(1, positions, 4), draws)
    assert draws.min() >= 0 and draws.max() < 1
    assert draws.mean(0) == pytest.approx(0.5, abs=0.02) and draws.var(0) == pytest.approx(1 / 12, abs=0.01)
    assert torch.corrcoef(torch.cat([draws, draws.roll(1, 0)], 1).T).fill_diagonal_(0).abs().max() < 0.06
    assert fold(0, 1, 2) != fold(0, 2, 1) and 0 <= fold(-1, 5) < 2**63


def test_layer_decay_of_speech():
    """wav2vec 2.0's convolutions and projection are its stem; a transducer's embedding belongs to the head."""
    front = ConvFeatures(8000, 8, kernels=(10, 3), strides=(5, 4))
    encoder = Wav2Vec2(16, 2, 2, front=front, positions=lambda dim: ConvPositions(dim, 6, 2))
    method = RNNT(encoder, 5)
    optimizer = Optim(lr=1.0, warmup=0.0, layer_decay=0.5).build(method.named_parameters(), 256)
    rates = {p: g["lr"] for g in optimizer.param_groups for p in g["params"]}
    stem = [encoder.front, encoder.feature_norm, encoder.proj, encoder.positions, encoder.embed_norm]
    assert {rates[p] for part in stem for p in part.parameters()} == {0.125}
    assert [{rates[p] for p in block.parameters()} for block in encoder.blocks] == [{0.25}, {0.5}]
    assert {rates[p] for p in method.transducer.parameters()} == {1.0}


def test_layer_decay_counts_in_every_stack_for_itself():
    """The text tower of a pair is shallower than the image tower and learns as fast; T5's stem has two stacks above."""
    names = [f"towers.image.backbone.blocks.{i}.weight" for i in range(12)]
    names += [f"towers.text.backbone.{end}" for end in ("embed.weight", "blocks.0.w", "blocks.1.w", "blocks.2.w")]
    names += ["towers.image.backbone.reg_token", "towers.image.projection.weight"]
    rates = _rates(names, layer_decay=0.65)
    assert [rates[name] for name in names[:12]] == pytest.approx([0.65 ** (12 - i) for i in range(12)])
    assert [rates[name] for name in names[12:16]] == pytest.approx([0.65**n for n in (4, 3, 2, 1)])
    assert rates[names[16]] == pytest.approx(0.65**13) and rates[names[17]] == 1.0
    names = ["model.encoder.blocks.1.w", "model.decoder.blocks.0.w", "model.embed.weight", "model.stem.conv1.weight"]
    names += ["model.source_positions.table.weight", "model.target_positions.table.weight"]
    assert list(_rates(names, layer_decay=0.5).values()) == [0.5, 0.5, 0.125, 0.125, 0.125, 0.125]
    assert list(_rates(["embed.weight", "head.weight"], layer_decay=0.5).values()) == [0.5, 1.0]  # no blocks at all


def test_biases_of_relative_attention_neither_decay_nor_are_made_orthogonal():
    block = nn.ModuleDict({"attn": RelativeAttention(8, 2)})
    attention = block["attn"]
    attention.lora_a = nn.Parameter(torch.ones(2, 8))
    attention.tokens = nn.Parameter(torch.ones(4, 8))  # of a tuned prefix
    model = nn.ModuleDict({"blocks": nn.ModuleList([block])})
    groups = Optim(name="muon", weight_decay=0.1).build(model.named_parameters(), 256).param_groups
    found = {p: (group["use_fallback"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert found[attention.u] == found[attention.v] == found[attention.qkv.bias] == (True, 0.0)
    assert found[attention.qkv.weight] == found[attention.lora_a] == (False, 0.1)
    assert found[attention.tokens] == (True, 0.1)


def _rates(names: list[str], **more) -> dict[str, float]:
    named = {name: nn.Parameter(torch.ones(2)) for name in names}
    groups = Optim(lr=1.0, warmup=0.0, **more).build(named.items(), 256).param_groups
    rates = {p: group["lr"] for group in groups for p in group["params"]}
    return {name: rates[p] for name, p in named.items()}


@pytest.mark.parametrize(
    ("name", "stem", "last"),
    [("swin_tiny_patch4_window7_224", "patch_embed", "layers"), ("convnext_atto", "stem", "stages")],
)
def test_layer_decay_goes_on_from_stage_to_stage(name, stem, last):
    names = [f"encoder.model.{key}" for key, _ in timm.create_model(name).named_parameters()]
    rates = _rates(names, layer_decay=0.5)  # 2, 2, 6, 2 blocks
    found = {key.removeprefix("encoder.model."): rate for key, rate in rates.items()}
    assert {rate for key, rate in found.items() if key.startswith(f"{stem}.")} == {0.5**13}
    for stage, block, below in ((0, 0, 12), (0, 1, 11), (1, 0, 10), (2, 0, 8), (2, 5, 3), (3, 0, 2), (3, 1, 1)):
        assert {rate for key, rate in found.items() if key.startswith(f"{last}.{stage}.blocks.{block}.")} == {
            0.5**below
        }
    assert {rate for key, rate in found.items() if key.startswith(f"{last}.1.downsample.")} == {0.5**10}
    assert {rate for key, rate in found.items() if key.startswith("head.")} == {1.0}
