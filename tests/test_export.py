import functools
import json
import os

import pytest
import timm
import torch
from omegaconf import OmegaConf
from parity import TINY, gap, images, randomise

from ssl_lab.backbones.conformer import Conformer
from ssl_lab.backbones.text import TextEncoder
from ssl_lab.backbones.timm import Timm
from ssl_lab.backbones.tower import Tower
from ssl_lab.backbones.vit import ViT
from ssl_lab.cli.export import run
from ssl_lab.data.views import STATS, Resize
from ssl_lab.errors import UserError
from ssl_lab.methods.clip import CLIP
from ssl_lab.methods.mae import MAE, Decoder
from ssl_lab.methods.supervised import Supervised
from ssl_lab.nn.block import encoder_block
from ssl_lab.train import checkpoint
from ssl_lab.weights import export, io
from ssl_lab.weights.look import Look

VIT = {
    "_target_": "ssl_lab.backbones.vit.ViT",
    **{k: TINY[k] for k in ("dim", "depth", "num_heads", "image_size", "patch_size")},
}
BLOCK = {"_target_": "ssl_lab.nn.block.encoder_block", "_partial_": True, "mlp_ratio": 2.0}
DECODER = {
    "_target_": "ssl_lab.methods.mae.Decoder",
    "_partial_": True,
    "dim": 16,
    "depth": 1,
    "num_heads": 2,
    "block": BLOCK,
}


def export_to(ckpt, to, out=None, trust=()):
    given = {"ckpt": str(ckpt), "to": to, "out": None if out is None else str(out), "trust": list(trust), "average": 1}
    run(OmegaConf.create(given))


def finished(folder, method, config):
    """A run folder as training leaves it."""
    folder.mkdir(parents=True)
    data = {"eval_views": {"_target_": "ssl_lab.data.views.Resize", "size": 32, "stats": "clip"}}
    (folder / "config.yaml").write_text(json.dumps({"method": config, "data": data, "seed": 0}))
    checkpoint.write({"state_dict": method.state_dict(), "global_step": 7}, folder / "checkpoints" / "step=7.ckpt")
    return folder


@pytest.fixture
def mae_run(tmp_path):
    decoder = functools.partial(
        Decoder, dim=16, depth=1, num_heads=2, block=functools.partial(encoder_block, mlp_ratio=2.0)
    )
    method = randomise(MAE(io.vit(TINY | {"positions": "sincos"}), decoder=decoder)).float()
    encoder = VIT | {"positions": "sincos", "block": BLOCK, "weights": "timm:never_asked_for"}
    config = {"_target_": "ssl_lab.methods.mae.MAE", "encoder": encoder, "decoder": DECODER}
    return finished(tmp_path / "run", method, config), method


def tokens(backbone, x):
    encoded = backbone.eval()(x)
    return torch.cat([encoded.prefix, encoded.tokens], 1)


def test_a_run_goes_to_timm(mae_run, capsys):
    folder, method = mae_run
    export_to(folder, "timm")
    out = folder / "export" / "timm"
    assert sorted(os.listdir(out)) == ["config.json", "model.safetensors"]
    assert sorted(os.listdir(folder / "export")) == ["timm"]
    theirs = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    x = images().float()
    assert gap(theirs.forward_features(x), tokens(method.encoder, x)) < 1e-5
    shown = capsys.readouterr().out
    assert f"timm {timm.__version__}" in shown and f'timm.create_model("local-dir:{out}", pretrained=True)' in shown
    described = json.loads((out / "config.json").read_text())
    assert timm.models.VisionTransformer(**described["model_args"]).embed_dim == 32
    assert timm.data.resolve_model_data_config(theirs)["mean"] == pytest.approx((0.481, 0.458, 0.408), abs=1e-3)
    again = io.vit(TINY | {"positions": "sincos"})
    io.load(again, f"timm:local-dir:{out}")
    assert gap(tokens(again, x), tokens(method.encoder, x)) < 1e-5


def test_a_run_goes_to_transformers_with_its_decoder(mae_run, capsys):
    transformers = pytest.importorskip("transformers")
    folder, method = mae_run
    export_to(folder / "checkpoints" / "step=7.ckpt", "hf", folder / "mine")
    theirs = transformers.ViTMAEForPreTraining.from_pretrained(folder / "mine").eval()
    x, noise = images().float(), torch.rand(2, 16)
    with torch.no_grad():
        assert gap(theirs(x, noise=noise).loss, method.eval().reconstruct(x, noise)[0]) < 1e-5
    assert "ViTMAEForPreTraining.from_pretrained" in capsys.readouterr().out
    processor = transformers.AutoImageProcessor.from_pretrained(folder / "mine")
    assert processor.image_mean == pytest.approx([0.481, 0.458, 0.408], abs=1e-3)
    assert processor.size["shortest_edge"] == 32


