"""Vision-language models: equal to transformers' LLaVA, images in their places, nothing where there are none."""

import functools
import types

import pytest
import torch
from parity import gap, images, randomise
from torch import nn

from ssl_lab.backbones.decoder import Decoder
from ssl_lab.backbones.hf_lm import HFDecoder
from ssl_lab.backbones.timm import Timm
from ssl_lab.backbones.tower import Tower
from ssl_lab.backbones.vit import ViT
from ssl_lab.backbones.vlm import VisionLanguage
from ssl_lab.errors import UserError
from ssl_lab.losses.lm import mean_over_tokens, token_nll
from ssl_lab.methods.causal_lm import CausalLM
from ssl_lab.nn.block import encoder_block
from ssl_lab.nn.cache import KVCache
from ssl_lab.nn.connectors import LinearConnector, MLPConnector, ResamplerConnector
from ssl_lab.nn.embed import PatchEmbed
from ssl_lab.nn.positions import Learned, Rotary
from ssl_lab.nn.recipes import llama_block, rms_norm
from ssl_lab.nn.resampler import Resampler
from ssl_lab.nn.rope import rope_1d
from ssl_lab.types import Batch
from ssl_lab.weights import pair_facts
from ssl_lab.weights.families import make
from ssl_lab.weights.rename import rename
from ssl_lab.weights.tables import hf_clip, hf_llama

MARK, V = 98, 99


def small(connector=MLPConnector, *, positions=Rotary, vision=None, **more):
    """16 patches an image, a decoder of 48."""
    torch.manual_seed(0)
    vision = vision or ViT(32, 2, 4, image_size=32, patch_size=8)
    decoder = Decoder(V, 48, 2, 4, max_length=128, positions=positions, block=llama_block, norm=rms_norm)
    return randomise(VisionLanguage(vision, connector, decoder, image_token=MARK, **more))


def ids(*rows, pad=0):
    """Rows as one batch filled up on the right, and what is real."""
    longest = max(map(len, rows))
    tokens = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows])
    return tokens, torch.tensor([[True] * len(row) + [False] * (longest - len(row)) for row in rows])


def in_float64(theirs):
    """transformers norms in float32 whatever the type, and has angles of its own float32 rounding; not here."""

    def norm(self, x):
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    def angles(x, position_ids):
        cos, sin = (table[:, 0].double() for table in rope_1d(position_ids, 12))
        return cos, torch.cat([-sin[..., :6], sin[..., 6:]], -1)

    for module in theirs.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = types.MethodType(norm, module)
    theirs.model.language_model.rotary_emb.forward = angles
    return theirs


def theirs_and_ours():
    transformers = pytest.importorskip("transformers")
    vision = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision, image_size=32, patch_size=8),
        text_config=transformers.LlamaConfig(
            vocab_size=V, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64,
        ),
        image_token_index=MARK, vision_feature_layer=-2, vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
    )  # fmt: skip
    theirs = in_float64(randomise(transformers.LlavaForConditionalGeneration(config)))
    state = theirs.state_dict()
    tower = {"dim": 32, "depth": 3, "num_heads": 4, "hidden": 64, "act": "quick_gelu", "eps": 1e-5}
    text = tower | {"vocab_size": 9, "max_length": 9}
    shape = {"family": "clip", "embed_dim": 8, "image": {**tower, "image_size": 32, "patch_size": 8}, "text": text}
    vit = pair_facts.towers(shape)["image"].backbone.double()
    place = "model.vision_tower."
    found = {
        key.removeprefix(place).removeprefix("vision_model."): v for key, v in state.items() if key.startswith(place)
    }
    found = hf_clip.fold({f"vision_model.{key}": value for key, value in found.items()})
    rows = [row for row in hf_clip.TABLE if "vision_model" in str(row)]
    vit.load_state_dict({k.removeprefix(hf_clip.IMAGE): v for k, v in rename(found, rows).items()})
    facts = hf_llama.facts(config.text_config) | {"tied": False}
    decoder = make(facts).double()
    place = "model.language_model."
    llama = {k.removeprefix(place): v for k, v in state.items() if k.startswith(place)}
    decoder.load_state_dict(rename(llama | {"lm_head.weight": state["lm_head.weight"]}, hf_llama.table(facts)))
    ours = VisionLanguage(vit, MLPConnector, decoder, image_token=MARK).double().eval()
    place = "model.multi_modal_projector.linear_"
    ours.connector.load_state_dict(
        {k.removeprefix(place).replace("1.", "fc1.").replace("2.", "fc2."): v for k, v in state.items() if place in k}
    )
    return theirs, ours


