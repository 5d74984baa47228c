"""`ssl-lab generate` from the command line: text from runs and imported weights, mistakes in one line."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from ssl_lab.cli.generate import _speaker
from ssl_lab.cli.main import main
from ssl_lab.cli.overrides import parse
from ssl_lab.cli.starting import start_of
from ssl_lab.data import tokenizer as tokenizers
from ssl_lab.generation.generate import generate
from ssl_lab.generation.sampling import Sampling
from ssl_lab.train import checkpoint
from ssl_lab.weights import text

SMALL = ["depth=1", "dim=32", "num_heads=2"]
FAST = ["duration=3steps", "data.batch_size=4", "data.num_workers=0", "trainer.enable_progress_bar=false", "eval=[]"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A decoder whose averaged weights are far from those that train on."""
    out = tmp_path_factory.mktemp("generate") / "run"
    words = [f"method.decoder.{word}" for word in SMALL]
    assert main(["method=causal_lm", *words, *FAST, "ema=0.9", "optim.lr=0.05", f"out={out}"]) == 0
    return out


@pytest.fixture(scope="module")
def translator(tmp_path_factory):
    out = tmp_path_factory.mktemp("generate") / "seq2seq"
    assert main(["method=seq2seq", *(f"method.model.{word}" for word in SMALL), *FAST, f"out={out}"]) == 0
    return out


def said(capsys, *words):
    capsys.readouterr()
    assert main(["generate", *words]) == 0, capsys.readouterr().err
    return capsys.readouterr()


def refused(capsys, *words):
    capsys.readouterr()
    assert main(["generate", *words]) == 2
    told = capsys.readouterr()
    assert not told.out and told.err.count("\n") == 1
    return told.err


def test_a_run_speaks_with_its_averaged_weights(trained, capsys):
    told = said(capsys, f"ckpt={trained}", "prompt=a small red", "max_new_tokens=12", "temperature=0.7", "top_k=20")
    assert re.fullmatch(r"\d+ tokens, [\d,.]+ tokens/s\n", told.err)
    tokenizer, decoder = tokenizers.load(trained), text.build(str(trained / "last.safetensors"))
    state = checkpoint.read(checkpoint.find(trained))["state_dict"]
    decoder.load_state_dict({name.removeprefix("decoder."): value for name, value in state.items()})
    ids = tokenizer.encode("a small red")
    new = generate(decoder, [ids], max_new_tokens=12, eos=tokenizer.eos, sampling=Sampling(0.7, 20))[0].tolist()
    new = new[: new.index(tokenizer.eos)] if tokenizer.eos in new else new
    assert told.out == tokenizer.decode([*ids, *new]) + "\n"
    assert told.err.startswith(f"{len(new)} tokens")


