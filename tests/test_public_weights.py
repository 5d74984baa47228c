"""Public weights enter every method: what it gives before its first step is what the imported model gives."""

import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from parity import TINY, gap, images, randomise
from test_methods import METHODS, shrink
from timm.models.vision_transformer import VisionTransformer

from ssl_lab.cli.catalog import conf_folder
from ssl_lab.cli.compose import build, compose
from ssl_lab.cli.main import main
from ssl_lab.cli.starting import beginning, build_method
from ssl_lab.errors import UserError
from ssl_lab.train import checkpoint
from ssl_lab.weights import io
from ssl_lab.weights.tables import hf_dinov2, hf_vit, timm_vit

transformers = pytest.importorskip("transformers")

SCALED = TINY | {"layer_scale": 0.1}
VISION = [m for m in METHODS if "backbone@encoder: vit" in (conf_folder() / f"method/{m}.yaml").read_text()]
TAUGHT = ("dino", "dinov2", "moco", "moco_v3", "ijepa")


def hf(model, folder):
    randomise(model).float().save_pretrained(folder)
    return model.double().eval(), f"hf:{folder}"


def vit(folder):
    return hf(transformers.ViTModel(transformers.ViTConfig(**hf_vit.arguments(TINY)), add_pooling_layer=False), folder)


def vit_mae(folder):
    """As MAE is published: with its decoder, and fixed sin-cos positions."""
    model = transformers.ViTMAEForPreTraining(
        transformers.ViTMAEConfig(
            **hf_vit.arguments(TINY), decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2
        )
    )
    fixed = model.vit.embeddings.position_embeddings.detach().clone()
    randomise(model)
    model.vit.embeddings.position_embeddings.data.copy_(fixed)
    model.float().save_pretrained(folder)
    return model.vit.double().eval(), f"hf:{folder}"


def ijepa(folder):
    return hf(
        transformers.IJepaModel(transformers.IJepaConfig(**hf_vit.arguments(TINY)), add_pooling_layer=False), folder
    )


def dinov2(folder):
    return hf(transformers.Dinov2Model(transformers.Dinov2Config(**hf_dinov2.arguments(SCALED))), folder)


def dinov2_registers(folder):
    arguments = hf_dinov2.arguments(SCALED | {"num_registers": 3})
    return hf(transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**arguments)), folder)


def timm_model(folder):
    arguments = timm_vit.arguments(TINY)
    model = randomise(VisionTransformer(**arguments, dynamic_img_size=True)).float()
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    described = {"architecture": "vit_base_patch16_224", "model_args": arguments, "pretrained_cfg": {"num_classes": 0}}
    (folder / "config.json").write_text(json.dumps(described))
    return model.double().eval(), f"timm:local-dir:{folder}"