def test_logits_and_loss_are_those_of_llava_for_conditional_generation():
    theirs, ours = theirs_and_ours()
    rows = [[1, 2, MARK, 3, 4, 5, 6], [7, MARK, 8, MARK, 9], [10, 11, 12]]
    pictures = images(batch=3)
    tokens, valid = ids(*rows)
    labels = torch.full_like(tokens, -100)
    labels[0, 3:6], labels[1, 3], labels[2, 0:2] = torch.tensor([4, 5, 6]), 9, torch.tensor([11, 12])
    wide, real = ids(*[[x for t in row for x in ([t] * 16 if t == MARK else [t])] for row in rows])
    scored = torch.full_like(wide, -100)
    scored[0, 19:22], scored[1, 34], scored[2, 1:3] = wide[0, 19:22], 9, wide[2, 1:3]
    with torch.no_grad():
        want = theirs(input_ids=wide, attention_mask=real.long(), pixel_values=pictures).logits
        out, placed = ours(tokens, pictures, valid=valid, labels=labels)
        nll = token_nll(out.tokens, ours.decoder.head_weight, placed)
    assert gap(ours.decoder.logits(out.tokens)[real], want[real]) < 1e-12
    loss = nn.functional.cross_entropy(want[:, :-1].flatten(0, 1), scored[:, 1:].flatten())  # theirs, in float64
    assert abs(float(mean_over_tokens(nll, placed) - loss)) < 1e-12
    assert int((placed != -100).sum()) == int((labels != -100).sum())


def test_the_layer_before_the_last_is_read_without_norm_and_prefix():
    vision = randomise(ViT(32, 3, 4, image_size=32, patch_size=8, num_registers=2))
    x = images()
    want = vision(x, layers=[-2]).hidden[-2][:, 3:]
    model = VisionLanguage(vision, LinearConnector, Decoder(V, 16, 1, 2), image_token=MARK).double().eval()
    assert len(model.vision.blocks) == 2 and gap(model.patches(x), want) == 0
    with pytest.raises(UserError, match=r"method\.model\.layer=4: there are 2 blocks"):
        VisionLanguage(model.vision, LinearConnector, Decoder(V, 16, 1, 2), image_token=MARK, layer=4)
    with pytest.raises(UserError, match=r"method\.model\.layer=5: there are 5 blocks"):
        VisionLanguage(Timm("resnet10t"), LinearConnector, Decoder(V, 16, 1, 2), image_token=MARK, layer=5)


def test_timm_models_give_their_patches():
    tower = Timm("vit_tiny_patch16_224", image_size=32, depth=2, embed_dim=32, num_heads=2)
    model = small(vision=tower)
    assert model.patches(images()).shape == (2, 4, 32)


def test_a_marker_becomes_its_image_wherever_it_stands():
    model, pictures = small(), images(batch=3)
    tokens, valid = ids([1, MARK, 2, 3], [4, 5], [MARK, 6, MARK])
    with torch.no_grad():
        seen = model.see(pictures)
        x = model.splice(tokens, seen, valid=valid)
        left = model.splice(tokens, seen, valid=valid, side="left")
    e = model.decoder.embed.weight
    rows = [torch.cat([e[[1]], seen[0], e[[2, 3]]]), e[[4, 5]], torch.cat([seen[1], e[[6]], seen[2]])]
    for i, row in enumerate(rows):
        assert x.valid[i].sum() == left.valid[i].sum() == len(row)
        assert torch.equal(x.embedded[i][: len(row)], row) and torch.equal(left.embedded[i][-len(row) :], row)


def test_rows_alone_and_together_padded_on_either_side_and_packed_are_the_same():
    pictures = images(batch=2)
    rows = [[1, MARK, 2, 3], [4, 5, 6], [MARK, 7]]
    for positions in (Rotary, Learned):
        model = small(positions=positions)
        with torch.no_grad():
            alone = [
                model(torch.tensor([row]), pictures[i : i + 1] if MARK in row else None)[0].tokens[0]
                for row, i in zip(rows, (0, 0, 1), strict=True)
            ]
            (tokens, valid), (left, filled) = ids(*rows), ids(*[row[::-1] for row in rows])
            padded = model(tokens, pictures, valid=valid)[0]
            turned = model(left.flip(1), pictures, valid=filled.flip(1))[0]
            packed = torch.tensor([[*rows[0], *rows[1], *rows[2], 0]])
            segments = torch.tensor([[0] * 4 + [1] * 3 + [2] * 2 + [-1]])
            joined = model(packed, pictures, segments=segments)[0].tokens[0]
        for i, want in enumerate(alone):
            assert gap(padded.tokens[i, : len(want)], want) < 1e-12
            assert gap(turned.tokens[i][turned.valid[i]], want) < 1e-12
        # Rotary positions go on over a packed row: their angles are rounded to float32 at another place.
        assert gap(joined[: sum(map(len, alone))], torch.cat(alone)) < (1e-12 if positions is Learned else 1e-5)


