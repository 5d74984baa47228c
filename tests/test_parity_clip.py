"""CLIP and SigLIP against open_clip and transformers: embeddings, losses, every gradient, weights there and back."""

import json

import pytest
import torch
from parity import gap, gradients, images, randomise

from ssl_lab.backbones.vit import ViT
from ssl_lab.cli.catalog import conf_folder
from ssl_lab.cli.compose import compose
from ssl_lab.cli.starting import build_method
from ssl_lab.errors import UserError
from ssl_lab.methods.clip import CLIP
from ssl_lab.methods.siglip import SigLIP
from ssl_lab.types import Batch
from ssl_lab.weights import io, pairs, pairs_export, sources
from ssl_lab.weights.look import Look
from ssl_lab.weights.pair_facts import facts_of, settings, towers
from ssl_lab.weights.rename import rename
from ssl_lab.weights.tables import hf_clip, hf_siglip, open_clip

LOOK = Look(32, 36, "bicubic", ((0.5,) * 3, (0.25,) * 3))
VOCAB, LENGTH, EOS = 99, 16, 98
IMAGE = {"dim": 32, "depth": 2, "num_heads": 4, "hidden": 64, "act": "quick_gelu", "eps": 1e-5}
FACTS = {
    "family": "clip",
    "embed_dim": 24,
    "image": {**IMAGE, "image_size": 32, "patch_size": 8},
    "text": {**IMAGE, "dim": 40, "hidden": 100, "num_heads": 5, "vocab_size": VOCAB, "max_length": LENGTH},
}
OTHER = {
    "family": "siglip",
    "embed_dim": 32,
    "image": {**FACTS["image"], "act": "gelu_tanh", "eps": 1e-6},
    "text": {**FACTS["text"], "act": "gelu_tanh", "eps": 1e-6},
}


def texts(batch=3):
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(3, EOS, (batch, LENGTH), generator=generator)
    ends = torch.tensor([15, 6, 10])[:batch, None]
    at = torch.arange(LENGTH)
    return tokens.where(at < ends, 0).masked_fill(at == ends, EOS), at <= ends


def given():
    tokens, valid = texts()
    return Batch(image=images(batch=3), tokens=tokens, valid=valid)


def theirs_hf(facts):
    transformers = pytest.importorskip("transformers")
    if facts["family"] == "clip":
        model = transformers.CLIPModel(transformers.CLIPConfig(**hf_clip.arguments(facts, EOS)))
    else:
        model = transformers.SiglipModel(transformers.SiglipConfig(**hf_siglip.arguments(facts)))
    model = randomise(model)
    with torch.no_grad():
        model.logit_scale.fill_(2.0)
    return model


def theirs_open_clip(facts, **more):
    library = pytest.importorskip("open_clip", reason="open_clip is not installed")
    config = open_clip.arguments(facts)
    config["vision_cfg"] |= more
    model = randomise(library.CLIP(**config))
    with torch.no_grad():
        model.logit_scale.fill_(2.0)
    return model


def method(facts, state):
    ours = (CLIP if facts["family"] == "clip" else SigLIP)(**towers(facts)).double()
    ours.load_state_dict(state)
    return ours.eval()


def same_slopes(ours, theirs, table):
    """Every gradient, each under its own name."""
    found = {name: g.double() for name, g in gradients(ours).items()}
    wanted = rename(table.fold(gradients(theirs)), table.TABLE)
    assert found.keys() == wanted.keys()
    assert {name: gap(found[name], g) for name, g in wanted.items() if gap(found[name], g) > 1e-10} == {}
    assert sum(bool(g.abs().sum()) for g in found.values()) == len(found)


