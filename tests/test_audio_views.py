"""From clips to batches: padding, draws, speed, noise, labels."""

import numpy as np
import pytest
import torch
from sounds import RATE, pitch, sine

from ssl_lab.data.audio_speed import change_speed
from ssl_lab.data.audio_text import Transcribed, TranscriptEncoder
from ssl_lab.data.audio_tokenizer import trained
from ssl_lab.data.audio_views import AudioViews, WholeAudio, add_noise
from ssl_lab.data.tones import Tones
from ssl_lab.errors import UserError

WORDS = Tones("train", 16)


def clips(rows=range(8)):
    return WORDS.read(rows).data


def test_a_batch_is_padded_and_says_where():
    given = [torch.from_numpy(sine(i, seconds)) for i, seconds in enumerate((0.31, 0.05, 0.25))]
    batch = WholeAudio(RATE)(given, torch.arange(3), 0)
    assert batch.keys() == {"audio", "audio_valid"}
    assert batch["audio"].shape == batch["audio_valid"].shape == (3, 3200)  # 0.31 s rounded up to 0.4
    assert batch["audio"].dtype == torch.float32 and batch["audio_valid"].dtype == torch.bool
    assert batch["audio_valid"].sum(1).tolist() == [2480, 1600, 2000]  # 0.05 s and silence count as 0.2 s
    for row, valid, clip in zip(batch["audio"], batch["audio_valid"], given, strict=True):
        assert torch.equal(row[: len(clip)], clip) and not row[len(clip) :].any()
        assert valid[: len(clip)].all() and not valid[max(len(clip), 1600) :].any()


def test_a_model_of_one_length_gets_it():
    given = [torch.arange(1.0, 1 + n) for n in (400, 4000, 8001)]
    whole = WholeAudio(RATE, seconds=0.5, fixed=True)(given, torch.arange(3), 0)
    assert whole["audio"].shape == (3, 4000) and whole["audio_valid"].sum(1).tolist() == [1600, 4000, 4000]
    assert whole["audio"][2, 0] in (2001, 2002)  # the middle
    assert WholeAudio(RATE, seconds=0.5)(given[:1], torch.arange(1), 0)["audio"].shape == (1, 1600)
    starts = set()
    views = AudioViews(RATE, seconds=0.5, speed=[1.0], gain=[0, 0], noise_p=0)
    for position in range(20):
        row = views(given[2:], torch.tensor([position]), 1)["audio"][0]
        assert torch.equal(row.diff(), torch.ones(3999))
        starts.add(int(row[0]))
    assert len(starts) > 10 and min(starts) < 1000 and max(starts) > 3000


def test_evaluation_draws_nothing_and_training_by_position_alone():
    whole, views = WholeAudio(RATE), AudioViews(RATE)
    given, position = clips(), torch.arange(100, 108)
    kept = [clip.clone() for clip in given]
    assert torch.equal(whole(given, position, 1)["audio"], whole(given, position + 9, 2)["audio"])
    batch = views(given, position, 5)
    assert not torch.equal(batch["audio"], views(given, position, 6)["audio"])
    for i in (0, 3, 7):  # each alone, in any company
        alone = views(clips([i]), position[i : i + 1], 5)
        size = int(alone["audio_valid"].sum())
        assert int(batch["audio_valid"][i].sum()) == size
        assert torch.equal(alone["audio"][0, :size], batch["audio"][i, :size])
        assert not batch["audio"][i, size:].any()
    assert all(torch.equal(a, b) for a, b in zip(given, kept, strict=True))  # what lies in memory is not touched


@pytest.mark.parametrize("factor", [0.9, 1.1, 1.25, 0.5])
def test_speed_changes_pitch_and_length(factor):
    clip = torch.from_numpy(sine(4, 0.5))
    fast = change_speed(clip, factor)
    assert len(fast) == round(4000 / factor) and fast.dtype == torch.float32
    assert abs(pitch(fast) - 600 * factor) < 2
    assert abs(float(fast[200:-200].square().mean().sqrt()) - 0.5 / 2**0.5) < 2e-3
    soxr = pytest.importorskip("soxr", reason="soxr is not installed")
    theirs = torch.from_numpy(soxr.resample(clip.numpy(), round(RATE * factor), RATE, quality="VHQ"))
    assert (fast - theirs[: len(fast)])[200:-200].abs().max() < 1e-3
    assert change_speed(clip, 1.0) is clip


