"""A model that listens: sound in the slot of the pictures, questions about it, answers that depend on it."""

import functools

import pytest
import torch
from test_vlm import small

from ssl_lab.backbones.conformer import Conformer
from ssl_lab.backbones.decoder import Decoder
from ssl_lab.backbones.vlm import VisionLanguage
from ssl_lab.cli.catalog import conf_folder
from ssl_lab.cli.compose import compose
from ssl_lab.cli.partner import Conversation, Partner
from ssl_lab.data.audio_joined import Joined
from ssl_lab.data.conversation_sound import SoundViews, trained, words
from ssl_lab.data.conversation_text import ConversationEncoder
from ssl_lab.data.conversation_tokenizer import with_marker
from ssl_lab.data.conversation_views import ConversationViews
from ssl_lab.data.source import Samples
from ssl_lab.data.tones import Tones
from ssl_lab.errors import UserError
from ssl_lab.evals.base import Round
from ssl_lab.evals.vqa import VQA, Looks
from ssl_lab.generation.generate import GREEDY
from ssl_lab.methods.llava import LLaVA
from ssl_lab.nn.connectors import MLPConnector
from ssl_lab.nn.conv import ConvSubsampling
from ssl_lab.nn.mel import LogMel
from ssl_lab.nn.positions import Rotary
from ssl_lab.nn.recipes import llama_block, rms_norm
from ssl_lab.train.optim import Optim

RATE, SECONDS, NAMES = 8000, 0.4, ("low", "middle", "high")


class Whistles:
    """Words told apart by their pitch alone."""

    unit, sampling_rate, classes = "whistles", RATE, list(NAMES)

    def __len__(self):
        return 48

    def transcripts(self, rows):
        return [NAMES[row % 3] for row in rows]

    def read(self, rows):
        time = torch.arange(int(0.3 * RATE)) / RATE
        clips = [torch.sin(6.28 * (300 * 3 ** (row % 3) * (1 + 0.01 * (row % 7))) * time) * 0.3 for row in rows]
        return Samples(clips, torch.tensor([row % 3 for row in rows]), torch.tensor(rows))


def encoder(source):
    return ConversationEncoder(with_marker(trained(source, vocab_size=300), marker="<audio>"), max_length=32)


VIEWS = ConversationViews(SoundViews(RATE, SECONDS))


class Data:
    """What evaluators ask of a data module."""

    classes = ()

    def __init__(self, source, **more):
        self.train = self.test = words(source, encoder(source), **more)
        self.tokenizer = self.test.tokenizer

    def eval_loader(self, split, limit=None):
        samples = self.test.read(range(24))
        batch = VIEWS(samples.data, torch.arange(24), 0)
        yield batch | {"target": samples.targets, "index": samples.rows}


def ears(tokenizer):
    torch.manual_seed(0)
    conformer = Conformer(
        32, 1, 2, front=LogMel(RATE, num_mels=20), stem=functools.partial(ConvSubsampling, channels=16)
    )
    decoder = Decoder(tokenizer.vocab_size, 32, 2, 2, max_length=64, positions=Rotary, block=llama_block, norm=rms_norm)
    marker = tokenizer.backend.token_to_id("<audio>")
    return VisionLanguage(conformer, MLPConnector, decoder, image_token=marker, layer=None)


def test_a_clip_without_words_cannot_be_asked_about():
    class Silent(Whistles):
        def transcripts(self, rows):
            return ["" if row == 2 else "low" for row in rows]

    with pytest.raises(UserError, match="clip 2 has neither a transcript nor a class"):
        words(Silent(), encoder(Whistles()))


def test_it_learns_to_say_what_it_hears_and_not_what_it_does_not():
    data = Data(Whistles(), kinds=["said"])
    method = LLaVA(ears(data.tokenizer), train=["vision", "connector", "decoder"]).train()
    optimizer = Optim(lr=3e-3, warmup=0.0, weight_decay=0.0).build(method.param_groups(), 12)
    for step in range(60):
        rows = [(12 * step + i) % 48 for i in range(12)]
        loss = method.step(VIEWS(data.train.read(rows).data, torch.tensor(rows), 0), 0.5).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    round = Round(method.eval(), data)
    found, looks = VQA(max_tokens=6).run(round), Looks().run(round)
    assert found["accuracy"] == 100 and found["question_only"] < 40
    assert looks["right"] < 0.5 and looks["gain"] > 1 and looks["none"] > looks["right"] + 0.5, looks


