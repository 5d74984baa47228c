"""Spoken captions: voices, which caption is said, three towers that learn, and retrieval between each two of them."""

import copy
import importlib.util

import pytest
import torch
import torch.nn.functional as F

from ssl_lab.cli.catalog import conf_folder
from ssl_lab.cli.compose import build, compose
from ssl_lab.cli.main import main
from ssl_lab.data.audio_views import WholeAudio
from ssl_lab.data.pair_views import PairViews
from ssl_lab.data.pairs_shapes import ShapesPairs
from ssl_lab.data.pairs_tokenizer import trained
from ssl_lab.data.shapes import Shapes
from ssl_lab.data.speech_synth import Espeak, ToneVoice
from ssl_lab.data.speech_synth_pairs import Spoken, SpokenPairs, SpokenViews
from ssl_lab.data.views import Resize
from ssl_lab.errors import UserError
from ssl_lab.evals.cross_retrieval import CrossRetrieval
from ssl_lab.evals.runner import run_all
from ssl_lab.losses.pairs import clip_loss
from ssl_lab.methods.clip import CLIP

RATE = 8000
HERE = importlib.util.find_spec("espeakng_loader") is not None and importlib.util.find_spec("soxr") is not None
needs_voice = pytest.mark.skipif(not HERE, reason="espeakng-loader or soxr is not installed")
TONES = "{_target_: ssl_lab.data.speech_synth.ToneVoice, voices: 2}"
TOWERS = [
    *(f"method.{tower}.backbone.{key}" for tower in ("image", "text", "others.audio")
      for key in ("dim=32", "depth=1", "num_heads=2")),
    *(f"method.{tower}.embed_dim=16" for tower in ("image", "text", "others.audio")),
    "method.others.audio.backbone.stem.channels=8",
]  # fmt: skip
SIZE = ["data.train.source.length=48", "data.test.source.length=24", "data.batch_size=8"]


@pytest.fixture(scope="module")
def tokenizer():
    return trained("shapes", vocab_size=300)


def source(tokenizer, length=12, **more):
    return SpokenPairs(ShapesPairs("train", length, tokenizer), ToneVoice(2), sampling_rate=RATE, **more)


def views(draw):
    return SpokenViews(PairViews(Resize(32), caption="first"), WholeAudio(RATE), draw=draw)


def test_a_row_says_its_own_captions(tokenizer):
    spoken = source(tokenizer, captions=2)
    samples = spoken.read([3, 0])
    assert isinstance(samples.data, Spoken) and len(samples.data.clips) == 2
    texts = [caption for row in (3, 0) for caption in spoken.captions([row])[0][:2]]
    expected = [clip for own in ToneVoice(2).say(texts, RATE) for clip in own]
    found = [clip for row in samples.data.clips for clip in row]
    assert len(found) == 8 and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert spoken.spoken([3]) == [spoken.captions([3])[0][:2]]
    assert spoken.tokenizer is tokenizer and spoken.templates == ShapesPairs.templates  # as the source has them
    assert copy.deepcopy(spoken).read([1]).rows.tolist() == [1]


def test_views_draw_by_position_and_evaluation_takes_the_first(tokenizer):
    spoken = source(tokenizer, captions=None)
    data, position = spoken.read(range(12)).data, torch.arange(12)
    first = views(draw=False)(data, position, 0)
    assert {"image", "tokens", "valid", "audio", "audio_valid"} == set(first)
    for row, clips in enumerate(data.clips):
        heard = first["audio"][row][first["audio_valid"][row]]
        torch.testing.assert_close(heard[: len(clips[0])], clips[0].float() / 32768)
    drawn = views(draw=True)
    a, b = drawn(data, position, 5), drawn(data, position, 5)
    assert torch.equal(a["audio"], b["audio"]) and torch.equal(a["tokens"], first["tokens"])
    other = drawn(data, position + 100, 5)
    assert a["audio"].shape != other["audio"].shape or not torch.equal(a["audio"], other["audio"])
    lengths = a["audio_valid"].sum(1).tolist()
    assert any(x != y for x, y in zip(lengths, first["audio_valid"].sum(1).tolist(), strict=True))


def test_tones_tell_words_apart_and_nothing_is_empty():
    one, other, empty = (clips[0] for clips in ToneVoice().say(["red star", "star red", ""], RATE))
    assert len(one) == len(other) == 1920 and not torch.equal(one, other)
    assert len(empty) == 800 and not empty.any() and one.dtype == torch.int16
    assert torch.equal(one[:960], other[960:])


