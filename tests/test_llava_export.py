"""A LLaVA that transformers opens: the same logits, the same tokens, the same pixels; and what it cannot hold."""

import functools

import pytest
import torch
from parity import gap, images, randomise
from test_conversations import SMOL, encoder
from test_llava import TINY
from test_vlm import MARK, V, ids, in_float64, small
from torch import nn
from torchvision.transforms.v2.functional import to_pil_image

from ssl_lab.backbones.hf_lm import HFDecoder
from ssl_lab.backbones.timm import Timm
from ssl_lab.backbones.vit import ViT
from ssl_lab.backbones.vlm import VisionLanguage
from ssl_lab.cli.main import main
from ssl_lab.data.conversation_text import ConversationEncoder
from ssl_lab.data.shapes import Shapes
from ssl_lab.data.views import STATS, Resize
from ssl_lab.errors import UserError
from ssl_lab.nn.block import encoder_block
from ssl_lab.nn.connectors import LinearConnector, MLPConnector, ResamplerConnector
from ssl_lab.nn.embed import PatchEmbed
from ssl_lab.nn.positions import Learned
from ssl_lab.weights import vlm_export, vlm_processor
from ssl_lab.weights.look import Look

transformers = pytest.importorskip("transformers")


def vit(**more):
    return functools.partial(ViT, 32, 3, 4, image_size=32, patch_size=8, **more)


NORM = functools.partial(nn.LayerNorm, eps=1e-5)
BLOCK = functools.partial(encoder_block, norm=NORM, mlp_ratio=2)
TOWERS = {
    "vit": vit(),
    "siglip_vision_model": vit(cls_token=False, block=functools.partial(BLOCK, act="gelu_tanh")),
    "clip_vision_model": vit(
        stem=functools.partial(PatchEmbed, bias=False, norm=NORM), block=functools.partial(BLOCK, act="quick_gelu")
    ),
    "dinov2": vit(block=functools.partial(encoder_block, layer_scale=1.0)),
}


def same_logits(model, folder):
    """Of rows with two images, one and none, in float64; the weights of both are what the folder holds."""
    theirs = in_float64(transformers.LlavaForConditionalGeneration.from_pretrained(folder).eval().double())
    model = model.float().double()
    rows = [[1, 2, model.image_token, 3, model.image_token, 5, 6], [7, model.image_token, 8], [10, 11, 12]]
    (tokens, valid), length = ids(*rows), theirs.config.image_seq_length
    wide = [[x for t in row for x in ([t] * length if t == model.image_token else [t])] for row in rows]
    wide, real = ids(*wide)
    pictures = images(batch=3)
    with torch.no_grad():
        want = theirs(input_ids=wide, attention_mask=real.long(), pixel_values=pictures).logits
        found = model.decoder.logits(model(tokens, pictures, valid=valid)[0].tokens)
    return gap(found[real], want[real][:, : found.shape[-1]])


@pytest.mark.parametrize("kind", TOWERS)
def test_every_image_encoder_that_fits_gives_the_same_logits(tmp_path, kind):
    connector = MLPConnector if kind != "dinov2" else functools.partial(LinearConnector, bias=False)
    model = small(connector, vision=TOWERS[kind]())
    done = vlm_export.to_hf(model, tmp_path, end=5, pad=0)
    assert done.difference < 1e-4 and done.scale > 1
    config = transformers.LlavaConfig.from_pretrained(tmp_path)
    assert config.vision_config.model_type == kind and config.image_token_index == MARK
    assert same_logits(model, tmp_path) < 1e-12


def test_linear_connectors_registers_and_markers_without_a_row(tmp_path):
    registers = vit(num_registers=2, block=functools.partial(encoder_block, layer_scale=1.0))()
    model = small(LinearConnector, vision=registers, drop_prefix=False)
    model.image_token = V  # no row in the embedding, and no output
    vlm_export.to_hf(model, tmp_path, end=5)
    assert same_logits(model, tmp_path) < 1e-12
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert theirs.config.text_config.vocab_size == V + 1 and theirs.config.image_seq_length == 16 + 3
    assert theirs.generation_config.suppress_tokens == [V] and theirs.generation_config.pad_token_id == 5


def test_language_models_of_transformers_go_back_to_it(tmp_path):
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    for tied in (False, True):
        config = transformers.Qwen2Config(vocab_size=V, num_key_value_heads=2, tie_word_embeddings=tied, **sizes)
        randomise(transformers.Qwen2ForCausalLM(config)).float().save_pretrained(tmp_path / "lm")
        model = VisionLanguage(vit()(), MLPConnector, HFDecoder(str(tmp_path / "lm")), image_token=V + 3)
        randomise(model)
        (out := tmp_path / f"out{tied}").mkdir()
        assert vlm_export.to_hf(model, out).difference < 1e-4