@pytest.mark.parametrize("crop_pct", [1.0, 0.875, 0.8])
def test_an_export_sees_pictures_as_the_run_does(tmp_path, crop_pct):
    transformers = pytest.importorskip("transformers")
    from PIL import Image

    small = torch.randint(256, (1, 3, 9, 14), generator=torch.Generator().manual_seed(0)).float()
    picture = torch.nn.functional.interpolate(small, (90, 140), mode="bilinear").to(torch.uint8)[0]
    view = Resize(32, crop_pct=crop_pct, stats="clip")
    ours = view([picture], torch.zeros(1), 0)["image"][0]
    look, image = Look(32, view.resize, "bicubic", STATS["clip"]), Image.fromarray(picture.permute(1, 2, 0).numpy())
    for name, write in (("timm", export.to_timm), ("hf", export.to_hf)):
        (tmp_path / name).mkdir()
        write(randomise(io.vit(TINY)).float(), tmp_path / name, look=look)
    model = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True)
    seen = [timm.data.create_transform(**timm.data.resolve_model_data_config(model))(image)]
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
    seen.append(processor(image, return_tensors="pt")["pixel_values"][0])
    for theirs in seen:
        assert theirs.shape == ours.shape and gap(theirs, ours) < 2.5 / 255 / 0.26  # uint8 is rounded up to twice


def test_a_run_goes_to_safetensors(mae_run, capsys):
    folder, method = mae_run
    export_to(folder, "safetensors")
    file = folder / "export" / "safetensors" / "model.safetensors"
    again = io.build(file)
    assert torch.equal(tokens(again, images().float()), tokens(method.encoder, images().float()))
    export_to(file, "timm", folder / "second")
    assert (folder / "second" / "config.json").is_file()
    assert f'ssl_lab.weights.io.build("{file}")' in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cls_token": False},
        {"num_registers": 3},
        {"num_registers": 3, "cls_token": False},
        {"layer_scale": 0.1, "qk_norm": True, "num_registers": 1},
    ],
)
def test_every_vit_goes_to_timm(tmp_path, changes):
    backbone = randomise(io.vit(TINY | changes)).float()
    assert export.to_timm(backbone, tmp_path).difference < 1e-5


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({}, "ViTModel"),
        ({"cls_token": False}, "IJepaModel"),
        ({"layer_scale": 0.1}, "Dinov2Model"),
        ({"layer_scale": 0.1, "num_registers": 2}, "Dinov2WithRegistersModel"),
    ],
)
def test_vits_go_to_transformers(tmp_path, changes, kind):
    pytest.importorskip("transformers")
    done = export.to_hf(randomise(io.vit(TINY | changes)).float(), tmp_path)
    assert done.difference < 1e-5 and f"transformers.{kind}." in done.opened_by
    again = io.vit(TINY | changes)
    io.load(again, f"hf:{tmp_path}")


@pytest.mark.parametrize("changes", [{"num_registers": 2}, {"qk_norm": True}, {"layer_scale": 0.1, "cls_token": False}])
def test_what_transformers_lacks_is_said(tmp_path, changes):
    pytest.importorskip("transformers")
    with pytest.raises(UserError, match=r"transformers has no ViT with .*; use to=timm"):
        export.to_hf(io.vit(TINY | changes), tmp_path)


@pytest.mark.parametrize("changes", [{}, {"pooling": "mean"}, {"pooling": "cls"}])
def test_a_classifier_keeps_its_head(tmp_path, changes):
    method = randomise(Supervised(io.vit(TINY), 5, **changes)).float()
    config = {"_target_": "ssl_lab.methods.supervised.Supervised", "encoder": VIT | {"block": BLOCK}, "num_classes": 5}
    folder = finished(tmp_path / "run", method, config | changes)
    export_to(folder, "timm")
    theirs = timm.create_model(f"local-dir:{folder / 'export' / 'timm'}", pretrained=True).eval()
    x = images().float()
    assert gap(theirs(x), method.classify({"image": x})) < 1e-5
    again = io.vit(TINY)
    io.load(again, f"timm:local-dir:{folder / 'export' / 'timm'}")
    assert gap(tokens(again, x), tokens(method.encoder, x)) < 1e-5


