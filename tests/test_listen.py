"""Recordings of any length, and language models: words at known times, chunks like the whole, n-grams by hand."""

import gzip
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ssl_lab.backbones.decoder import Decoder
from ssl_lab.data.audio_tokenizer import trained
from ssl_lab.data.tokenizer import Tokenizer
from ssl_lab.data.tokenizer_train import train
from ssl_lab.errors import UserError
from ssl_lab.generation.chunks import at_pauses, in_chunks
from ssl_lab.generation.ctc import CTCBeam, beam_search, greedy
from ssl_lab.generation.listen import Recogniser
from ssl_lab.generation.ngram import DecoderScore, NGram, WordScore, read_arpa

RATE, STEP, HOP = 8000, 320, 80  # Hz; samples of a token and of a frame
TOKENIZER = trained("tones")


class Told(nn.Module):
    """Hears a tone of 200 + 50 x token Hz as that token, 40 ms at a time, as a Conformer's tokens lie; else a blank."""

    blank = 0

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.encoder = SimpleNamespace(seconds=STEP / RATE)
        self.lengths = []

    def emissions(self, batch):
        audio = batch["audio"]
        self.lengths.append(audio.shape[1])
        windows = audio.unfold(1, 6 * HOP + 200, STEP)[..., 40:440]  # token t: the frames 4 t ... 4 t + 6
        at = torch.arange(400) / RATE
        tones = 200 + 50 * torch.arange(TOKENIZER.vocab_size)
        waves = torch.exp(-2j * math.pi * tones[:, None] * at)
        power = (windows.to(waves.dtype) @ waves.T).abs() / 200
        scores = torch.where(power > 0.15, 30 * power, 0.0)
        scores[..., 0] = 3.0
        return scores.log_softmax(-1), torch.tensor([windows.shape[1]])


def spelled(words, at):
    """The words as tones of 80 ms, word i from second at[i] on."""
    audio = torch.zeros(round((max(at) + 1.5) * RATE))
    times = []
    for word, start in zip(words, at, strict=True):
        first = round(start * RATE)
        for k, token in enumerate(TOKENIZER.encode(f" {word}" if word != words[0] else word)):
            tone = torch.sin(2 * math.pi * (200 + 50 * token) * torch.arange(640) / RATE)
            audio[first + 640 * k : first + 640 * (k + 1)] = 0.5 * tone
        letters = len(TOKENIZER.encode(word))
        begin = start + (0.08 if word != words[0] else 0.0)  # the blank before it is a tone too
        times.append((begin, begin + 0.08 * letters))
    return audio, times


WORDS, AT = ["rise", "hum", "peak", "dip", "chime"], [0.1, 0.9, 1.7, 3.0, 3.9]


@pytest.mark.parametrize("more", [{}, {"beam": CTCBeam(4)}, {"chunk": 2.0, "overlap": 1.0}], ids=str)
def test_words_are_where_they_were_said(more):
    audio, times = spelled(WORDS, AT)
    found = Recogniser(Told(), TOKENIZER, RATE, **more).words(audio)
    assert [word.text for word in found] == WORDS
    for word, (start, end) in zip(found, times, strict=True):
        assert abs(word.start - start) <= 0.06 and abs(word.end - end) <= 0.06  # frames are 40 ms apart


def test_ten_minutes_in_chunks_say_what_they_say_as_a_whole():
    audio, _ = spelled(WORDS, AT)
    long = torch.cat([audio[: round(5.13 * RATE)]] * 117)
    assert 595 < len(long) / RATE < 605
    model = Told()
    by_chunks = Recogniser(model, TOKENIZER, RATE).words(long)
    assert max(model.lengths) <= 20 * RATE and len(model.lengths) > 30
    assert by_chunks == Recogniser(model, TOKENIZER, RATE, chunk=700).words(long)
    assert len(by_chunks) >= 117 * 4


