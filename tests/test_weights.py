import functools
import json
import os

import pytest
import timm
import torch
from parity import TINY, gap, images, randomise
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

from ssl_lab.backbones.timm import Timm
from ssl_lab.backbones.vit import ViT
from ssl_lab.errors import UserError
from ssl_lab.methods.mae import MAE, Decoder
from ssl_lab.nn.block import encoder_block
from ssl_lab.nn.ffn import ratio
from ssl_lab.weights import io
from ssl_lab.weights.rename import Drop, Fuse, rename
from ssl_lab.weights.tables import timm_vit


def numbers(*names: str) -> dict[str, torch.Tensor]:
    return {name: torch.full((2, 3), float(i)) for i, name in enumerate(names)}


def backbone(seed: int = 0, **changes):
    return randomise(io.vit(TINY | changes), seed).float()


def features(model) -> torch.Tensor:
    return model(images(model.grid[0] * 8).float()).tokens


# ---- the table engine


def test_marks_carry_layer_and_tail():
    table = [("blocks.#.norm.*", "layer_#.ln.*")]
    state = numbers("layer_0.ln.weight", "layer_12.ln.a.b")
    ours = rename(state, table)
    assert list(ours) == ["blocks.0.norm.weight", "blocks.12.norm.a.b"]
    assert list(rename(ours, table, back=True)) == list(state)


def test_names_are_not_patterns():
    with pytest.raises(UserError, match="axb"):
        rename(numbers("axb"), [("y", "a.b")])


def test_fused_tensors_split_again():
    table = [Fuse("qkv.*", ("q.*", "k.*", "v.*"))]
    state = numbers("k.weight", "q.weight", "v.weight", "v.bias", "q.bias", "k.bias")
    ours = rename(state, table)
    assert ours["qkv.weight"][:, 0].tolist() == [1, 1, 0, 0, 2, 2]
    back = rename(ours, table, back=True)
    assert back.keys() == state.keys() and all(torch.equal(back[k], state[k]) for k in state)


@pytest.mark.parametrize(
    ("names", "table", "message"),
    [
        (("a", "b", "c"), [("x", "a")], r"'b' \(and 1 more\) has no place"),
        (("a.b",), [("x.*", "a.*"), ("y", "a.b")], "matches 2 rows"),
        (("a", "b"), [("x", "a"), ("x", "b")], "two tensors"),
        (("q", "k"), [Fuse("qkv", ("q", "k", "v"))], "needs 3 tensors but only 2"),
    ],
)
def test_nothing_is_lost_silently(names, table, message):
    with pytest.raises(UserError, match=message):
        rename(numbers(*names), table)


def test_dropped_rows_are_gone_on_the_way_back_too():
    table = [("x", "a"), Drop("head.*")]
    assert list(rename(numbers("a", "head.weight"), table)) == ["x"]
    assert list(rename(numbers("x"), table, back=True)) == ["a"]


def test_unequal_parts_do_not_split():
    with pytest.raises(UserError, match="2 rows"):
        rename(numbers("qkv"), [Fuse("qkv", ("q", "k", "v"))], back=True)


# ---- files


@pytest.mark.parametrize(
    "changes",
    [{}, {"cls_token": False, "num_registers": 2}, {"layer_scale": 0.1, "qk_norm": True}, {"positions": "sincos"}],
)
def test_a_saved_backbone_builds_itself(tmp_path, changes):
    model = backbone(**changes).eval()
    io.save(model, tmp_path / "deep" / "a.safetensors")
    again = io.build(tmp_path / "deep" / "a.safetensors").eval()
    assert torch.equal(features(again), features(model))
    assert again.pos_embed.requires_grad == (changes.get("positions") != "sincos")
    assert io.architecture(again) == io.architecture(model)
    assert os.listdir(tmp_path / "deep") == ["a.safetensors"]


def test_another_epsilon_is_another_architecture():
    assert io.architecture(ViT(32, 2, 2, image_size=8, patch_size=4))
    block = functools.partial(encoder_block, norm=functools.partial(torch.nn.LayerNorm, eps=1e-5))
    assert not io.architecture(ViT(32, 2, 2, image_size=8, patch_size=4, block=block))


def test_any_hidden_width_survives_its_ratio():
    assert all(int(dim * ratio(hidden, dim)) == hidden for dim in range(1, 300) for hidden in range(1, 300))


