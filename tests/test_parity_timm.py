import functools

import numpy as np
import pytest
import timm
import torch
from parity import TINY, gap, gradients, images, randomise, weigh
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models.vision_transformer import VisionTransformer

from ssl_lab.backbones.timm import Timm
from ssl_lab.backbones.vit import ViT
from ssl_lab.errors import UserError
from ssl_lab.methods.supervised import Supervised
from ssl_lab.weights import io
from ssl_lab.weights.rename import rename
from ssl_lab.weights.tables import timm_vit

VARIANTS = {
    "class token": {},
    "no class token": {"cls_token": False},
    "registers": {"num_registers": 3},
    "registers alone": {"num_registers": 3, "cls_token": False},
    "layer scale": {"layer_scale": 0.1},
    "qk norm": {"qk_norm": True},
    "all": {"num_registers": 3, "layer_scale": 0.1, "qk_norm": True, "mlp_ratio": 4.0},
}


def pair(**changes) -> tuple[ViT, VisionTransformer]:
    theirs = randomise(VisionTransformer(**timm_vit.arguments(TINY | changes)))
    ours = io.vit(TINY | changes).double().eval()
    ours.load_state_dict(rename(timm_vit.fold(theirs.state_dict()), timm_vit.TABLE))
    return ours, theirs


def all_tokens(ours: ViT, x: torch.Tensor) -> torch.Tensor:
    encoded = ours(x)
    return torch.cat([encoded.prefix, encoded.tokens], 1)


@pytest.mark.parametrize("name", VARIANTS)
def test_vit_is_timm(name):
    ours, theirs = pair(**VARIANTS[name])
    a, b = all_tokens(ours, images()), theirs.forward_features(images())
    assert gap(a, b) <= 1e-10
    weigh(a).backward()
    weigh(b).backward()
    expected, found = rename(gradients(theirs), timm_vit.TABLE), gradients(ours)
    if ours.cls_token is not None and ours.registers is not None:  # timm adds no position to the class token here
        assert gap(found["pos_embed"][:, :1], found["cls_token"]) <= 1e-10
        found["pos_embed"] = found["pos_embed"][:, 1:]
    assert found.keys() == expected.keys()
    assert {key: gap(found[key], expected[key]) for key in found if gap(found[key], expected[key]) > 1e-10} == {}


@pytest.mark.parametrize("name", VARIANTS)
def test_table_goes_both_ways(name):
    ours, theirs = pair(**VARIANTS[name])
    back = timm_vit.unfold(rename(ours.state_dict(), timm_vit.TABLE, back=True))
    fresh = VisionTransformer(**timm_vit.arguments(TINY | VARIANTS[name])).double().eval()
    fresh.load_state_dict(back)
    assert gap(fresh.forward_features(images()), theirs.forward_features(images())) <= 1e-12


def test_registers_with_positions_of_their_own():
    args = timm_vit.arguments(TINY | {"num_registers": 3}) | {"no_embed_class": False}
    theirs = randomise(VisionTransformer(**args))
    ours = io.vit(TINY | {"num_registers": 3}).double().eval()
    ours.load_state_dict(rename(timm_vit.fold(theirs.state_dict()), timm_vit.TABLE))
    assert gap(all_tokens(ours, images()), theirs.forward_features(images())) <= 1e-10


def test_hidden_layers_are_timms():
    ours, theirs = pair(num_registers=3)
    hidden = ours(images(), layers=[0, -1]).hidden
    expected = theirs.forward_intermediates(
        images(), indices=[0, 1], output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True
    )
    for key, (tokens, prefix) in zip((0, -1), expected, strict=True):
        assert gap(hidden[key], torch.cat([prefix, tokens], 1)) <= 1e-10


@pytest.mark.parametrize("size", [(48, 48), (16, 16), (32, 48)])
def test_other_resolution_follows_timms_rule(size):
    ours, theirs = pair(num_registers=3)
    x = images(size[0], width=size[1])
    theirs.set_input_size(size)
    assert gap(all_tokens(ours, x), theirs.forward_features(x)) <= 1e-10


def test_loading_at_another_resolution_follows_timms_rule(tmp_path):
    ours, theirs = pair()
    io.save(ours.float(), tmp_path / "a.safetensors")
    larger = io.vit(TINY | {"image_size": 48})
    io.load(larger, str(tmp_path / "a.safetensors"))
    theirs.float().set_input_size((48, 48))
    assert gap(larger.pos_embed, theirs.pos_embed) == 0
    assert gap(all_tokens(larger.double(), images(48)), theirs.double().forward_features(images(48))) <= 1e-10


def test_sincos_positions_against_loops():
    table = io.vit(TINY | {"positions": "sincos"}).pos_embed[0].numpy()
    expected = np.zeros((17, 32))
    for row in range(4):
        for column in range(4):
            for k in range(8):
                frequency = 10000 ** (-k / 8)
                place = 1 + 4 * row + column
                for offset, value in ((0, column), (16, row)):
                    expected[place, offset + k] = np.sin(value * frequency)
                    expected[place, offset + 8 + k] = np.cos(value * frequency)
    assert np.abs(table - expected).max() < 1e-6


def supervised(**kwargs) -> tuple[Supervised, dict[str, torch.Tensor]]:
    method = randomise(Supervised(io.vit(TINY), 5, **kwargs))
    return method, {"image": images(batch=4), "target": torch.tensor([0, 3, 4, 1])}