@needs_voice
def test_espeak_says_a_list_alike_each_time():
    texts = ["a large red star", "there is a big green square", "?!"]
    voice = Espeak(["en-us", "en-us+f3"])
    a, b = voice.say(texts, RATE), voice.say(texts, RATE)
    assert all(torch.equal(x, y) for one, two in zip(a, b, strict=True) for x, y in zip(one, two, strict=True))
    assert [len(clips) for clips in a] == [2, 2, 2] and not torch.equal(a[0][0], a[0][1])
    assert all(0.5 * RATE < len(clip) < 4 * RATE for clips in a[:2] for clip in clips)
    assert a[0][0].abs().max() > 1000 and all(len(clip) == 800 and not clip.any() for clip in a[2])
    slow = Espeak(["en-us"], speed=100).say(texts[:1], RATE)
    assert len(slow[0][0]) > 1.3 * len(a[0][0])
    with pytest.raises(UserError, match="no voice 'xx-none'"):
        Espeak(["xx-none"]).say(texts, RATE)


def test_mistakes_say_what_to_do(tokenizer, monkeypatch):
    with pytest.raises(UserError, match="leaves nobody"):
        Espeak([])
    with pytest.raises(UserError, match="words in a minute"):
        Espeak(speed=0)
    with pytest.raises(UserError, match="without"):
        SpokenPairs(Shapes("train", 4), ToneVoice())
    with pytest.raises(UserError, match="captions=0"):
        source(tokenizer, captions=0)
    with pytest.raises(UserError, match="too many to be spoken"):
        source(tokenizer, captions=None, most=3).read([0])
    with pytest.raises(UserError, match="shapes_spoken"):
        views(draw=True)(ShapesPairs("train", 2, tokenizer).read([0]).data, torch.arange(1), 0)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'ssl-lab\[speech\]'"):
        Espeak().say(["a"], RATE)


def built():
    words = ["experiment=clip_shapes_spoken", f"data.train.voice={TONES}", *TOWERS, *SIZE]
    return compose("train", words, [conf_folder()])


def test_three_towers_learn_and_each_two_are_judged(tokenizer):
    cfg = built()
    data = build(cfg.data)
    cfg.method.text.backbone.vocab_size = data.tokenizer.vocab_size
    torch.manual_seed(0)
    method = build(cfg.method)
    assert isinstance(method, CLIP) and method.others == ("audio",)
    batch = next(iter(data.train_dataloader()))
    z = [method.eval().project(name, batch) for name in ("image", "text", "audio")]
    pairs = [clip_loss([z[a], z[b]], method.logit_scale.exp()) for a, b in ((0, 1), (0, 2), (1, 2))]
    torch.testing.assert_close(method.step(batch, 0.5).loss, sum(pairs) / 3)
    method.train().step(batch, 0.5).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in method.towers["audio"].parameters())
    rows = run_all({"cross_retrieval": CrossRetrieval(at=(1, 24))}, method, data, say=str)
    values = {row.name: row.value for row in rows}
    for name in ("image", "text", "image_by_audio", "audio_by_image", "audio_by_text", "text_by_audio"):
        assert 0 <= values[f"{name}_1"] <= 100
    assert values["image_by_audio_24"] == values["audio_by_image_24"] == values["audio_by_text_24"] == 100
    assert values["chance/image_by_audio_1"] == pytest.approx(100 / 24)


class Knows(torch.nn.Module):
    """Puts images and sounds of a row at one place, and texts where their words say."""

    others = ("audio",)

    def __init__(self, data):
        super().__init__()
        self.scale, self.data = torch.nn.Parameter(torch.ones(1)), data
        spoken = [own[0] for own in data.test.spoken(range(len(data.test)))]
        self.known = {text: i for i, text in enumerate(dict.fromkeys(spoken))}
        self.first = spoken

    def place(self, texts):
        return F.one_hot(torch.tensor([self.known.get(text, len(self.known)) for text in texts]), 64).float()

    def embed_image(self, batch):
        return self.place([self.first[i] for i in batch["index"]])

    def embed_other(self, name, batch):
        return self.embed_image(batch)

    def embed_text(self, batch):
        decode = self.data.tokenizer.decode
        return self.place(
            [decode(row[valid]).strip() for row, valid in zip(batch["tokens"], batch["valid"], strict=True)]
        )


def test_captions_with_the_same_words_stand_for_each_other():
    data = build(built().data)
    for identical in (False, True):
        evaluator = CrossRetrieval(at=(1,), identical=identical, max_captions=1)
        found = {r.name: r.value for r in run_all({"c": evaluator}, Knows(data), data, say=str)}
        alike = len(set(Knows(data).first)) < 24
        assert (found["image_by_audio_1"] == 100) == (identical or not alike)
        assert (found["text_by_audio_1"] == 100) == (identical or not alike)


def test_a_run_of_three_towers_goes_from_start_to_pictures(tmp_path, capsys):
    words = ["experiment=clip_shapes_spoken", f"data.train.voice={TONES}", *TOWERS, *SIZE]
    more = ["duration=2steps", "trainer.enable_progress_bar=false", "eval=[cross_retrieval]", "trainer.accelerator=cpu"]
    assert main([*words, *more, f"out={tmp_path / 'run'}"]) == 0, capsys.readouterr().err
    assert "image_by_audio" in (tmp_path / "run/metrics.json").read_text()