def test_every_clip_becomes_as_many_tokens_and_stands_at_its_marker():
    data = Data(Whistles(), kinds=["said", "presence"], turns=None)
    batch = VIEWS(data.train.read([0, 1]).data, torch.arange(2), 0)
    assert batch["images"].shape == (2, int(RATE * SECONDS)) and batch["image_rows"].tolist() == [0, 1]
    model = ears(data.tokenizer).eval()
    with torch.no_grad():
        seen = model.see(batch["images"])
        x = model.splice(batch["tokens"], seen, valid=batch["valid"])
    assert seen.shape[:2] == (2, 8) and x.embedded.shape[1] == batch["tokens"].shape[1] + 7
    silent = batch["tokens"].masked_fill(batch["tokens"] == model.image_token, 1)
    model.train()
    model(silent, torch.zeros(0, 3200))[0].tokens.sum().backward()  # no clip in the batch, and the connector waits
    assert all(p.grad is not None and not p.grad.any() for p in model.connector.parameters())
    assert small().patches(torch.zeros(1, 3, 32, 32)).shape[0] == 1


def test_questions_about_words():
    source = Joined(Tones("train", 200, snr=None), 300, words=(1, 3), pause=(0.05, 0.1))
    found = words(source, encoder(source), turns=None)
    said = source.transcripts(range(300))
    answers = {"yes": 0, "no": 0}
    for row, one in enumerate(found.dialogues):
        spoken, marker = said[row].split(), found.encode.marker
        first = next(m["content"] for m in one.messages)
        assert first.startswith(f"{marker}\n") and first.count(marker) == 1 and one.images == (row,)
        told = {q["content"].replace(f"{marker}\n", ""): a["content"] for q, a in zip(*[iter(one.messages)] * 2)}
        assert told["what is said?"] == said[row] and told["how many words are said?"] == str(len(spoken))
        assert told["what is the first word?"] == spoken[0] and told["what is the last word?"] == spoken[-1]
        (asked,) = [q for q in told if q.startswith("is ")]
        assert (asked.split()[1] in spoken) == (told[asked] == "yes")
        answers[told[asked]] += 1
    assert 0.4 < answers["yes"] / 300 < 0.6
    again = words(source, encoder(source), turns=None)
    assert again.dialogues == found.dialogues and again.sampling_rate == RATE
    with pytest.raises(UserError, match="kinds=loud"):
        words(source, found.encode, kinds=["loud"])


def test_the_experiments_say_what_they_hear():
    for name, more in (("llava_tones", []), ("llava_digits", ["data.path=/digits"])):
        cfg = compose("train", [f"experiment={name}", *more], [conf_folder()])
        assert cfg.method.model.vision._target_.endswith("Conformer") and cfg.method.model.layer is None
        assert cfg.data.views.image.seconds == cfg.data.eval_views.image.seconds == 3.0


def test_a_recording_is_asked_about_in_the_terminal(tmp_path):
    soundfile = pytest.importorskip("soundfile", reason="pip install 'ssl-lab[audio]'")
    data = Data(Whistles(), kinds=["said"])
    talk = Conversation(Partner(ears(data.tokenizer).eval(), data.train.encode, SoundViews(RATE, SECONDS)), GREEDY, 3)
    clip = Whistles().read([1]).data[0]
    soundfile.write(tmp_path / "a.wav", clip.numpy(), RATE, subtype="FLOAT")
    talk.show([str(tmp_path / "a.wav")])
    assert torch.equal(talk.pictures[0], clip) and talk.visual.shape == (1, 8, 32)
    assert isinstance("".join(talk.ask("what is said?")), str) and len(talk.messages) == 2
    (tmp_path / "b.wav").write_bytes(b"no sound")
    with pytest.raises(UserError, match=r"b.wav cannot be read"):
        talk.show([str(tmp_path / "b.wav")])
    with pytest.raises(UserError, match="give a recording"):
        talk.show([str(tmp_path / "c.wav")])