def test_a_cache_goes_on_where_the_images_ended():
    for prefix_lm in (False, True):
        model = small(prefix_lm=prefix_lm)
        tokens, pictures = torch.tensor([[1, MARK, 2, 3, 4, 5]]), images(batch=1)
        with torch.no_grad():
            whole = model(tokens, pictures)[0].tokens[0]
            cache = KVCache()
            x = model.splice(tokens[:, :4], model.see(pictures))
            first = model.decoder(x.embedded, prefix=x.prefix, cache=cache).tokens[0]
            then = [model.decoder(tokens[:, i : i + 1], cache=cache).tokens[0] for i in (4, 5)]
        assert gap(torch.cat([first, *then]), whole) < 1e-12


def test_prefix_lm_lets_the_image_see_all_of_itself_and_no_answer():
    model = small(prefix_lm=True)
    pictures = images(batch=1).requires_grad_()
    tokens = torch.tensor([[1, MARK, 2, 3]])
    out = model(tokens, pictures)[0].tokens[0]
    (grad,) = torch.autograd.grad(out[1].sum(), pictures, retain_graph=True)
    assert grad[0, :, -8:, -8:].abs().sum() > 0  # the first token of the image sees the last patch directly
    plain = small()
    with torch.no_grad():
        assert gap(plain(tokens, pictures)[0].tokens[0, 1], out[1]) > 1e-6
        other = model(torch.tensor([[1, MARK, 2, 9]]), pictures)[0].tokens[0]
    assert gap(out[:18], other[:18]) < 1e-12
    labels = torch.tensor([[MARK, -100, 3, -100]])  # something before the image is to be predicted: no prefix
    with torch.no_grad():
        assert gap(model(tokens, pictures, labels=labels)[0].tokens, plain(tokens, pictures)[0].tokens) < 1e-12
    with pytest.raises(UserError, match="pack=null"):
        model(tokens, pictures, segments=torch.zeros_like(tokens))


@pytest.mark.parametrize("connector", [MLPConnector, functools.partial(ResamplerConnector, num_latents=3, depth=1)])
def test_without_images_the_connector_takes_part_and_changes_nothing(connector):
    model = small(connector).freeze("vision")
    tokens = torch.tensor([[1, 2, 3]])
    for given in (None, torch.zeros(0, 3, 32, 32)):
        model.zero_grad()
        out = model(tokens, given)[0].tokens
        assert gap(out, model.decoder(tokens).tokens) == 0
        out.sum().backward()
        assert all(p.grad is not None and not p.grad.any() for p in model.connector.parameters())
    with torch.no_grad():
        assert gap(model(tokens)[0].tokens, out) == 0


def test_frozen_parts_hold_no_gradient_and_drop_nothing():
    model = small(vision=ViT(32, 2, 4, image_size=32, patch_size=8)).freeze("vision", "decoder").train()
    assert not model.vision.training and not model.decoder.training and model.connector.training
    model(torch.tensor([[1, MARK, 2]]), images(batch=1))[0].tokens.sum().backward()
    names = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert names == {"connector"}
    model.freeze()
    assert model.decoder.training and all(p.requires_grad for p in model.decoder.parameters())


def test_mistakes_are_told():
    model = small()
    with pytest.raises(UserError, match="a prompt without its image"):
        model(torch.tensor([[1, MARK]]))
    with pytest.raises(UserError, match="no prompt mentions"):
        model(torch.tensor([[1, 2]]), images(batch=1))