@pytest.mark.parametrize("facts", [FACTS, OTHER], ids=["clip", "siglip"])
def test_transformers(facts):
    theirs, table = theirs_hf(facts), pairs.HF[facts["family"]]
    ours = method(facts, rename(table.fold(theirs.state_dict()), table.TABLE))
    batch = given()
    out = theirs(input_ids=batch["tokens"], pixel_values=batch["image"], return_loss=True)
    assert gap(ours.embed_image(batch), out.image_embeds) < 1e-12
    assert gap(ours.embed_text(batch), out.text_embeds) < 1e-12
    loss = ours.step(batch, 0.5).loss
    assert gap(loss, out.loss) < 1e-11
    loss.backward()
    out.loss.backward()
    same_slopes(ours, theirs, table)
    assert table.facts(theirs.config) == facts == facts_of(ours)
    back = table.unfold(rename(ours.state_dict(), table.TABLE, back=True))
    wanted = theirs.state_dict()
    assert back.keys() == wanted.keys() and all(torch.equal(back[key], value) for key, value in wanted.items())


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_open_clip(act):
    losses = pytest.importorskip("open_clip.loss", reason="open_clip is not installed")
    facts = FACTS | {part: FACTS[part] | {"act": act} for part in ("image", "text")}
    theirs, batch = theirs_open_clip(facts), given()
    ours = method(facts, rename(open_clip.fold(theirs.state_dict()), open_clip.TABLE))
    image, text, scale = theirs(batch["image"], batch["tokens"])
    assert gap(ours.embed_image(batch), image) < 1e-12 and gap(ours.embed_text(batch), text) < 1e-12
    loss, wanted = ours.step(batch, 0.5).loss, losses.ClipLoss()(image, text, scale)
    assert gap(loss, wanted) < 1e-11
    loss.backward()
    wanted.backward()
    same_slopes(ours, theirs, open_clip)
    assert open_clip.facts(open_clip.fold(theirs.state_dict()), open_clip.arguments(facts)) == facts == facts_of(ours)
    back = open_clip.unfold(rename(ours.state_dict(), open_clip.TABLE, back=True))
    wanted = theirs.state_dict()
    assert back.keys() == wanted.keys() and all(torch.equal(back[key], value) for key, value in wanted.items())


def test_without_a_configuration_heads_are_64_wide_and_the_activation_is_not_known():
    facts = FACTS | {part: FACTS[part] | {"dim": 64, "num_heads": 1} for part in ("image", "text")}
    found = open_clip.facts(open_clip.fold(theirs_open_clip(facts).state_dict()))
    unknown = facts | {part: facts[part] | {"act": None} for part in ("image", "text")}
    assert found == unknown


def fresh(facts, **more):
    """A method with other weights and `facts`."""
    torch.manual_seed(9)
    return (CLIP if facts["family"] == "clip" else SigLIP)(**towers(facts), **more)


@pytest.mark.parametrize("facts", [FACTS, OTHER], ids=["clip", "siglip"])
def test_a_folder_of_transformers_fills_a_method(facts, tmp_path):
    theirs = theirs_hf(facts).float()
    theirs.save_pretrained(tmp_path)
    ours, batch = fresh(facts, weights=f"hf:{tmp_path}").double().eval(), given()
    out = theirs.double()(input_ids=batch["tokens"], pixel_values=batch["image"])
    assert gap(ours.embed_image(batch), out.image_embeds) < 1e-12
    assert gap(ours.embed_text(batch), out.text_embeds) < 1e-12
    assert ours.logit_scale.item() == 2.0


@pytest.mark.parametrize("suffix", ["pt", "folder"])
def test_a_file_of_open_clip_fills_a_method(suffix, tmp_path):
    from safetensors.torch import save_file

    facts = FACTS | {part: FACTS[part] | {"dim": 64, "num_heads": 1} for part in ("image", "text")}
    theirs = theirs_open_clip(facts).float()
    if suffix == "folder":
        save_file(theirs.state_dict(), tmp_path / "open_clip_model.safetensors")
        config = {"model_cfg": open_clip.arguments(facts), "preprocess_cfg": {}}
        (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
        spec = f"open_clip:{tmp_path}"
    else:
        state = {f"module.{key}": value for key, value in theirs.state_dict().items()}
        torch.save({"epoch": 3, "state_dict": state}, tmp_path / "epoch_3.pt")
        spec = f"open_clip:{tmp_path}/epoch_3.pt"
    ours, batch = fresh(facts, weights=spec).double().eval(), given()
    image, text, _ = theirs.double()(batch["image"], batch["tokens"])
    assert gap(ours.embed_image(batch), image) < 1e-12 and gap(ours.embed_text(batch), text) < 1e-12


def test_a_file_without_a_configuration_leaves_the_activation_to_the_towers(tmp_path, caplog):
    facts = FACTS | {part: FACTS[part] | {"dim": 64, "num_heads": 1} for part in ("image", "text")}
    state = open_clip.unfold(rename(fresh(facts).state_dict(), open_clip.TABLE, back=True))
    torch.save(state, tmp_path / "a.pt")
    fresh(facts, weights=f"open_clip:{tmp_path}/a.pt")
    (told,) = (record.getMessage() for record in caplog.records)
    assert "does not say its activation, so quick_gelu is taken" in told
    assert told.endswith("method.image.backbone.block.act=gelu method.text.backbone.block.act=gelu")


def test_a_run_of_ours_fills_a_method(tmp_path, caplog):
    one = randomise(fresh(FACTS)).float()
    (tmp_path / "checkpoints").mkdir()
    torch.save({"state_dict": one.state_dict()}, tmp_path / "checkpoints" / "step=10.ckpt")
    other = fresh(FACTS, weights=str(tmp_path))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())
    assert "does not say its heads, epsilon and activation: unchecked" in caplog.text