def test_a_timm_encoder(tmp_path):
    method = Supervised(Timm("resnet10t"), 5)
    encoder = {"_target_": "ssl_lab.backbones.timm.Timm", "name": "resnet10t", "pretrained": True}
    config = {"_target_": "ssl_lab.methods.supervised.Supervised", "encoder": encoder, "num_classes": 5}
    folder = finished(tmp_path / "run", method, config)
    export_to(folder, "timm")
    theirs = timm.create_model(f"local-dir:{folder / 'export' / 'timm'}", pretrained=True).eval()
    x = images(64).float()
    assert gap(theirs.forward_features(x).flatten(2).transpose(1, 2), method.encoder.eval()(x).tokens) < 1e-5
    with pytest.raises(UserError, match="to=safetensors"):
        export_to(folder, "hf")


def test_what_no_other_library_reads_is_said_with_what_to_do(tmp_path):
    sizes = {"dim": 16, "depth": 1, "num_heads": 2}
    encoder = {"_target_": "ssl_lab.backbones.conformer.Conformer", **sizes}
    config = {"_target_": "ssl_lab.methods.supervised.Supervised", "encoder": encoder, "num_classes": 5}
    folder = finished(tmp_path / "run", Supervised(Conformer(**sizes), 5), config)
    for to in ("timm", "hf", "safetensors"):
        with pytest.raises(UserError, match=r"Conformer of these parts.*; .* weights=<run folder>"):
            export_to(folder, to)


def test_both_towers_are_more_than_one_network(tmp_path):
    vit = {"dim": 16, "depth": 1, "num_heads": 2, "image_size": 32, "patch_size": 16}
    text = {"vocab_size": 31, "dim": 16, "depth": 1, "num_heads": 2, "max_length": 8}
    parts = {"image": (ViT, vit), "text": (TextEncoder, text)}
    config = {"_target_": "ssl_lab.methods.clip.CLIP"}
    for name, (made, sizes) in parts.items():
        backbone = {"_target_": f"{made.__module__}.{made.__name__}", **sizes}
        config[name] = {"_target_": "ssl_lab.backbones.tower.Tower", "backbone": backbone, "embed_dim": 12}
    towers = [Tower(made(**sizes), 12) for made, sizes in parts.values()]
    folder = finished(tmp_path / "run", CLIP(*towers), config)
    with pytest.raises(UserError, match=r"writes one network: .* take to=hf"):
        export_to(folder, "safetensors")


def test_a_wrong_export_is_never_claimed(mae_run, monkeypatch):
    folder, _ = mae_run
    from ssl_lab.weights.tables import timm_vit

    swapped = [row for row in timm_vit.TABLE if not (isinstance(row, tuple) and row[0].endswith(".norm.*"))]
    swapped += [("blocks.#.attn.norm.*", "blocks.#.norm2.*"), ("blocks.#.mlp.norm.*", "blocks.#.norm1.*")]
    monkeypatch.setattr(timm_vit, "TABLE", swapped + [("norm.*", "norm.*")] * (("norm.*", "norm.*") not in swapped))
    with pytest.raises(UserError, match="other features than ours"):
        export_to(folder, "timm")
    assert os.listdir(folder / "export") == []


def test_mistakes_are_one_line(mae_run, tmp_path):
    folder, _ = mae_run
    lone = tmp_path / "elsewhere" / "deep" / "a.ckpt"
    lone.parent.mkdir(parents=True)
    lone.write_bytes((folder / "checkpoints" / "step=7.ckpt").read_bytes())
    for ckpt, to, message in [
        (folder, "onnx", "to=onnx: choose one of timm, hf, safetensors"),
        (tmp_path / "nothing", "timm", "no such file or folder"),
        (tmp_path / "nothing.safetensors", "timm", "no weights at"),
        (lone, "timm", r"no config\.yaml beside it"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            export_to(ckpt, to)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="must be a folder"):
        export_to(folder, "safetensors", tmp_path / "a.safetensors")


def test_a_checkpoint_of_another_method_is_refused(mae_run):
    folder, _ = mae_run
    config = json.loads((folder / "config.yaml").read_text())
    config["method"]["encoder"]["depth"] = 1
    (folder / "config.yaml").write_text(json.dumps(config))
    with pytest.raises(UserError, match="does not fit the method"):
        export_to(folder, "timm")


def test_a_saved_configuration_runs_no_foreign_code(mae_run):
    folder, _ = mae_run
    (folder / "config.yaml").write_text("method: {_target_: os.system, command: 'true'}")
    with pytest.raises(UserError, match=r"os\.system"):
        export_to(folder, "timm")