def test_label_smoothing_loss_is_timms():
    method, batch = supervised(label_smoothing=0.1)
    expected = LabelSmoothingCrossEntropy(0.1)(method.classify(batch), batch["target"])
    assert abs(method.step(batch, 0.0).loss.item() - expected.item()) < 1e-6


def test_mixup_loss_is_timms():
    make = functools.partial(Mixup, mixup_alpha=0.8, cutmix_alpha=1.0)
    method, batch = supervised(mixup=make, label_smoothing=0.1)
    np.random.seed(3)
    image, soft = make(num_classes=5, label_smoothing=0.1)(batch["image"].clone(), batch["target"])
    expected = SoftTargetCrossEntropy()(method.classify({"image": image}), soft)
    np.random.seed(3)
    assert abs(method.step(batch, 0.0).loss.item() - expected.item()) < 1e-6


def test_images_without_a_class_are_left_out():
    method, batch = supervised(label_smoothing=0.1)
    batch["target"] = torch.tensor([0, -1, 4, -1])
    known = {name: each[::2] for name, each in batch.items()}
    step, expected = method.step(batch, 0.0), method.step(known, 0.0)
    torch.testing.assert_close(step.loss, expected.loss)
    assert step.logs["top1"] == expected.logs["top1"]


def test_mixup_counts_the_share_of_images_that_have_a_class():
    method, batch = supervised(mixup=functools.partial(Mixup, mode="elem"), label_smoothing=0.1)
    batch["target"] = torch.tensor([0, 3, -1, -1])
    np.random.seed(3)
    image, soft = Mixup(mode="elem", num_classes=6, label_smoothing=0.0)(
        batch["image"].clone(), torch.tensor([0, 3, 5, 5])
    )
    share = 1 - soft[:, 5]
    spread = 0.9 * soft[:, :5] + 0.1 / 5 * share[:, None]
    each = -(spread * method.classify({"image": image}).log_softmax(-1)).sum(1)
    np.random.seed(3)
    assert abs(method.step(batch, 0.0).loss.item() - (each.sum() / share.sum()).item()) < 1e-6
    assert 0 < share.min() < share.max() < 1


def test_mixup_of_an_odd_batch():
    method, batch = supervised(mixup=Mixup)
    with pytest.raises(UserError, match=r"has 3: .* data\.batch_size"):
        method.step({name: each[:3] for name, each in batch.items()}, 0.0)


@pytest.mark.parametrize(
    ("name", "kwargs", "grid"),
    [
        ("resnet10t", {}, 1),
        ("convnext_atto", {}, 1),
        ("efficientvit_b0", {}, 1),
        (
            "swin_tiny_patch4_window7_224",
            {"image_size": 32, "depths": (1, 1, 1, 1), "embed_dim": 24, "window_size": 4},
            1,
        ),
        ("vit_tiny_patch16_224", {"image_size": 32, "depth": 1}, 2),
        ("vit_small_patch14_reg4_dinov2", {"image_size": 28, "depth": 1, "embed_dim": 48, "num_heads": 3}, 2),
    ],
)
def test_adapter_gives_timms_features(name, kwargs, grid):
    backbone = Timm(name, **kwargs).eval()
    x = images(28 if "14" in name else 32).float()
    encoded, reference = backbone(x, layers=[-1]), backbone.model.forward_features(x)
    assert encoded.tokens.shape == (2, grid * grid, backbone.dim)
    assert encoded.prefix.shape == (2, backbone.num_prefix, backbone.dim)
    assert encoded.hidden[-1].shape[:2] == (2, backbone.num_prefix + grid * grid)
    ours = torch.cat([encoded.prefix, encoded.tokens], 1)
    assert (
        gap(
            ours.sum(1),
            reference.reshape(reference.shape[0], -1, backbone.dim).sum(1)
            if reference.dim() == 3
            else reference.sum((1, 2))
            if reference.shape[-1] == backbone.dim
            else reference.sum((2, 3)),
        )
        < 1e-4
    )
    assert torch.equal(backbone(x).tokens, encoded.tokens)
    assert backbone(x).pooled().shape == (2, backbone.dim)


def test_adapter_flattens_row_by_row():
    backbone = Timm("resnet10t").eval()
    x = images(64, width=96).float()
    tokens, reference = backbone(x).tokens, backbone.model.forward_features(x)
    assert torch.equal(tokens[:, 1], reference[:, :, 0, 1]) and torch.equal(tokens[:, 3], reference[:, :, 1, 0])


def test_adapter_refuses_what_timm_cannot_do():
    backbone = Timm("resnet10t")
    with pytest.raises(UserError, match="keep="):
        backbone(images().float(), keep=torch.zeros(2, 1, dtype=torch.int64))
    with pytest.raises(UserError, match="layers=5: there are 5 blocks"):
        backbone(images().float(), layers=[5])
    with pytest.raises(UserError, match="resnet18"):
        Timm("resnett18")
    with pytest.raises(UserError, match="no_such_argument"):
        Timm("resnet10t", no_such_argument=1)


def test_every_vit_name_still_exists():
    assert {"vit_tiny_patch16_224", "vit_base_patch16_224"} <= set(timm.list_models("vit_*"))