def test_connectors_shapes_and_grids():
    patches = images(4, batch=2).flatten(2).transpose(1, 2)  # 16 patches of width 3
    for kind, count in [
        (functools.partial(LinearConnector, pool=2), 4),
        (functools.partial(MLPConnector, merge=2), 4),
        (functools.partial(MLPConnector, merge=2, pool=2), 1),
        (functools.partial(ResamplerConnector, num_latents=5, num_heads=2, head_dim=4), 5),
        (LinearConnector, 16),
    ]:
        connector = kind(3, 8).double()
        assert connector(patches).shape == (2, count, 8) and connector.num_tokens(16) == count
    mean = LinearConnector(3, 3, pool=2).gathered(patches)
    assert gap(mean[:, 0], patches[:, [0, 1, 4, 5]].mean(1)) < 1e-15
    joined = LinearConnector(3, 3, merge=2).gathered(patches)
    assert gap(joined[:, 1], patches[:, [2, 3, 6, 7]].flatten(1)) == 0
    for wrong in (patches[:, :15], patches[:, :9]):
        with pytest.raises(UserError, match="square grid"):
            LinearConnector(3, 3, pool=2)(wrong)
    with pytest.raises(UserError, match="pool=0"):
        LinearConnector(3, 3, pool=0)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_resampler_is_that_of_idefics(qk_norm):
    transformers = pytest.importorskip("transformers")
    from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

    config = transformers.IdeficsConfig(
        vision_config={"embed_dim": 32}, perceiver_config={"qk_layer_norms_perceiver": qk_norm}
    )
    theirs = randomise(IdeficsPerceiverResampler(config, 32, 2, 4, 8, 5))
    ours = Resampler(32, 5, depth=2, num_heads=4, head_dim=8, qk_norm=qk_norm).double().eval()
    state = {"latents": theirs.latents, "norm.weight": theirs.layer_norm.weight, "norm.bias": theirs.layer_norm.bias}
    names = {
        "media_norm": "0.context_layer_norm", "latent_norm": "0.latents_layer_norm", "q": "0.q_proj",
        "q_norm": "0.q_layer_norm", "k_norm": "0.k_layer_norm", "proj": "0.output_proj", "norm": "1.ln",
        "fc1": "1.fc", "fc2": "1.c_proj",
    }  # fmt: skip
    found = theirs.state_dict()
    for i in range(2):
        for mine, other in names.items():
            for kind in ("weight", "bias"):
                if (value := found.get(f"blocks.{i}.{other}.{kind}")) is not None:
                    state[f"layers.{i}.{mine}.{kind}"] = value
        state[f"layers.{i}.kv.weight"] = torch.cat([found[f"blocks.{i}.0.{x}_proj.weight"] for x in "kv"])
    ours.load_state_dict(state)
    media = torch.randn(2, 7, 32, dtype=torch.float64)
    with torch.no_grad():
        assert gap(ours(media), theirs(media)) < 1e-12


def test_any_causal_language_model_of_transformers_speaks(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    theirs = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(vocab_size=V, num_key_value_heads=2, **sizes))
    randomise(theirs).float().save_pretrained(tmp_path)
    decoder = HFDecoder(str(tmp_path)).double()
    vision = ViT(32, 2, 4, image_size=32, patch_size=8)
    model = VisionLanguage(vision, MLPConnector, decoder, image_token=MARK).double().eval()
    pictures, rows = images(batch=2), [[1, MARK, 2, 3], [4, 5, 6], [MARK, 7]]
    with torch.no_grad():
        x = model.splice(torch.tensor([rows[0]]), model.see(pictures[:1]))
        want = decoder.model.base_model(inputs_embeds=x.embedded).last_hidden_state
        alone = [
            model(torch.tensor([row]), pictures[i : i + 1] if MARK in row else None)[0].tokens[0]
            for row, i in zip(rows, (0, 0, 1), strict=True)
        ]
        tokens, valid = ids(*rows)
        padded = model(tokens, pictures, valid=valid)[0].tokens
        segments = torch.tensor([[0] * 4 + [1] * 3 + [2] * 2])
        joined = model(torch.tensor([[*rows[0], *rows[1], *rows[2]]]), pictures, segments=segments)[0].tokens[0]
        cache = decoder.new_cache()
        first = decoder(x.embedded, cache=cache).tokens
        then = decoder(torch.tensor([[9]]), cache=cache).tokens
        both = decoder(torch.cat([x.embedded, decoder.embed(torch.tensor([[9]]))], 1)).tokens
    assert gap(alone[0], want[0]) < 1e-12
    assert gap(torch.cat([first, then], 1), both) < 1e-12
    for i, found in enumerate(alone):
        assert gap(padded[i, : len(found)], found) < 1e-12
    assert gap(joined, torch.cat(alone)) < 1e-5  # see above
    assert isinstance(decoder.head_weight, nn.Parameter)
    with pytest.raises(UserError, match="no config"):
        HFDecoder(str(tmp_path / "none"))


