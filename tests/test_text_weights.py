"""Weights of language models go in and out: transformers' folders, GGUF, our own files; mistakes are told in a line."""

import functools
import json

import pytest
import torch
from omegaconf import OmegaConf, open_dict
from parity import gap, randomise
from safetensors.torch import save_file
from test_parity_text import BERT, GPT2, LLAMA, LLAMA3

from ssl_lab.backbones.decoder import Decoder
from ssl_lab.backbones.text import TextEncoder
from ssl_lab.cli.catalog import conf_folder
from ssl_lab.cli.compose import compose
from ssl_lab.cli.starting import build_method
from ssl_lab.errors import UserError
from ssl_lab.methods.masked_lm import MaskedLM
from ssl_lab.nn.heads import MaskedLMHead, PoolerHead
from ssl_lab.nn.positions import ALiBi
from ssl_lab.nn.recipes import llama_block, rms_norm
from ssl_lab.weights import export, families, io, text, text_export
from ssl_lab.weights.rename import Fuse, Transposed, rename

T5 = {
    "family": "t5", "vocab_size": 37, "dim": 32, "depth": [2, 3], "num_heads": 4, "hidden": 48, "max_length": 512,
    "eps": 1e-6, "head_dim": 6, "gated": False, "num_buckets": 8, "max_distance": 20, "scaled": "head", "tied": True,
}  # fmt: skip
T5_V11 = T5 | {"gated": True, "scaled": "none", "tied": False}
MISTRAL = LLAMA | {"window": 4, "tied": True}
TRANSFORMER = {
    "family": "transformer", "vocab_size": 37, "dim": 32, "depth": [2, 2], "num_heads": 4, "hidden": 48,
    "max_length": 64, "eps": 1e-5, "halves": False, "scaled": "embedding", "tied": True,
}  # fmt: skip
LLAMA_3 = LLAMA | {"scaling": LLAMA3}
ALL = {"bert": BERT, "gpt2": GPT2, "llama": LLAMA, "llama3": LLAMA_3, "mistral": MISTRAL, "t5": T5, "t5_v1_1": T5_V11}


def model(facts, seed=0):
    return randomise(families.make(facts), seed).float()


def same(a, b):
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


# ---- facts


@pytest.mark.parametrize("facts", [*ALL.values(), TRANSFORMER], ids=[*ALL, "transformer"])
def test_facts_make_a_model_that_has_these_facts(facts):
    assert families.facts_of(families.make(facts)) == facts


def test_a_model_of_other_parts_has_no_facts():
    bare = functools.partial(llama_block, hidden=48)
    assert families.facts_of(Decoder(37, 32, 2, 4, positions=ALiBi, block=bare, norm=rms_norm)) == {}
    assert families.facts_of(Decoder(37, 32, 2, 4, block=bare)) == {}
    assert families.facts_of(TextEncoder(37, 32, 1, 4, causal=True)) == {}


# ---- tables


def test_parts_of_unequal_size_split_again():
    table = [Fuse("qkv", ("q", "k", "v"), (4, 1, 1))]
    state = {name: torch.randn(size, 3) for name, size in (("q", 8), ("k", 2), ("v", 2))}
    ours = rename(state, table)
    assert ours["qkv"].shape == (12, 3)
    assert all(torch.equal(value, state[key]) for key, value in rename(ours, table, back=True).items())
    with pytest.raises(UserError, match="proportion 4:1:1"):
        rename({"qkv": torch.zeros(10, 3)}, table, back=True)


def test_transposed_matrices_turn_back():
    table = [Transposed("fc.weight", "conv.weight")]
    state = {"conv.weight": torch.randn(2, 5)}
    assert rename(state, table)["fc.weight"].shape == (5, 2)
    assert torch.equal(rename(rename(state, table), table, back=True)["conv.weight"], state["conv.weight"])


# ---- transformers


@pytest.mark.parametrize("facts", ALL.values(), ids=ALL)
def test_a_folder_for_transformers_and_back(facts, tmp_path):
    pytest.importorskip("transformers")
    ours = model(facts)
    done = export.to_hf(ours, tmp_path)  # compares the outputs
    assert done.scale > 0.1 and done.difference < 1e-4
    again = text.build(f"hf:{tmp_path}")
    assert families.facts_of(again) == facts and same(again, ours)
    other = model(facts, seed=1)
    text.load(other, f"hf:{tmp_path}")
    assert same(other, ours)


def test_generation_goes_by_our_special_tokens(tmp_path):
    """transformers' defaults (2 ends a LLaMA's text) mean other tokens here."""
    transformers = pytest.importorskip("transformers")
    for name, facts, special in (
        ("llama", LLAMA, {}),
        ("gpt2", GPT2, {"eos": 5}),
        ("t5", T5, {"pad": 3, "decoder_start": 3, "eos": 4}),
    ):
        text_export.to_hf(model(facts), tmp_path / name, special=special)
        config = transformers.AutoConfig.from_pretrained(tmp_path / name)
        for role in ("pad", "bos", "eos"):
            assert getattr(config, f"{role}_token_id") == special.get(role), (name, role)
    assert config.decoder_start_token_id == 3