def test_a_seed_repeats_a_text_and_greedy_needs_none(trained, capsys):
    words = [f"ckpt={trained / 'checkpoints'}", "prompt=the", "max_new_tokens=30"]
    drawn = [said(capsys, *words, "temperature=1", f"seed={seed}").out for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    greedy = [said(capsys, *words, "temperature=0", f"seed={seed}").out for seed in (1, 2)]
    assert greedy[0] == greedy[1] and greedy[0].startswith("the")


def test_echo_beams_precision_and_plain_weights(trained, capsys):
    words = ["prompt=the", "max_new_tokens=8"]
    whole = said(capsys, f"ckpt={trained}", *words, "num_beams=3").out
    assert "the" + said(capsys, f"ckpt={trained}", *words, "num_beams=3", "echo=false").out == whole
    assert said(capsys, f"ckpt={trained / 'last.safetensors'}", *words, "num_beams=3").out == whole
    assert said(capsys, f"ckpt={trained}", *words, "precision=bf16-true").out.startswith("the")
    default = said(capsys, f"ckpt={trained}", "prompt=the", "temperature=0", "min_new_tokens=100")
    assert default.err.startswith("100 tokens")


def test_a_translator_answers(translator, capsys):
    words = [f"ckpt={translator}", "prompt=a small red circle", "temperature=0"]
    for more in ("num_beams=1", "num_beams=3"):
        told = said(capsys, *words, more)
        assert "small red circle" not in told.out and re.match(r"\d+ tokens", told.err)


def test_a_decoder_beside_an_encoder_starts_as_it_was_trained(translator, tmp_path):
    def start(spec):
        return _speaker(OmegaConf.create({"ckpt": str(spec), "tokenizer": None, "trust": []})).start

    run, alone, words = tmp_path / "run", tmp_path / "alone", tokenizers.load(translator)
    shutil.copytree(translator, run, ignore=shutil.ignore_patterns("checkpoints"))
    config = OmegaConf.load(run / "config.yaml")
    assert config.method.start_token == start_of(words) == start(run / "last.safetensors")
    config.method.start_token = 5
    OmegaConf.save(config, run / "config.yaml")
    assert start(run / "last.safetensors") == 5
    alone.mkdir()
    for file in (run / "last.safetensors", *run.glob("tokenizer*")):
        shutil.copy(file, alone)
    assert start(alone / "last.safetensors") == start_of(words)
    assert [start_of(SimpleNamespace(pad=p, bos=b, eos=9)) for p, b in ((7, 8), (None, 8), (None, None))] == [7, 8, 9]

    transformers = pytest.importorskip("transformers")
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    t5 = transformers.T5Config(vocab_size=words.vocab_size, **sizes, pad_token_id=0, decoder_start_token_id=6)
    transformers.T5ForConditionalGeneration(t5).save_pretrained(alone)
    assert start(f"hf:{alone}") == 6


def test_transformers_folders_speak(trained, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    size = tokenizers.load(trained).vocab_size
    config = transformers.GPT2Config(
        vocab_size=size + 6, n_embd=32, n_head=2, n_layer=1, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "hf")
    for file in trained.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "hf")
    (tmp_path / "hf/chat_template.jinja").write_text("{{ messages[0].content }} over {{ messages[-1].content }} ")
    words = [f"ckpt=hf:{tmp_path / 'hf'}", "temperature=0", "max_new_tokens=5"]
    assert said(capsys, *words, "prompt=red").out.startswith("red")
    chat = said(capsys, *words, "prompt=red", "system=a small", "chat=true").out
    assert chat == said(capsys, *words, "prompt=a small over red ", "echo=false").out
    assert "chat=false" in refused(capsys, f"ckpt={trained}", "prompt=a", "chat=true")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ckpt=nowhere", "prompt=a"], "ckpt=nowhere does not exist"),
        (["ckpt=gguf:nowhere.gguf", "prompt=a"], "nowhere.gguf"),
        (["prompt=a"], "ckpt is not given"),
        (["ckpt={run}"], "prompt is empty"),
        (["ckpt={run}", "prompt=a red", "max_new_tokens=1000"], "at most max_new_tokens=123"),
        (["ckpt={run}", f"prompt={'red ' * 200}"], "context holds 128"),
        (["ckpt={run}", "prompt=a", "top_p=2"], "top_p=2"),
        (["ckpt={run}", "prompt=a", "precision=8"], "precision=8"),
        (["ckpt={run}", "prompt=a", "device=abacus"], "device=abacus"),
        (["ckpt={run}", "prompt=a ${b}"], "reference"),
    ],
)
def test_mistakes(trained, capsys, words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *(word.replace("{run}", str(trained)) for word in words))


def test_what_is_no_speaker(trained, translator, tmp_path, capsys):
    run = shutil.copytree(trained, tmp_path / "run", symlinks=True)
    (run / "tokenizer.json").unlink()
    assert "no tokenizer.json" in refused(capsys, f"ckpt={run}", "prompt=a")
    shutil.copy(translator / "tokenizer.json", run / "tokenizer.json")
    assert "do not belong together" in refused(capsys, f"ckpt={run}", "prompt=a")
    assert said(capsys, f"ckpt={run}", "prompt=a", f"tokenizer={trained}").out.startswith("a")
    config = (run / "config.yaml").read_text().replace("causal_lm.CausalLM", "mae.MAE")
    (run / "config.yaml").write_text(config)
    assert main(["generate", f"ckpt={run}", "prompt=a"]) == 2
    shutil.rmtree(run / "checkpoints")
    (run / "config.yaml").write_text((trained / "config.yaml").read_text())
    assert "no checkpoint yet" in refused(capsys, f"ckpt={run}", "prompt=a", f"tokenizer={trained}")


def test_vision_runs_write_no_text(tmp_path, capsys):
    method = "_target_: ssl_lab.methods.supervised.Supervised\n  num_classes: 2\n  encoder:\n"
    encoder = (
        "    _target_: ssl_lab.backbones.vit.ViT\n    dim: 8\n    depth: 1\n    num_heads: 2\n    image_size: 16\n"
    )
    (tmp_path / "config.yaml").write_text(f"method:\n  {method}{encoder}")
    assert "writes no text" in refused(capsys, f"ckpt={tmp_path}", "prompt=a")


@pytest.mark.parametrize(
    "sentence", ['say "hi", \\n (why?): a=b', "42", "null", "it's [1, 2]", "ends in \\", '\\"', ""]
)
def test_sentences_are_taken_as_they_are(sentence):
    assert parse(f"prompt={sentence}", []).value() == sentence


def test_weights_with_another_tokenizer_of_the_same_size_are_refused(trained, tmp_path, capsys):
    known = json.loads((trained / "tokenizer.json").read_text())
    vocab = known["model"]["vocab"]
    vocab["a"], vocab["e"] = vocab["e"], vocab["a"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other/tokenizer.json").write_text(json.dumps(known))
    small = [f"method.decoder.{word}" for word in SMALL]
    words = ["method=causal_lm", *small, *FAST, f"method.decoder.weights={trained}", f"out={tmp_path / 'run'}"]
    assert main([*words, f"data.tokenizer={tmp_path / 'other'}"]) == 2
    assert f"set data.tokenizer={trained}" in capsys.readouterr().err
    assert main([*words, f"data.tokenizer={trained}"]) == 0