def test_packed_rows_of_a_model_with_a_table_of_positions_are_each_document_alone(tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=V, n_embd=48, n_layer=2, n_head=4))
    randomise(theirs).float().save_pretrained(tmp_path)
    decoder = HFDecoder(str(tmp_path)).double().eval()
    rows = [torch.tensor([[1, 2, 3, 4]]), torch.tensor([[5, 6, 7]])]
    segments = torch.tensor([[0] * 4 + [1] * 3])
    with torch.no_grad():
        joined = decoder(torch.cat(rows, 1), segments=segments).tokens
        alone = torch.cat([decoder(row).tokens for row in rows], 1)
    assert gap(joined, alone) < 1e-12


def test_language_models_of_transformers_that_would_be_another_one_here_are_refused(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "head_dim": 12, "vocab_size": V}
    capped = transformers.Gemma2Config(**sizes, **more, final_logit_softcapping=0.1, sliding_window=64)
    randomise(transformers.Gemma2ForCausalLM(capped)).float().save_pretrained(tmp_path / "capped")
    with pytest.raises(UserError, match="scores in a way of its own"):
        HFDecoder(str(tmp_path / "capped"))
    short = transformers.MistralConfig(**sizes, **more, sliding_window=9)
    transformers.MistralForCausalLM(short).save_pretrained(tmp_path / "short")
    decoder = HFDecoder(str(tmp_path / "short"))
    assert decoder.sliding == 9 and decoder(torch.ones(1, 9, dtype=torch.int64)).tokens.shape == (1, 9, 48)
    with pytest.raises(UserError, match="window of 9"):
        decoder(torch.ones(1, 10, dtype=torch.int64))
    with pytest.raises(UserError, match=r"method\.layer=1: .* set it to null"):
        CausalLM(decoder, layer=1)
    batch = Batch(tokens=torch.ones(2, 5, dtype=torch.int64), labels=torch.ones(2, 5, dtype=torch.int64))
    assert CausalLM(decoder).step(batch, 0.5).loss.isfinite() and CausalLM(decoder).embed(batch).shape == (2, 48)
    assert Tower(decoder, 8)(batch["tokens"], valid=torch.ones(2, 5, dtype=torch.bool)).shape == (2, 8)
    bloom = transformers.BloomConfig(vocab_size=V, hidden_size=48, n_layer=1, n_head=4)
    transformers.BloomForCausalLM(bloom).save_pretrained(tmp_path / "bloom")
    with pytest.raises(UserError, match="cannot take the place"):
        HFDecoder(str(tmp_path / "bloom"))


def test_the_image_encoder_of_transformers_clip_and_siglip_alone(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    text = {**sizes, "vocab_size": 99, "max_position_embeddings": 8}
    x = images()
    for kind in ("CLIP", "Siglip"):
        config = getattr(transformers, f"{kind}Config")(vision_config=vision, text_config=text)
        theirs = randomise(getattr(transformers, f"{kind}Model")(config)).float()
        theirs.save_pretrained(tmp_path / kind)
        theirs.double()
        eps = theirs.config.vision_config.layer_norm_eps
        norm = functools.partial(nn.LayerNorm, eps=eps)
        stem = functools.partial(PatchEmbed, bias=False, norm=norm) if kind == "CLIP" else PatchEmbed
        act = "quick_gelu" if kind == "CLIP" else "gelu_tanh"
        sized = {"image_size": 32, "patch_size": 8, "stem": stem, "cls_token": kind == "CLIP"}
        block = functools.partial(encoder_block, act=act, norm=norm, mlp_ratio=2)
        ours = ViT(32, 2, 4, **sized, block=block, weights=f"hf:{tmp_path / kind}").double().eval()
        with torch.no_grad():
            hidden = theirs.vision_model(x, output_hidden_states=True).hidden_states[-2]
            found = ours(x, layers=[-2]).hidden[-2]
        assert gap(found, hidden) < 1e-6  # saved in float32
        wrong = functools.partial(encoder_block, norm=norm, mlp_ratio=2)
        with pytest.raises(UserError, match=f"act {act} there, gelu here"):
            ViT(32, 2, 4, **sized, block=wrong, weights=f"hf:{tmp_path / kind}")
