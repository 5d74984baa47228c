"""Words of tones, and utterances joined of words."""

import pytest
import torch
from sounds import RATE, number_of, sine

from ssl_lab.data.audio_joined import Joined
from ssl_lab.data.audio_text import Transcribed
from ssl_lab.data.audio_tokenizer import trained
from ssl_lab.data.source import Samples
from ssl_lab.data.tokenizer import Tokenizer
from ssl_lab.data.tokenizer_train import train
from ssl_lab.data.tones import WORDS, Tones
from ssl_lab.errors import UserError


def test_words_follow_from_seed_split_and_row():
    few, many, test = Tones("train", 10), Tones("train", 300), Tones("test", 300)
    a, b = few.read([7, 2]), many.read([2, 5, 7])
    assert torch.equal(a.data[0], b.data[2]) and torch.equal(a.data[1], b.data[0])
    assert a.targets.tolist() == b.targets[[2, 0]].tolist()
    assert not torch.equal(test.read([7]).data[0][:2000], a.data[0][:2000])
    assert not torch.equal(Tones("train", 10, seed=1).read([7]).data[0][:2000], a.data[0][:2000])
    samples = many.read(range(300))
    assert many.classes == WORDS and torch.bincount(samples.targets, minlength=10).min() > 10
    assert many.lengths.tolist() == [len(x) for x in samples.data]
    assert min(map(len, samples.data)) >= 3200 and max(map(len, samples.data)) <= 6400
    assert all(x.dtype == torch.float32 and x.isfinite().all() and x.abs().max() <= 1 for x in samples.data)
    assert many.transcripts([3]) == [WORDS[int(samples.targets[3])]]
    twice = Tones("train", 3, sampling_rate=16000).read([0, 1, 2]).data
    assert all(len(x) - 2 * len(y) in (0, 1) for x, y in zip(twice, samples.data, strict=False))


def test_pitch_and_loudness_do_not_tell_a_word():
    words = Tones("train", 2000).words(range(2000))
    kind = torch.tensor([WORDS.index(word.kind) for word in words])
    for name in ("samples", "pitch", "depth", "decay", "level", "snr"):
        value = torch.tensor([getattr(word, name) for word in words], dtype=torch.float64)
        means = torch.stack([value[kind == k].mean() for k in range(10)])
        assert (means - value.mean()).abs().max() < 0.25 * value.std(), name


class Numbered:
    """Words whose pitch is their row; row 3 is unreadable and replaced by row 4."""

    unit, sampling_rate = "words", RATE

    def __init__(self, count, first=0):
        self.count, self.first, self.classes = count, first, list("abcdefghij")

    def __len__(self):
        return self.count

    @property
    def lengths(self):
        return torch.full((self.count,), 800)

    def transcripts(self, rows):
        return ["abcdefghij"[row % 10] for row in rows]

    def read(self, rows):
        rows = [4 if row == 3 else row for row in rows]
        clips = [torch.from_numpy(sine(self.first + row)) for row in rows]
        return Samples(clips, torch.tensor([row % 10 for row in rows]), torch.tensor(rows))


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(train(["abcdefghij "], "character", 0, ["<pad>"]))


def pieces(clip):
    """The words of an utterance, and the pauses around them in samples."""
    loud = (clip.abs() > 0).long()
    loud = torch.nn.functional.max_pool1d(loud[None].float(), 9, 1, 4)[0].long()  # a tone crosses zero
    edges = torch.nn.functional.pad(loud, (1, 1)).diff().nonzero()[:, 0].tolist()
    spans = list(zip(edges[::2], edges[1::2], strict=True))
    around = zip([0, *edges[1::2]], [*edges[::2], len(clip)], strict=True)
    return [clip[a:b] for a, b in spans], [b - a for a, b in around]


def test_an_utterance_is_its_words_and_pauses(tokenizer):
    joined = Joined(Numbered(30), 40, tokenizer, words=[1, 4], pause=[0.02, 0.1])
    samples = joined.read(range(40))
    data = samples.data
    assert isinstance(data, Transcribed) and samples.targets.eq(-1).all() and samples.rows.tolist() == list(range(40))
    assert {len(joined.rows_of(row)) for row in range(40)} == {1, 2, 3, 4}
    for row, (clip, text) in enumerate(zip(data.clips, data.transcripts, strict=True)):
        words, pauses = pieces(clip)
        right = [4 if x == 3 else x for x in joined.rows_of(row)]
        assert [number_of(x) for x in words] == right
        assert text == " ".join("abcdefghij"[x % 10] for x in right)  # of what was really read
        assert len(pauses) == len(right) + 1 and all(150 <= p <= 810 for p in pauses)
        assert len(clip) == joined.lengths[row]
    again = Joined(Numbered(30), 60, tokenizer, words=[1, 4], pause=[0.02, 0.1])
    assert torch.equal(again.read([17]).data.clips[0], data.clips[17])  # and a longer set begins with the shorter
    assert not torch.equal(Joined(Numbered(30), 40, words=[1, 4], seed=1).read([17]).data[0], data.clips[17])


def test_test_utterances_are_made_of_test_recordings(tokenizer):
    heard = []
    for source in (Numbered(20), Numbered(20, first=30)):
        clips = Joined(source, 30, words=[1, 3]).read(range(30)).data
        heard.append({number_of(word) for clip in clips for word in pieces(clip)[0]})
    assert heard[0] <= set(range(20)) and heard[1] <= set(range(30, 50)) and min(map(len, heard)) > 10


def test_noise_covers_pauses_too():
    quiet, noisy = (Joined(Numbered(9), 4, snr=snr) for snr in (None, [10, 10]))
    a, b = quiet.read([2]).data[0], noisy.read([2]).data[0]
    assert a.shape == b.shape and (a == 0).sum() > 300 and (b == 0).sum() == 0
    assert abs(10 * float((a.square().mean() / (b - a).square().mean()).log10()) - 10) < 0.3
    assert torch.equal(b, noisy.read([0, 2]).data[1])


def test_mistakes_are_one_line(tokenizer):
    strange = Numbered(9)
    strange.classes = ["a", "ü"]
    cases = [
        (lambda: Tones("dev", 5), "no split 'dev'"),
        (lambda: Tones("train", 0), "0 words"),
        (lambda: Joined(Numbered(9), 0), "0 utterances"),
        (lambda: Joined(Numbered(9), 5, words=[3, 1]), "words is"),
        (lambda: Joined(Numbered(9), 5, words=[0, 1]), "an utterance has words"),
        (lambda: Joined(strange, 5, tokenizer), "source of words: the transcript 'ü'"),
        (lambda: Joined(Joined(Numbered(9), 5), 5, trained("tones")), "words"),
    ]
    for make, message in cases:
        with pytest.raises(UserError, match=message) as error:
            make()
        assert "\n" not in str(error.value)