def test_another_image_size_and_a_shorter_context(tmp_path):
    theirs = theirs_hf(FACTS).float()
    theirs.save_pretrained(tmp_path)
    facts = FACTS | {
        "image": FACTS["image"] | {"image_size": 48},
        "text": FACTS["text"] | {"max_length": 11},
    }
    ours, batch = fresh(facts, weights=f"hf:{tmp_path}").double().eval(), given()
    batch["image"] = images(48, batch=3)
    theirs = theirs.double()
    wanted = theirs.get_image_features(pixel_values=batch["image"], interpolate_pos_encoding=True).pooler_output
    assert gap(ours.embed_image(batch), torch.nn.functional.normalize(wanted, dim=-1)) < 1e-6  # resampled in float32
    short = {name: batch[name][1:, :11] for name in ("tokens", "valid")}
    wanted = theirs.get_text_features(input_ids=short["tokens"]).pooler_output
    assert gap(ours.embed_text(Batch(**short)), torch.nn.functional.normalize(wanted, dim=-1)) < 1e-12


def test_what_does_not_fit_is_one_line(tmp_path):
    theirs_hf(FACTS).float().save_pretrained(tmp_path / "clip")
    theirs_hf(OTHER).float().save_pretrained(tmp_path / "siglip")

    def other(part, **values):
        return FACTS | {part: FACTS[part] | values}

    with pytest.raises(io.OtherArchitecture, match=r"image.depth 2 there, 1 here.*method.image.backbone.depth=2") as e:
        fresh(other("image", depth=1), weights=f"hf:{tmp_path}/clip")
    assert e.value.arguments == settings(FACTS)
    with pytest.raises(io.OtherArchitecture, match=r"text.act quick_gelu there, gelu here"):
        fresh(other("text", act="gelu"), weights=f"hf:{tmp_path}/clip")
    with pytest.raises(UserError, match=r"99 tokens, the data write one of 50.*data.tokenizer"):
        fresh(other("text", vocab_size=50), weights=f"hf:{tmp_path}/clip")
    with pytest.raises(UserError, match=r"captions of 16 tokens, not 20: set data.train.context_length=16"):
        fresh(other("text", max_length=20), weights=f"hf:{tmp_path}/clip")
    with pytest.raises(UserError, match=r"is a siglip.*set method=siglip"):
        fresh(FACTS, weights=f"hf:{tmp_path}/siglip")
    with pytest.raises(UserError, match=r"no config.json"):
        fresh(FACTS, weights=f"hf:{tmp_path}/nothing")
    with pytest.raises(UserError, match=r"holds no open_clip_config.json"):
        fresh(FACTS, weights=f"open_clip:{tmp_path}")
    with pytest.raises(UserError, match="holds no checkpoints"):
        fresh(FACTS, weights=str(tmp_path))
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="no CLIP of OpenAI's layout"):
        fresh(FACTS, weights=f"open_clip:{tmp_path}/other.pt")
    with pytest.raises(UserError, match="is no CLIP or SigLIP of ours"):
        fresh(FACTS, weights=f"{tmp_path}/other.pt")
    torch.save({"base": {}}, tmp_path / "tuned.ckpt")
    with pytest.raises(UserError, match="what was tuned alone: export it with"):
        fresh(FACTS, weights=f"{tmp_path}/tuned.ckpt")
    with pytest.raises(UserError, match="one network alone; give the run folder"):
        fresh(FACTS, weights=f"{tmp_path}/last.safetensors")


