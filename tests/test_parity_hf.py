import functools

import pytest
import torch
from parity import TINY, gap, gradients, images, randomise, weigh

from ssl_lab.errors import UserError
from ssl_lab.methods.mae import MAE, Decoder
from ssl_lab.nn.block import encoder_block
from ssl_lab.nn.embed import sincos_2d
from ssl_lab.weights import io
from ssl_lab.weights.rename import rename
from ssl_lab.weights.tables import hf_dinov2, hf_mae, hf_vit

transformers = pytest.importorskip("transformers")

SCALED = TINY | {"layer_scale": 0.1}


def vit():
    config = transformers.ViTConfig(**hf_vit.arguments(TINY))
    return transformers.ViTModel(config, add_pooling_layer=False), hf_vit.TABLE, TINY


def ijepa():
    config = transformers.IJepaConfig(**hf_vit.arguments(TINY))
    return transformers.IJepaModel(config, add_pooling_layer=False), hf_vit.TABLE, TINY | {"cls_token": False}


def dinov2():
    config = transformers.Dinov2Config(**hf_dinov2.arguments(SCALED))
    return transformers.Dinov2Model(config), hf_dinov2.TABLE, SCALED


def dinov2_registers():
    architecture = SCALED | {"num_registers": 3}
    config = transformers.Dinov2WithRegistersConfig(**hf_dinov2.arguments(architecture))
    return transformers.Dinov2WithRegistersModel(config), hf_dinov2.TABLE, architecture


MODELS = {f.__name__: f for f in (vit, ijepa, dinov2, dinov2_registers)}


def all_tokens(ours, x):
    encoded = ours(x)
    return torch.cat([encoded.prefix, encoded.tokens], 1)


@pytest.mark.parametrize("name", MODELS)
def test_vit_is_transformers(name):
    theirs, table, architecture = MODELS[name]()
    randomise(theirs)
    ours = io.vit(architecture).double().eval()
    ours.load_state_dict(rename(theirs.state_dict(), table))
    a, b = all_tokens(ours, images()), theirs(images()).last_hidden_state
    assert gap(a, b) <= 1e-10
    weigh(a).backward()
    weigh(b).backward()
    found, expected = gradients(ours), rename(gradients(theirs), table)
    assert found.keys() == expected.keys()
    assert {key: gap(found[key], expected[key]) for key in found if gap(found[key], expected[key]) > 1e-10} == {}


@pytest.mark.parametrize("name", MODELS)
def test_table_goes_both_ways(name):
    theirs, table, _ = MODELS[name]()
    state = randomise(theirs).state_dict()
    back = rename(rename(state, table), table, back=True)
    assert back.keys() == state.keys() - {"embeddings.mask_token"}
    assert all(torch.equal(back[key], state[key]) for key in back)


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_folder_loads(name, tmp_path):
    theirs, _, architecture = MODELS[name]()
    randomise(theirs).float().save_pretrained(tmp_path)
    ours = io.vit(architecture).eval()
    io.load(ours, f"hf:{tmp_path}")
    assert gap(all_tokens(ours, images().float()), theirs(images().float()).last_hidden_state) < 1e-5
    with pytest.raises(UserError, match=f"hf:{tmp_path}"):
        io.load(ours, str(tmp_path / "model.safetensors"))


def mae(norm_pix: bool = True) -> tuple[MAE, torch.nn.Module]:
    decoder = functools.partial(
        Decoder, dim=16, depth=1, num_heads=2, block=functools.partial(encoder_block, mlp_ratio=2.0)
    )
    ours = MAE(io.vit(TINY | {"positions": "sincos"}), decoder=decoder, norm_pix=norm_pix).double().eval()
    config = transformers.ViTMAEConfig(
        **hf_vit.arguments(TINY),
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=32,
        norm_pix_loss=norm_pix,
        mask_ratio=0.75,
    )
    theirs = randomise(transformers.ViTMAEForPreTraining(config))
    ours.load_state_dict(rename(theirs.state_dict(), hf_mae.TABLE))
    return ours, theirs


@pytest.mark.parametrize("norm_pix", [True, False])
def test_mae_is_transformers(norm_pix):
    ours, theirs = mae(norm_pix)
    noise = torch.rand(2, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    loss, predicted, keep, drop = ours.reconstruct(images(), noise)
    expected = theirs(images(), noise=noise)
    mask = torch.ones(2, 16).scatter(1, keep, 0.0)
    assert torch.equal(mask, expected.mask.float())
    assert torch.equal(torch.cat([keep, drop], 1).argsort(1), expected.ids_restore)
    logits = expected.logits.gather(1, drop[..., None].expand(-1, -1, predicted.shape[-1]))
    assert gap(predicted, logits) <= 1e-10
    assert abs(loss.item() - expected.loss.item()) <= 1e-10

    loss.backward()
    expected.loss.backward()
    found, wanted = gradients(ours), rename(gradients(theirs), hf_mae.TABLE)
    assert found.keys() == wanted.keys()
    assert {key: gap(found[key], wanted[key]) for key in found if gap(found[key], wanted[key]) > 1e-10} == {}
    assert all(value.abs().max() > 0 for key, value in found.items() if not key.endswith("pos_embed"))


def test_mae_table_goes_both_ways():
    ours, theirs = mae()
    back, state = rename(ours.state_dict(), hf_mae.TABLE, back=True), theirs.state_dict()
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_mae_folder_gives_its_encoder(tmp_path):
    ours, theirs = mae()
    theirs.float().save_pretrained(tmp_path)
    encoder = io.vit(TINY | {"positions": "sincos"}).eval()
    io.load(encoder, f"hf:{tmp_path}")
    assert gap(all_tokens(encoder, images().float()), all_tokens(ours.encoder.float(), images().float())) < 1e-5


def test_sincos_table_is_transformers_with_its_halves_swapped():
    from transformers.models.vit_mae.modeling_vit_mae import build_2d_sinusoidal_position_embedding

    theirs = build_2d_sinusoidal_position_embedding(4, 6, 32, cls_token=True)
    assert gap(sincos_2d(32, (4, 6), prefix=1), torch.cat([theirs[:, 16:], theirs[:, :16]], 1)) < 1e-6


def test_other_models_are_refused(tmp_path):
    transformers.BertModel(
        transformers.BertConfig(
            vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
        )
    ).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="bert"):
        io.load(io.vit(TINY), f"hf:{tmp_path}")


def test_another_activation_is_refused(tmp_path):
    transformers.ViTModel(transformers.ViTConfig(**hf_vit.arguments(TINY), hidden_act="gelu_new")).save_pretrained(
        tmp_path
    )
    with pytest.raises(UserError, match="GELU"):
        io.load(io.vit(TINY), f"hf:{tmp_path}")


def test_an_incomplete_folder_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    theirs, _, _ = vit()
    theirs.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state.pop("layernorm.weight")
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"layernorm\.weight"):
        io.load(io.vit(TINY), f"hf:{tmp_path}")