SOURCES = {f.__name__: f for f in (vit, vit_mae, ijepa, dinov2, dinov2_registers, timm_model)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Name -> reference in float64 and the words that name its files, made once."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = SOURCES[name](tmp_path_factory.mktemp(name))
        return made[name]

    return get


def features(model, x, how):
    """The reference's own: its class token, or the mean over its patches. MAE's model would hide some: it may not."""
    if isinstance(model, VisionTransformer):
        tokens, prefix = model.forward_features(x), 1
    else:
        more = (
            {"interpolate_pos_encoding": True} if x.shape[-1] != 32 and "dinov2" not in model.config.model_type else {}
        )
        if model.config.model_type == "vit_mae":
            model.config.mask_ratio, N = 0.0, (x.shape[-1] // 8) ** 2
            more["noise"] = torch.arange(N, dtype=x.dtype).expand(len(x), -1)
        tokens = model(x, **more).last_hidden_state
        prefix = int(model.config.model_type != "ijepa") + getattr(model.config, "num_register_tokens", 0)
    return tokens[:, 0] if how == "cls" else tokens[:, prefix:].mean(1)


def config(name, spec, size=32):
    """The method as it is chosen on the command line, its encoder of some other architecture than the weights."""
    cfg = compose("train", [f"method={name}", "data=shapes", f"data.image_size={size}"], [conf_folder()])
    small = shrink(OmegaConf.to_container(cfg.method, resolve=True))
    small["encoder"] |= {"image_size": size, "depth": 1, "dim": 48, "num_heads": 2, "weights": spec}
    if name == "ijepa":
        small["masks"]["min_keep"] = 1
    return OmegaConf.create(small | ({"num_classes": 4} if "num_classes" in small else {}))


def imported(name, spec, size=32):
    lines = []
    return build_method(config(name, spec, size), 0, lines.append), lines


def refuses(method, source):
    """MAE's decoder knows a class token and no registers; DINOv2 compares class tokens."""
    return (method, source) in [("mae", "dinov2_registers"), ("mae", "ijepa"), ("dinov2", "ijepa")]


@pytest.mark.parametrize("size", [32, 48, 24])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", VISION)
def test_first_features_are_those_of_the_imported_model(name, source, size, saved):
    reference, spec = saved(source)
    if refuses(name, source):
        with pytest.raises(Exception, match="class token"):
            imported(name, spec, size)
        return
    method, _ = imported(name, spec, size)
    method.double().eval()
    how = "mean" if source == "ijepa" or name in ("mae", "ijepa") else "cls"
    x = images(size)
    with torch.no_grad():
        found, wanted = method.embed({"image": x}), features(reference, x, how)
    assert wanted.std() > 1e-3
    # A resampled table is float32 in every library.
    assert gap(found, wanted) <= (1e-10 if size == 32 else 2e-6)


@pytest.mark.parametrize("name", TAUGHT)
def test_the_teacher_is_a_copy_and_heads_are_new(name, saved):
    _, spec = saved("vit")
    method, _ = imported(name, spec)
    state = method.state_dict()
    student, teacher = ("encoder.", "key_encoder.") if name.startswith("moco") else ("student.", "encoder.")
    pairs = [(key, teacher + key.removeprefix(student)) for key in state if key.startswith(student)]
    assert len(pairs) > 20 and all(torch.equal(state[a], state[b]) for a, b in pairs)
    fresh = {k: v for k, v in imported(name, spec)[0].state_dict().items() if not k.startswith((student, teacher))}
    assert fresh.keys() and all(torch.equal(v, state[k]) for k, v in fresh.items())  # as the seed says


@pytest.mark.parametrize(("name", "learned"), [("mae", False), ("moco_v3", False), ("ijepa", False), ("dino", True)])
def test_positions_keep_the_values_of_the_weights_and_the_habit_of_the_method(name, learned, saved):
    for source in ("vit", "vit_mae"):
        reference, spec = saved(source)
        encoder = imported(name, spec)[0].encoder
        table = reference.embeddings.position_embeddings.float()
        assert torch.equal(encoder.pos_embed, table)
        trained = {"dino": "student"}.get(name, "encoder")
        assert getattr(imported(name, spec)[0], trained).pos_embed.requires_grad == learned


def test_moco_v3_freezes_the_projection_that_came_along(saved):
    reference, spec = saved("vit")
    method, _ = imported("moco_v3", spec)
    projection = method.encoder.patch_embed.proj
    assert torch.equal(projection.weight, reference.embeddings.patch_embeddings.projection.weight.float())
    assert not projection.weight.requires_grad and not projection.bias.requires_grad


def test_ijepa_takes_a_class_token_along(saved):
    _, spec = saved("vit")
    method, lines = imported("ijepa", spec)
    assert method.encoder.cls_token is not None and "cls_token yes" in lines[0]
    step = method.step({"image": images().float()}, 0.5)
    step.loss.backward()
    assert method.student.cls_token.grad.abs().sum() > 0


def test_what_the_weights_decide_is_said_and_entered(saved):
    _, spec = saved("dinov2_registers")
    cfg, lines = config("dino", spec), []
    build_method(cfg, 0, lines.append)
    assert lines == [f"encoder: dim 32, depth 2, num_registers 3, num_heads 4, mlp_ratio 2, layer_scale, as in {spec}"]
    assert (cfg.encoder.dim, cfg.encoder.num_registers, cfg.encoder.block.mlp_ratio) == (32, 3, 2.0)
    again = []
    assert build_method(cfg, 0, again.append) and not again  # it fits now


def test_the_words_of_the_error_make_it_fit(saved):
    _, spec = saved("dinov2_registers")
    words = ["method=dino", "data=shapes", f"method.encoder.weights={spec}", "method.head.prototypes=16"]
    with pytest.raises(Exception) as caught:
        build(compose("train", words, [conf_folder()]).method)
    message = str(caught.value.__cause__)
    assert "dim 32 there, 384 here" in message
    told = message.partition("to match it: ")[2].split()
    assert {"method.encoder.patch_size=8", "method.encoder.block.mlp_ratio=2.0"} <= set(told)
    assert build(compose("train", [*words, *told], [conf_folder()]).method).encoder.dim == 32


def test_norms_of_queries_and_keys_are_words_too(tmp_path):
    io.save(randomise(io.vit(TINY | {"qk_norm": True})).float(), tmp_path / "a.safetensors")
    words = ["method=supervised", "data=shapes", f"method.encoder.weights={tmp_path}/a.safetensors"]
    words += ["method.num_classes=2"]
    with pytest.raises(Exception) as caught:
        build(compose("train", words, [conf_folder()]).method)
    told = str(caught.value.__cause__).partition("to match it: ")[2].split()
    method = build(compose("train", [*words, *told], [conf_folder()]).method)
    assert io.architecture(method.encoder)["arguments"]["qk_norm"] is True


def test_weights_of_another_kind_stay_a_mistake(tmp_path):
    torch.save({"blocks.0.attn.fn.qkv.weight": torch.zeros(3)}, tmp_path / "a.pt")
    with pytest.raises(Exception) as caught:
        imported("dino", str(tmp_path / "a.pt"))
    assert isinstance(caught.value.__cause__, UserError) and not isinstance(
        caught.value.__cause__, io.OtherArchitecture
    )


def test_channels_are_the_datas(tmp_path):
    io.save(randomise(io.vit(TINY | {"in_chans": 1})).float(), tmp_path / "a.safetensors")
    with pytest.raises(Exception) as caught:
        imported("dino", str(tmp_path / "a.safetensors"))
    assert "in_chans 1 there, 3 here" in str(caught.value.__cause__)


def test_a_beginning_has_a_name():
    node = OmegaConf.create
    assert beginning(node({"encoder": {"weights": "hf:x"}})) == "hf:x"
    assert beginning(node({"encoder": {"name": "resnet18.a1_in1k", "pretrained": True}})) == "timm:resnet18.a1_in1k"
    for place in ("weights", "image.backbone.weights", "decoder.weights", "model.weights"):
        there = node({})
        OmegaConf.update(there, place, "hf:x")
        assert beginning(there) == "hf:x"
    assert beginning(node({"image": {"weights": "hf:x"}, "text": {"weights": "hf:y"}})) == "hf:x, hf:y"
    for nothing in ({}, {"encoder": {"weights": None}}, {"encoder": {"name": "resnet18", "pretrained": False}}):
        assert beginning(node(nothing)) == "random encoder"


def test_a_user_who_knows_nothing_of_the_weights_trains_from_them(tmp_path, saved, capsys, monkeypatch):
    """One command: it fits the encoder, judges the imported features first, trains, goes on, and evaluates itself."""
    monkeypatch.chdir(tmp_path)
    _, spec = saved("dinov2")
    words = ["method=dino", "data=shapes", "data.train.length=40", "data.test.length=16", "data.batch_size=8"]
    words += [f"method.encoder.weights={spec}", "method.head={prototypes: 16, hidden: 16, bottleneck: 8}"]
    words += ["data.views.local.count=2", "data.views.multiple_of=8", "duration=2steps", "eval=[collapse]"]
    words += ["baselines=true", "trainer.enable_progress_bar=false", "trainer.accelerator=cpu", "out=run"]
    assert main(words) == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    assert f"dim 32, depth 2, patch_size 8, num_heads 4, mlp_ratio 2, layer_scale, as in {spec}" in shown
    rows = json.loads(Path("run/metrics.json").read_text())
    subjects = {(row["subject"], row["step"]) for row in rows}
    assert subjects == {("raw pixels", 0), (spec, 0), ("trained", 2)}
    assert main(words) == 0, capsys.readouterr().err  # the finished run is recognised
    assert "done: 2 steps" in capsys.readouterr().out
    assert main(["evaluate", "ckpt=run", "eval=[collapse]", "pictures=false"]) == 0, capsys.readouterr().err
    state = checkpoint.read(checkpoint.find("run"))["state_dict"]
    assert state["encoder.blocks.1.mlp.fn.fc1.weight"].shape == (64, 32)