def test_what_transformers_cannot_hold_is_named(tmp_path):
    odd = functools.partial(Timm, "vit_tiny_patch16_224", image_size=32, depth=2, embed_dim=32, num_heads=2)
    register = vit(num_registers=2, block=functools.partial(encoder_block, layer_scale=1.0))
    for model, message in [
        (small(functools.partial(ResamplerConnector, num_latents=3, depth=1)), "connector is a ResamplerConnector"),
        (small(functools.partial(MLPConnector, pool=2)), "connector has pool=2"),
        (small(functools.partial(LinearConnector, merge=2)), "connector has pool=1 and merge=2"),
        (small(prefix_lm=True), "prefix_lm=true"),
        (small(vision=odd()), "vision is a Timm"),
        (small(vision=register()), "vision has 2 register tokens"),
        (small(vision=vit(num_registers=2)(), drop_prefix=False), "not the layer scale"),
        (small(vision=vit(block=functools.partial(encoder_block, qk_norm=NORM))()), "another recipe"),
        (small(layer=None), "layer=null"),
        (small(positions=Learned), "decoder is no LLaMA"),
    ]:
        with pytest.raises(UserError, match=message) as told:
            vlm_export.to_hf(model, tmp_path)
        assert "to=hf can write" in str(told.value) and "\n" not in str(told.value)
    assert not list(tmp_path.iterdir())


def test_the_processor_sees_and_reads_as_training_does(tmp_path):
    for system in (None, "Be brief \U0001f600.", ""):
        encode = encoder(SMOL, system=system)
        known = encode.tokenizer
        known.save(tmp_path / "run")
        look = Look(32, 32, "bicubic", STATS["imagenet"])
        vlm_processor.write(
            tmp_path / "out", tokenizer=tmp_path / "run/tokenizer.json",
            config=encode.settings, system=system, look=look, patch_size=8, strategy="default", extra=1,
        )  # fmt: skip
        model = transformers.CLIPVisionConfig()  # AutoProcessor reads the kind off the processor's own file
        model.save_pretrained(tmp_path / "out")
        theirs = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
        picture = Shapes("test", 1, image_size=48).read([0]).data[0]
        parts = [{"type": "image"}, {"type": "text", "text": "what color is it?"}]
        for content in (parts, f"{encode.marker}\nwhat color is it?"):
            text = theirs.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
            found = theirs(text=text, images=to_pil_image(picture), return_tensors="pt", add_special_tokens=False)
            ours = encode.prompt([{"role": "user", "content": f"{encode.marker}\nwhat color is it?"}])
            wide = [x for t in ours for x in ([t] * 16 if t == encode.image else [t])]
            assert found["input_ids"][0].tolist() == wide
        alone = theirs.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}]}], add_generation_prompt=True, tokenize=False
        )  # as captions are taught
        ours = encode.prompt([{"role": "user", "content": encode.marker}])
        assert theirs.tokenizer(alone, add_special_tokens=False)["input_ids"] == ours
        pixels = Resize(32)(picture[None], torch.zeros(1), 0)["image"]
        assert gap(pixels, found["pixel_values"]) < 0.02  # a grey value of 255 is 0.017
        again = theirs.apply_chat_template([
            {"role": "system", "content": "A."}, {"role": "user", "content": "sure?"},
            {"role": "assistant", "content": "yes"}, {"role": "user", "content": "is it a circle?"},
        ], add_generation_prompt=True)  # fmt: skip
        assert again.count("system") == 1 and again.index("sure?") < again.index("yes")


def test_a_run_becomes_a_folder_of_transformers(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny = [*(word for word in TINY if not word.startswith("eval")), "eval=[]", "duration=2steps"]
    assert main([*tiny, "method.model.connector.pool=1", "tuning=lora", "tuning.rank=2", "out=run"]) == 0
    capsys.readouterr()
    assert main(["export", "ckpt=run", "to=hf", "out=hf"]) == 0
    told = capsys.readouterr().out
    assert "LlavaForConditionalGeneration.from_pretrained" in told and "largest difference" in told
    model = transformers.LlavaForConditionalGeneration.from_pretrained("hf").eval()
    processor = transformers.AutoProcessor.from_pretrained("hf")
    encode = ConversationEncoder("run")
    assert model.config.image_token_index == encode.image and model.generation_config.eos_token_id == encode.end
    picture = to_pil_image(Shapes("test", 1).read([0]).data[0])
    given = processor(text="<image>\nwhat shape?\n", images=picture, return_tensors="pt")
    out = model.generate(**given, max_new_tokens=3, do_sample=False)
    assert out.shape[1] <= given["input_ids"].shape[1] + 3