def test_silence_and_what_is_shorter_than_a_frame_say_nothing():
    for seconds in (0.001, 0.05, 30):
        recogniser = Recogniser(Loud(), TOKENIZER, RATE)
        assert recogniser.text(torch.zeros(round(seconds * RATE))) == ""
        assert recogniser.words(torch.zeros(round(seconds * RATE))) == []


class Loud(Told):
    """Writes something for anything at all."""

    def emissions(self, batch):
        log_probs, frames = super().emissions(batch)
        log_probs[..., 3] = 1.0
        return log_probs.log_softmax(-1), frames


def test_values_that_are_no_numbers_are_told():
    class Broken(Told):
        def emissions(self, batch):
            log_probs, frames = super().emissions(batch)
            return log_probs * math.nan, frames

    with pytest.raises(UserError, match="no numbers"):
        Recogniser(Broken(), TOKENIZER, RATE).text(spelled(["hum"], [0.1])[0])


class Writes(nn.Module):
    """Without frames: a letter for each half second of sound, by its loudest half second."""

    def __init__(self):
        super().__init__()
        self.weight, self.heard = nn.Parameter(torch.zeros(1)), []

    def transcribe(self, batch, *, num_beams=1):
        self.heard.append(batch["audio"].shape[1] / RATE)
        return [TOKENIZER.encode("hum")]