@pytest.mark.parametrize("facts", [FACTS, OTHER], ids=["clip", "siglip"])
@pytest.mark.parametrize("eos", [None, 5])
def test_export_to_transformers(facts, eos, tmp_path):
    pytest.importorskip("transformers")
    ours = randomise(fresh(facts)).float()
    done = pairs_export.to_hf(ours, tmp_path, look=LOOK, eos=eos)
    assert done.difference < 1e-5 and (tmp_path / "preprocessor_config.json").is_file()
    again = fresh(facts, weights=f"hf:{tmp_path}")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in ours.state_dict().items())


@pytest.mark.parametrize("eos", [None, 5])
def test_export_to_open_clip(eos, tmp_path):
    pytest.importorskip("open_clip", reason="open_clip is not installed")
    ours = randomise(fresh(FACTS)).float()
    done = pairs_export.to_open_clip(ours, tmp_path, look=LOOK, eos=eos)
    assert done.difference < 1e-5
    again = fresh(FACTS, weights=f"open_clip:{tmp_path}")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in ours.state_dict().items())


def test_what_cannot_be_exported_is_one_line(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(UserError, match="end token has id 2"):
        pairs_export.to_hf(fresh(FACTS), tmp_path, eos=2)
    other = fresh(FACTS)
    other.towers["image"].pooling = "mean"
    with pytest.raises(UserError, match="backbones clip_vit and clip_text"):
        pairs_export.to_hf(other, tmp_path)
    pytest.importorskip("open_clip", reason="open_clip is not installed")
    with pytest.raises(UserError, match="use to=hf"):
        pairs_export.to_open_clip(fresh(OTHER), tmp_path)


def test_options_without_tensors_are_refused(tmp_path):
    config = open_clip.arguments(FACTS)
    assert open_clip.refusal(config) is None
    config["text_cfg"]["no_causal_mask"] = True
    assert open_clip.refusal(config) == "its text_cfg.no_causal_mask is True"
    for pool in ("first", "last"):  # the very last position, be it padding
        config["text_cfg"] |= {"no_causal_mask": False, "pool_type": pool}
        assert open_clip.refusal(config) == f"its text_cfg.pool_type is {pool}"


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m.towers["image"].backbone.norm, "eps", 1e-3),
        lambda m: setattr(m.towers["image"], "pooling", "mean"),
        lambda m: setattr(m.towers["text"], "pooling", "mean"),
        lambda m: setattr(m.towers["text"].backbone, "causal", False),
        lambda m: setattr(m.towers["text"].backbone.blocks[0]["mlp"].fn, "act", torch.relu),
    ],
)
def test_facts_are_silent_on_what_no_family_has(change):
    ours = fresh(FACTS)
    assert facts_of(ours) == FACTS
    change(ours)
    assert facts_of(ours) == {}


def test_a_run_takes_its_towers_from_weights(tmp_path):
    """All that the weights decide, the configuration takes over: of a pair, and of one tower alone."""
    theirs_hf(FACTS).float().save_pretrained(tmp_path / "clip")
    io.save(ViT(32, 1, 4, image_size=32, patch_size=8), tmp_path / "vit.safetensors")

    def begun(*words):
        cfg = compose("train", ["method=clip", "data.train.context_length=16", *words], [conf_folder()])
        cfg.method.text.backbone.vocab_size, said = VOCAB, []
        return build_method(cfg.method, 0, said.append), said

    ours, said = begun(f"method.weights=hf:{tmp_path}/clip", "data.image_size=32")
    assert facts_of(ours) == FACTS and said == [f"towers: as in hf:{tmp_path}/clip"]
    small = ["method.text.backbone.dim=32", "method.text.backbone.depth=1", "method.text.backbone.num_heads=2"]
    place = "method.image.backbone"
    ours, said = begun(f"backbone@{place}=vit_s16", f"{place}.weights={tmp_path}/vit.safetensors", *small)
    assert said == [f"image.backbone: dim 32, depth 1, patch_size 8, num_heads 4, as in {tmp_path}/vit.safetensors"]
    saved, _ = sources.read_safetensors(tmp_path / "vit.safetensors")
    assert all(torch.equal(ours.encoder.state_dict()[name], value) for name, value in saved.items())