def test_a_saved_timm_model_builds_itself(tmp_path):
    model = Timm("resnet10t", in_chans=1).eval()
    io.save(model, tmp_path / "a.safetensors")
    again = io.build(tmp_path / "a.safetensors").eval()
    x = images().float()[:, :1]
    assert torch.equal(again(x).tokens, model(x).tokens)
    other = Timm("resnet10t", in_chans=1).eval()
    io.load(other, str(tmp_path / "a.safetensors"))
    assert torch.equal(other(x).tokens, model(x).tokens)


def checkpoint(model, path, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {f"encoder.{k}": v for k, v in model.state_dict().items()} | {"decoder.mask_token": torch.zeros(1)}
    torch.save({"state_dict": state, "global_step": 3, **more}, path)


def test_checkpoints_and_run_folders_load(tmp_path):
    first, last = backbone(1), backbone(2)
    checkpoint(first, tmp_path / "checkpoints" / "step=9.ckpt")
    checkpoint(last, tmp_path / "checkpoints" / "step=10.ckpt")
    fresh = backbone(0)
    io.load(fresh, str(tmp_path / "checkpoints" / "step=9.ckpt"))
    assert gap(features(fresh), features(first)) == 0
    io.load(fresh, str(tmp_path))
    assert gap(features(fresh), features(last)) == 0
    io.save(first, tmp_path / "last.safetensors")
    io.load(fresh, str(tmp_path))
    assert gap(features(fresh), features(first)) == 0


def test_weights_is_an_argument_that_a_method_respects(tmp_path):
    model = backbone()
    io.save(model, tmp_path / "a.safetensors")
    block = functools.partial(encoder_block, mlp_ratio=2.0)
    path = str(tmp_path / "a.safetensors")
    encoder = ViT(32, 2, 4, image_size=32, patch_size=8, block=block, weights=path)
    method = MAE(encoder, decoder=functools.partial(Decoder, dim=16, depth=1, num_heads=2))
    assert torch.equal(features(method.encoder), features(model))


def test_a_timm_file_and_a_timm_folder_load(tmp_path):
    args = timm_vit.arguments(TINY | {"num_registers": 3}) | {"num_classes": 7}
    theirs = randomise(VisionTransformer(**args)).float()
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    described = {"architecture": "vit_base_patch16_224", "model_args": args, "pretrained_cfg": {"num_classes": 7}}
    (tmp_path / "config.json").write_text(json.dumps(described))
    for spec in (str(tmp_path / "model.safetensors"), f"timm:local-dir:{tmp_path}"):
        ours = io.vit(TINY | {"num_registers": 3}).eval()
        io.load(ours, spec)
        assert gap(ours(images().float()).tokens, theirs.forward_features(images().float())[:, 4:]) < 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 64}, "dim 32 there, 64 here"),
        ({"depth": 3}, "depth 2 there, 3 here"),
        ({"patch_size": 4, "image_size": 16}, "patch_size 8 there, 4 here"),
        ({"num_heads": 2}, "num_heads 4 there, 2 here"),
        ({"in_chans": 1}, "in_chans 3 there, 1 here"),
        ({"mlp_ratio": 4.0}, "mlp_ratio 2.0 there, 4.0 here"),
        ({"cls_token": False}, "cls_token True there, False here"),
        ({"num_registers": 2}, "num_registers 0 there, 2 here"),
        ({"layer_scale": 0.1}, "layer_scale False there, True here"),
        ({"qk_norm": True}, "qk_norm False there, True here"),
    ],
)
def test_another_architecture_is_named(tmp_path, changes, message):
    io.save(backbone(), tmp_path / "a.safetensors")
    ours = backbone(7, **changes)
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    with pytest.raises(UserError, match=message):
        io.load(ours, str(tmp_path / "a.safetensors"))
    assert all(torch.equal(before[k], v) for k, v in ours.state_dict().items())


def test_heads_come_from_the_config_beside_a_checkpoint(tmp_path):
    checkpoint(backbone(), tmp_path / "checkpoints" / "step=1.ckpt")
    (tmp_path / "config.yaml").write_text("method: {encoder: {num_heads: 4, image_size: 32, patch_size: 8}}")
    io.load(backbone(), str(tmp_path))
    with pytest.raises(UserError, match="num_heads 4 there, 2 here"):
        io.load(backbone(num_heads=2), str(tmp_path))