def test_a_method_without_frames_hears_from_pause_to_pause():
    audio = torch.cat([torch.cat([torch.ones(RATE * 3) * 0.5, torch.zeros(RATE // 4)]) for _ in range(4)])
    audio[1::2] *= -1
    model = Writes()
    assert Recogniser(model, TOKENIZER, RATE, chunk=5.0).text(audio) == "hum hum hum hum"
    cuts = list(itertools.accumulate(model.heard))
    assert all(3.0 <= second % 3.25 <= 3.25 or second == pytest.approx(13.0) for second in cuts)
    assert Recogniser(Writes(), TOKENIZER, RATE).text(torch.zeros(RATE)) == ""


def test_cuts_cover_everything_and_are_short_enough():
    audio = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    audio[1700:1790] = 0
    parts = at_pauses(audio, 2000, 50)
    assert parts[0] == (0, pytest.approx(1745, abs=25)) and parts[-1][1] == 10_000
    assert all(a[1] == b[0] for a, b in itertools.pairwise(parts))
    assert all(0 < end - start <= 2000 for start, end in parts)
    assert at_pauses(audio[:100], 100, 10) == [(0, 100)]


ARPA = """\\data\\
ngram 1=5
ngram 2=3

\\1-grams:
-1.0\t<unk>
-99\t<s>\t-0.3
-0.6\thum\t-0.2
-0.9\trise\t-0.1
-1.2\t</s>

\\2-grams:
-0.1\t<s> hum
-0.5\thum rise
-2.0\thum hum

\\end\\
"""


@pytest.fixture
def arpa(tmp_path):
    (tmp_path / "words.arpa").write_text(ARPA)
    return tmp_path / "words.arpa"


def test_an_ngram_backs_off(arpa, tmp_path):
    model, ten = read_arpa(arpa), math.log(10)
    assert model.order == 2
    assert model.log_prob(["<s>"], "hum") == pytest.approx(-0.1 * ten)
    assert model.log_prob(["rise", "hum"], "rise") == pytest.approx(-0.5 * ten)  # the last word of the history counts
    assert model.log_prob(["rise"], "hum") == pytest.approx((-0.1 - 0.6) * ten)
    assert model.log_prob(["hum"], "chime") == pytest.approx((-0.2 - 1.0) * ten)  # unknown
    assert model.log_prob([], "rise") == pytest.approx(-0.9 * ten)
    with gzip.open(tmp_path / "words.arpa.gz", "wt") as file:
        file.write(ARPA)
    assert read_arpa(tmp_path / "words.arpa.gz").entries == model.entries


@pytest.mark.parametrize(
    ("text", "told"),
    [("words and words\n", "no ARPA file"), ("\\1-grams:\nnot_a_number word\n", "could not convert"),
     ("\\1-grams:\n-1 a\n\\2-grams:\n-1 a\n", "line 4")],
)  # fmt: skip
def test_a_file_of_another_kind_is_told_in_a_line(tmp_path, text, told):
    (tmp_path / "x.arpa").write_text(text)
    with pytest.raises(UserError, match=told):
        read_arpa(tmp_path / "x.arpa")
    with pytest.raises(UserError, match="cannot be read"):
        read_arpa(tmp_path / "nowhere.arpa")


def test_words_count_once_when_they_are_over(arpa):
    score = WordScore(read_arpa(arpa), TOKENIZER, TOKENIZER.vocab_size)
    ids, blank, ten = TOKENIZER.encode, TOKENIZER.encode(" ")[0], math.log(10)
    assert score(()).abs().max() == 0
    found = score(tuple(ids("hum")))
    assert found[blank] == pytest.approx(-0.1 * ten) and found.abs().sum() == pytest.approx(0.1 * ten)
    assert score(tuple(ids("hum ")))[blank] == 0  # two blanks are one
    assert score.end(tuple(ids("hum rise"))) == pytest.approx(-0.5 * ten) and score.end(()) == 0
    assert score(tuple(ids("hum hum rise")))[blank] == pytest.approx(-0.5 * ten)


def test_word_pieces_begin_a_word_unless_they_are_marked():
    texts = ["hum rise humming rising"] * 3
    tokenizer = Tokenizer(train(texts, "wordpiece", 24))
    entries = {("hum",): (-1.0, 0.0), ("humming",): (-2.0, 0.0), ("rise",): (-3.0, 0.0)}
    score = WordScore(NGram(entries, 1), tokenizer, tokenizer.vocab_size)
    ids = tokenizer.encode("humming rise")
    names = [tokenizer.backend.id_to_token(i) for i in ids]
    first = next(i for i, name in enumerate(names) if i and not name.startswith("##"))
    assert first > 1  # the first word is of several pieces
    found = score(tuple(ids[:first]))
    begins = {tokenizer.backend.id_to_token(i) for i in found.nonzero().flatten().tolist()}
    assert {"h", "r"} <= begins and not any(x.startswith(("##", "[")) for x in begins)
    assert found[ids[first]] == -2.0 and found.min() == -2.0
    assert score.end(tuple(ids)) == -3.0


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_an_ngram_of_letters_refuses_longer_tokens(kind):
    tokenizer = Tokenizer(train(["hum rise hum rise"] * 3, kind, 300))
    with pytest.raises(UserError, match=r"model of letters, and .* give an ARPA file of words"):
        WordScore(NGram({("h",): (-1.0, 0.0), ("u",): (-1.0, 0.0)}, 1), tokenizer, tokenizer.vocab_size)


def test_a_language_model_decides_between_what_sounds_alike(arpa):
    """Frames say "hum hu?" with m a little likelier to be missing; the n-gram knows no such word."""
    text = TOKENIZER.encode("hum rise")
    log_probs = torch.full((2 * len(text), TOKENIZER.vocab_size), -12.0)
    for t, token in enumerate(text):
        log_probs[2 * t, token] = log_probs[2 * t + 1, 0] = 0.0
    wrong = TOKENIZER.encode("d")[0]
    log_probs[4, wrong] = 0.5  # the m of hum
    log_probs = log_probs.log_softmax(-1)
    assert TOKENIZER.decode(greedy(log_probs)) == "hud rise"
    score = WordScore(read_arpa(arpa), TOKENIZER, TOKENIZER.vocab_size)
    beam = CTCBeam(8, prune=14, lm_weight=1.0)
    assert TOKENIZER.decode(beam_search(log_probs, beam)[0][0]) == "hud rise"
    assert TOKENIZER.decode(beam_search(log_probs, beam, score)[0][0]) == "hum rise"


def test_an_ngram_of_letters_scores_letters(tmp_path):
    lines = "\\1-grams:\n-1 <s>\n-0.5 h\n-0.7 u\n-0.9 <space>\n\\2-grams:\n-0.1 <s> h\n-0.2 h u\n\\end\\\n"
    (tmp_path / "letters.arpa").write_text(lines)
    score, ten = WordScore(read_arpa(tmp_path / "letters.arpa"), TOKENIZER, TOKENIZER.vocab_size), math.log(10)
    h, u, blank = TOKENIZER.encode("hu ")
    assert score(())[h] == pytest.approx(-0.1 * ten) and score((h,))[u] == pytest.approx(-0.2 * ten)
    assert score((u,))[blank] == pytest.approx(-0.9 * ten) and score.end((h,)) == 0


def test_a_decoder_scores_what_follows_a_prefix():
    torch.manual_seed(0)
    decoder = Decoder(TOKENIZER.vocab_size, 32, 1, 4, max_length=32).double()
    ids = TOKENIZER.encode("hum rise")
    expected = decoder.logits(decoder(torch.tensor([[1, *ids]])).tokens)[0].log_softmax(-1)
    score = DecoderScore(decoder, [1])
    for length in (0, 1, len(ids)):
        torch.testing.assert_close(score(tuple(ids[:length])), expected[length].float())
    assert DecoderScore(decoder)(()).abs().sum() == 0
    assert DecoderScore(decoder, most=4)(tuple(ids * 9)).isfinite().all()


def test_an_ngram_of_high_order_knows_how_a_text_begins():
    entries = {("a",): (-3.0, 0.0), ("b",): (-3.0, 0.0), ("c",): (-3.0, 0.0)}
    model = NGram(entries | {("a", "b"): (-1.0, 0.0), ("a", "b", "c"): (-0.5, 0.0), ("a",) * 4: (-0.1, 0.0)}, 4)
    assert model.log_prob(["a"], "b") == -1.0 and model.log_prob(["a", "b"], "c") == -0.5
    assert model.log_prob(["b", "a", "a", "a"], "a") == -0.1 and model.log_prob([], "a") == -3.0


class Transduces(Loud):
    """Writes a token for each frame that it is given."""

    def emissions(self, batch):
        log_probs, frames = super().emissions(batch)
        return log_probs.exp(), frames

    def decode(self, frames, *, num_beams=1):
        assert frames.shape[1] == TOKENIZER.vocab_size
        return frames.argmax(1).tolist(), [(t, t) for t in range(len(frames))]


def test_a_silent_chunk_says_nothing_to_a_transducer():
    sound = torch.sin(torch.arange(3 * RATE) * 0.3)
    audio = torch.cat([sound, torch.zeros(8 * RATE), sound])
    recogniser = Recogniser(Transduces(), TOKENIZER, RATE, chunk=2.0, overlap=0.4)
    tokens, spans = recogniser.tokens(audio)
    times = [start * STEP / RATE for start, _ in spans]
    assert len(tokens) == len(spans) and all(start == end for start, end in spans) and spans == sorted(spans)
    assert not [t for t in times if 5.1 < t < 8.9]  # but for chunks that hear the edges of it
    assert {round(t) for t in times} >= {0, 1, 2, 3, 11, 12, 13}
    assert recogniser.tokens(torch.zeros(5 * RATE)) == ([], [])


def test_the_last_chunk_is_as_long_as_the_others():
    heard = []

    def emit(samples):
        heard.append(len(samples))
        return samples[: len(samples) // 10 * 10 : 10, None]

    for length in range(101, 400):
        heard.clear()
        audio = torch.arange(length)
        found = in_chunks(emit, audio, step=10, chunk=100, overlap=40)
        assert torch.equal(found[:, 0], audio[: length // 10 * 10 : 10]) and min(heard) > 90 and max(heard) == 100


def test_samples_keep_their_precision_where_weights_are_bf16():
    class Seen(Told):
        def emissions(self, batch):
            self.dtype = batch["audio"].dtype
            return super().emissions(batch)

    method = Seen().to(torch.bfloat16)
    assert Recogniser(method, TOKENIZER, RATE).text(spelled(WORDS, AT)[0]) == " ".join(WORDS)
    assert method.dtype == torch.float32