def test_a_comparison_fails_for_other_weights(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    original = text_export._state

    def scrambled(*args):
        state = original(*args)
        key = next(key for key in state if "wpe" in key)
        return state | {key: state[key].flip(0)}

    monkeypatch.setattr(text_export, "_state", scrambled)
    with pytest.raises(UserError, match="not exported"):
        export.to_hf(model(GPT2), tmp_path)


@pytest.mark.parametrize(
    ("heads", "cls"),
    [
        ((MaskedLMHead(32, 37),), "BertForMaskedLM"),
        ((PoolerHead(32, 3),), "BertForSequenceClassification"),
        ((PoolerHead(32, 2), MaskedLMHead(32, 37)), "BertForPreTraining"),
    ],
    ids=["masked", "classes", "both"],
)
def test_heads_of_bert_come_along(heads, cls, tmp_path):
    pytest.importorskip("transformers")
    for i, head in enumerate(heads):
        randomise(head, seed=i + 5).float()
    done = text_export.to_hf(model(BERT), tmp_path, heads=heads)
    assert cls in done.opened_by
    for head in heads:
        again = MaskedLMHead(32, 37) if isinstance(head, MaskedLMHead) else PoolerHead(32, head.out.out_features)
        text.load_head(again, f"hf:{tmp_path}")
        assert same(again, head)


def test_masked_words_go_on_with_the_head_that_belongs_to_the_encoder(tmp_path):
    transformers = pytest.importorskip("transformers")
    text_export.to_hf(model(BERT), tmp_path, heads=[randomise(MaskedLMHead(32, 37), seed=5).float()])
    encoder = text.build(f"hf:{tmp_path}")
    method = MaskedLM(encoder, head_weights=f"hf:{tmp_path}").eval()
    tokens = torch.randint(0, 37, (2, 9))
    labels = torch.where(torch.rand(2, 9) < 0.4, tokens, -100)
    labels[:, 0] = 1
    batch = {"tokens": tokens, "valid": torch.ones(2, 9, dtype=torch.bool), "labels": labels}
    theirs = transformers.BertForMaskedLM.from_pretrained(tmp_path).eval()
    assert gap(method.step(batch, 0.0).loss, theirs(tokens, labels=labels).loss) <= 1e-5


def test_an_encoder_without_that_head(tmp_path):
    pytest.importorskip("transformers")
    text_export.to_hf(model(BERT), tmp_path)
    with pytest.raises(UserError, match=r"does not fit this head: .*no dense\.weight there"):
        text.load_head(MaskedLMHead(32, 37), f"hf:{tmp_path}")


# ---- our own files


@pytest.mark.parametrize("facts", [*ALL.values(), TRANSFORMER], ids=[*ALL, "transformer"])
def test_a_file_of_ours_is_enough(facts, tmp_path):
    ours = model(facts)
    io.save(ours, tmp_path / "last.safetensors")
    assert same(io.build(tmp_path), ours)
    assert same(text.build(str(tmp_path)), ours)
    other = model(facts, seed=1)
    text.load(other, str(tmp_path / "last.safetensors"))
    assert same(other, ours)


@pytest.mark.parametrize(("facts", "part"), [(GPT2, "decoder"), (BERT, "encoder"), (T5, "model"), (T5, "")])
def test_a_checkpoint_of_a_method(facts, part, tmp_path, caplog):
    ours, other = model(facts), model(facts, seed=1)
    prefix = f"{part}." if part else ""
    state = {prefix + key: value for key, value in ours.state_dict().items()} | {"head.bias": torch.zeros(3)}
    torch.save({"state_dict": state if part else ours.state_dict()}, tmp_path / "last.ckpt")
    text.load(other, str(tmp_path / "last.ckpt"))
    assert "does not say its heads" in caplog.text
    assert same(other, ours)


def test_weights_at_construction(tmp_path):
    ours = model(GPT2)
    io.save(ours, tmp_path / "a.safetensors")
    given = families.arguments(GPT2) | {"weights": str(tmp_path / "a.safetensors")}
    assert same(Decoder(**given), ours)


# ---- mistakes


def saved(facts, folder):
    io.save(model(facts), folder / "a.safetensors")
    return str(folder / "a.safetensors")


@pytest.mark.parametrize(
    ("there", "changes", "words"),
    [
        (GPT2, {"max_length": 32}, "method.decoder.max_length=64"),
        (LLAMA, {"num_kv_heads": 4, "base": 1e4}, "positions.base=50000.0 method.decoder.block.num_kv_heads=2"),
        (LLAMA_3, {"scaling": None}, "positions.scaling.factor=8.0 method.decoder.positions.scaling.low=1.0"),
        (LLAMA, {"scaling": LLAMA3}, "method.decoder.positions.scaling=null"),
        (MISTRAL, {"window": None}, "method.decoder.window=4"),
        (BERT, {"depth": 3, "num_types": 2}, "method.encoder.depth=2 method.encoder.num_types=3"),
        (T5_V11, {"gated": False, "tied": True}, "method.model.tied=false method.model.block.gated=true"),
    ],
)
def test_another_architecture_says_what_to_set(there, changes, words, tmp_path):
    with pytest.raises(io.OtherArchitecture, match="does not fit this model") as error:
        text.load(model(there | changes), saved(there, tmp_path))
    assert words in str(error.value) and "\n" not in str(error.value)
    assert set(error.value.arguments) <= set(families.arguments(there))


def test_a_longer_context_is_no_other_architecture(tmp_path):
    longer = model(LLAMA | {"max_length": 256}, seed=1)
    text.load(longer, saved(LLAMA, tmp_path))
    assert longer.positions.max_length == 256


@pytest.mark.parametrize(("facts", "part"), [(GPT2, "decoder"), (BERT, "encoder"), (T5, "model")])
def test_another_vocabulary_asks_for_the_tokenizer(facts, part, tmp_path):
    """Not an `OtherArchitecture`, which a run would adopt: its tokenizer would go on making other tokens."""
    with pytest.raises(UserError, match=f"knows 37 tokens, this model 40: .*{part}.vocab_size=37") as error:
        text.load(model(facts | {"vocab_size": 40}), saved(facts, tmp_path))
    assert not isinstance(error.value, io.OtherArchitecture)


def test_another_recipe_says_so(tmp_path):
    with pytest.raises(io.OtherArchitecture, match=r"block\._target_=ssl_lab\.nn\.recipes\.llama_block"):
        text.load(model(GPT2), saved(LLAMA, tmp_path))


@pytest.mark.parametrize(
    ("method", "part", "backbone", "facts", "words"),
    [
        ("causal_lm", "decoder", "gpt", LLAMA, []),
        ("seq2seq", "model", "transformer_tiny", T5, ["method.start_token=0", "method.end_token=1"]),
    ],
)
def test_a_run_takes_the_recipe_of_its_weights(method, part, backbone, facts, words, tmp_path):
    """From the command line nobody repeats widths and blocks: they are entered, said, and fit the next time."""
    spec, said = saved(facts, tmp_path), []
    words = [f"method={method}", f"backbone@method.{part}={backbone}", f"method.{part}.vocab_size=37", *words]
    cfg = compose("train", [*words, "data=captions"], [conf_folder()])
    node = OmegaConf.create(OmegaConf.to_container(cfg.method, resolve=True))
    with open_dict(node):
        node[part].weights = spec
    built = getattr(build_method(node, 0, said.append), part)
    theirs = text.read(spec).state
    assert all(torch.equal(value, theirs[name]) for name, value in built.state_dict().items())
    assert said[0].startswith(f"{part}: ") and said[0].endswith(f"as in {spec}") and "_partial_" not in said[0]
    again = []
    assert build_method(node, 0, again.append) and not again


def test_another_kind_of_model(tmp_path):
    with pytest.raises(UserError, match="a bert, which is a TextEncoder, not a Decoder"):
        text.load(model(GPT2), saved(BERT, tmp_path))


def test_files_that_are_no_language_model(tmp_path):
    with pytest.raises(UserError, match="neither a file"):
        text.read(str(tmp_path / "none.safetensors"))
    save_file({"blocks.0.attn.fn.qkv.weight": torch.zeros(3, 3)}, tmp_path / "vit.safetensors")
    with pytest.raises(UserError, match="no language model of ours"):
        text.read(str(tmp_path / "vit.safetensors"))
    save_file(dict(model(GPT2).state_dict()), tmp_path / "bare.safetensors")
    with pytest.raises(UserError, match="does not say what it is"):
        text.build(str(tmp_path / "bare.safetensors"))
    text.load(model(GPT2, seed=1), str(tmp_path / "bare.safetensors"))
    with pytest.raises(UserError, match=r"does not fit this model: .* choose another backbone"):
        text.load(model(GPT2 | {"hidden": 40}), str(tmp_path / "bare.safetensors"))


SCALED = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "gpt2", "activation_function": "relu"}, "its activation is relu"),
        ({"model_type": "bert", "hidden_act": "relu"}, "its activation is relu"),
        ({"model_type": "llama", "attention_bias": True}, "it has biases"),
        ({"model_type": "llama", "rope_parameters": DYNAMIC}, r"scaled in a way that ours are not \(dynamic\)"),
        ({"model_type": "t5", "feed_forward_proj": "gated-silu"}, "its activation is silu"),
        ({"model_type": "xlnet"}, "'xlnet'; a language model takes bert, gpt2, llama"),
    ],
)
def test_what_our_models_cannot_express(config, message, tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        text.read(f"hf:{tmp_path}")


def test_tensors_that_are_missing(tmp_path):
    transformers = pytest.importorskip("transformers")
    export.to_hf(model(LLAMA), tmp_path)
    state = transformers.LlamaForCausalLM.from_pretrained(tmp_path).state_dict()
    state.pop("model.layers.1.self_attn.k_proj.weight")
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lack 'layers.1.self_attn.k_proj.weight' \(1 missing\)"):
        text.read(f"hf:{tmp_path}")
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match="cannot be read"):
        text.read(f"hf:{tmp_path}")