def test_a_rectangular_table_needs_its_grid(tmp_path):
    state = backbone().state_dict()
    state["pos_embed"] = state["pos_embed"][:, :9]  # 8 patches
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="8 positions"):
        io.load(backbone(), str(tmp_path / "a.safetensors"))


class Evil:
    def __reduce__(self):
        return os.mkdir, ("was-here",)


def test_code_in_a_checkpoint_never_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint(backbone(), tmp_path / "a.ckpt", hyper_parameters=Evil())
    with pytest.raises(UserError, match="cannot be read as weights"):
        io.load(backbone(), "a.ckpt")
    assert not (tmp_path / "was-here").exists()


def test_broken_and_missing_files(tmp_path):
    ours = backbone()
    io.save(ours, tmp_path / "a.safetensors")
    whole = (tmp_path / "a.safetensors").read_bytes()
    checkpoint(ours, tmp_path / "a.ckpt")
    zipped = (tmp_path / "a.ckpt").read_bytes()
    (tmp_path / "empty").mkdir()
    for size in (0, 3, 100, len(whole) - 1):
        (tmp_path / "b.safetensors").write_bytes(whole[:size])
        with pytest.raises(UserError, match="no complete safetensors"):
            io.load(ours, str(tmp_path / "b.safetensors"))
        (tmp_path / "b.ckpt").write_bytes(zipped[: size or 0])
        with pytest.raises(UserError, match="cannot be read as weights"):
            io.load(ours, str(tmp_path / "b.ckpt"))
    for spec, message in [
        ("nowhere.safetensors", "no weights at nowhere.safetensors"),
        (str(tmp_path / "empty"), "neither last.safetensors nor"),
    ]:
        with pytest.raises(UserError, match=message):
            io.load(ours, spec)
    torch.save({"state_dict": {"a": 1}}, tmp_path / "c.ckpt")
    with pytest.raises(UserError, match="no state dict of tensors"):
        io.load(ours, str(tmp_path / "c.ckpt"))
    save_file({"lstm.weight": torch.zeros(1)}, tmp_path / "d.safetensors")
    with pytest.raises(UserError, match=r"first key 'lstm\.weight'"):
        io.load(ours, str(tmp_path / "d.safetensors"))
    with pytest.raises(UserError, match="no architecture in its header"):
        io.build(tmp_path / "d.safetensors")


def test_a_header_builds_nothing_but_backbones(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors", {"ssl_lab": '{"class": "os.system", "arguments": {}}'})
    with pytest.raises(UserError, match="does not say what it is"):
        io.build(tmp_path / "a.safetensors")


# ---- timm and the hub without a network


def test_unknown_timm_names_get_the_nearest():
    with pytest.raises(UserError, match="vit_tiny_patch16_224"):
        io.load(backbone(), "timm:vit_tny_patch16_224")


def test_timm_without_a_network(monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("no route\nmore")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(UserError, match=r"no weights \(no route\); without a network, fetch") as caught:
        io.load(backbone(), "timm:vit_tiny_patch16_224")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("resnet10t", {}, "is a ResNet, not a ViT"),
        ("vit_base_patch32_clip_quickgelu_224", {"depth": 1}, "QuickGELU"),
        ("vit_base_patch16_clip_224", {"depth": 1, "img_size": 32}, "norm_pre"),
        ("vit_tiny_patch16_224", {"depth": 1, "global_pool": "avg"}, "fc_norm"),
        ("vit_tiny_patch16_224", {"depth": 1, "pos_embed": "none"}, "no position table"),
    ],
)
def test_timm_models_that_our_vit_cannot_be(monkeypatch, name, kwargs, message):
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: create(name, **kwargs))
    with pytest.raises(UserError, match=message):
        io.load(backbone(), f"timm:{name}")


def test_hub_without_a_network(monkeypatch):
    transformers = pytest.importorskip("transformers")

    def offline(name):
        raise OSError("cannot connect\nmore")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", offline)
    with pytest.raises(UserError, match=r"no config\.json found \(cannot connect\); give a folder"):
        io.load(backbone(), "hf:nobody/nothing-of-the-kind")