def test_speed_of_words_is_that_of_soxr():
    soxr = pytest.importorskip("soxr", reason="soxr is not installed")
    clean = Tones("train", 16, snr=None)
    tones = [row for row, word in enumerate(clean.words(range(16))) if word.kind not in ("hiss", "knock")]
    for clip in clean.read(tones[:6]).data:
        ours, theirs = change_speed(clip, 0.9), soxr.resample(clip.numpy(), 7200, 8000, quality="VHQ")
        error = ours[100:-100].numpy() - theirs[100 : len(ours) - 100]
        assert np.square(error).mean() < 1e-5 * np.square(theirs).mean()


def test_noise_and_gain_are_what_was_asked():
    clip = clips([1])[0]
    noisy = add_noise(clip, 12.0, seed=3)
    ratio = clip.square().mean() / (noisy - clip).square().mean()
    assert abs(10 * float(ratio.log10()) - 12) < 0.3
    assert torch.equal(noisy, add_noise(clip, 12.0, seed=3)) and not torch.equal(noisy, add_noise(clip, 12.0, seed=4))
    louder = AudioViews(RATE, speed=[1.0], gain=[-6, 6], noise_p=0)
    found = [float(louder([clip], torch.tensor([i]), 0)["audio"][0, 1000] / clip[1000]) for i in range(50)]
    assert 0.5 < min(found) < 0.6 and 1.7 < max(found) < 2
    share = AudioViews(RATE, speed=[1.0], gain=[0, 0], noise_p=0.5)
    same = [torch.equal(share([clip], torch.tensor([i]), 0)["audio"][0, : len(clip)], clip) for i in range(100)]
    assert 35 < sum(same) < 65


def test_silence_gives_no_nan():
    batch = AudioViews(RATE, noise_p=1.0)([torch.zeros(4000), torch.zeros(1)], torch.arange(2), 0)
    assert not batch["audio"].any() and batch["audio_valid"].any(1).all()


def test_labels_are_padded_and_unknown_characters_named():
    encode = TranscriptEncoder(trained("tones"))
    texts = ["hum hiss", "dip"]
    batch = WholeAudio(RATE)(Transcribed(clips(range(2)), texts, encode), torch.arange(2), 0)
    labels = batch["labels"]
    assert labels.shape == (2, 8) and labels.dtype == torch.int64 and (labels[0] > 0).all()
    assert labels[1, 3:].tolist() == [-100] * 5
    assert [encode.tokenizer.decode(row[row >= 0]) for row in labels] == texts
    with pytest.raises(UserError, match=r"the transcript 'hum, hiss' cannot be learned: .*','") as error:
        WholeAudio(RATE)(Transcribed(clips(range(2)), ["dip", "hum, hiss"], encode), torch.arange(2), 0)
    assert "\n" not in str(error.value)
    encode.check([["dip"], ["rise fall"]], "here")
    with pytest.raises(UserError, match="here: the transcript 'q' cannot"):
        encode.check([["dip"], ["rise", "q"]], "here")


@pytest.mark.parametrize("kind", ["character", "bpe", "wordpiece"])
def test_the_blank_is_token_0_of_every_kind(kind):
    tokenizer = trained("tones", kind, 400)
    assert tokenizer.pad == 0
    assert tokenizer.decode(tokenizer.encode("rise knock")) == "rise knock"


def test_mistakes_are_one_line():
    transcribed = Transcribed(clips(range(1)), ["dip"], TranscriptEncoder(trained("tones")))
    cases = [
        (lambda: AudioViews(RATE, speed=[]), "speed is"),
        (lambda: AudioViews(RATE, speed=[0.1]), "factors from 0.25"),
        (lambda: AudioViews(RATE, gain=[6, -6]), "gain is"),
        (lambda: AudioViews(RATE, noise_p=2), "noise_p is 2"),
        (lambda: WholeAudio(RATE, fixed=True), "set seconds"),
        (lambda: WholeAudio(RATE, seconds=0.1), "seconds is 0.1"),
        (lambda: WholeAudio(RATE, step=0), "step is 0"),
        (lambda: WholeAudio(RATE, seconds=1)(transcribed, torch.arange(1), 0), "transcripts would not fit"),
        (lambda: WholeAudio(RATE)(torch.zeros(2, 3, 8, 8), torch.arange(2), 0), "these views need sound"),
    ]
    for make, message in cases:
        with pytest.raises(UserError, match=message) as error:
            make()
        assert "\n" not in str(error.value)
