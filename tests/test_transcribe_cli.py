"""`ssl-lab transcribe`: files of any rate, folders, long files, and what cannot be read, each in one line."""

import itertools
import re

import pytest
import torch

from ssl_lab.cli.main import main
from ssl_lab.data.tones import Tones

soundfile = pytest.importorskip("soundfile", reason="needs soundfile")
pytest.importorskip("soxr", reason="needs soxr")

NETWORK = [f"method.encoder.{word}" for word in ("dim=16", "depth=1", "num_heads=2", "stem.channels=8")]
DATA = ["data.train.length=64", "data.train.source.length=100", "data.test.length=4", "data.test.source.length=20"]
FAST = ["duration=3steps", "data.batch_size=4", "trainer.enable_progress_bar=false", "trainer.accelerator=cpu"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of a few steps: it says something, if nothing of sense."""
    out = tmp_path_factory.mktemp("transcribe") / "run"
    words = ["method=ctc", *NETWORK, *DATA, *FAST, "method.augment=null", "optim.lr=1e-4", "eval=[wer]"]
    assert main([*words, f"out={out}"]) == 0
    return out


@pytest.fixture(scope="module")
def clips():
    return Tones("train", length=8, sampling_rate=8000).read(range(8)).data


def said(capsys, *words):
    capsys.readouterr()
    assert main(["transcribe", *words]) == 0, capsys.readouterr().err
    return capsys.readouterr()


def refused(capsys, *words):
    capsys.readouterr()
    assert main(["transcribe", *words]) == 2
    told = capsys.readouterr()
    assert not told.out and told.err.count("\n") == 1
    return told.err


def test_files_of_any_rate_stereo_short_and_silent_ones(trained, clips, tmp_path, capsys):
    sound = torch.cat(clips)
    soundfile.write(tmp_path / "a.wav", sound.numpy(), 8000)
    soundfile.write(tmp_path / "b.flac", torch.stack([sound, sound], 1).numpy(), 44100)
    soundfile.write(tmp_path / "c.wav", torch.zeros(16000).numpy(), 16000)
    soundfile.write(tmp_path / "d.wav", sound[:400].numpy(), 8000)  # 0.05 s
    (tmp_path / "e.wav").write_bytes(b"RIFF no sound")
    soundfile.write(tmp_path / "f.mp3", sound.numpy(), 16000, format="MP3")
    (tmp_path / "sub").mkdir()
    soundfile.write(tmp_path / "sub/g.ogg", sound.numpy(), 16000, format="OGG", subtype="VORBIS")
    (tmp_path / "h.wav").write_text("these are words")
    (tmp_path / "i.flac").write_bytes(b"")
    told = said(capsys, f"ckpt={trained}", f"audio={tmp_path}")
    names = [line.split("\t")[0].rpartition("/")[2] for line in told.out.splitlines()]
    assert names == ["a.wav", "b.flac", "c.wav", "d.wav", "f.mp3", "g.ogg"]
    assert all(f"{name}: left out" in told.err for name in ("e.wav", "h.wav", "i.flac"))
    assert "c.wav: no words in it" in told.err and re.search(r"real-time factor \d\.\d+\n$", told.err)


def test_a_recording_says_the_same_at_any_rate_and_in_any_file(trained, clips, tmp_path, capsys):
    soxr = pytest.importorskip("soxr")
    sound = torch.cat(clips).numpy()
    faster = soxr.resample(sound, 8000, 44100)
    soundfile.write(tmp_path / "a.wav", sound, 8000)
    soundfile.write(tmp_path / "b.flac", torch.tensor(faster)[:, None].repeat(1, 2).numpy(), 44100)
    lines = said(capsys, f"ckpt={trained}", f"audio={tmp_path}").out.splitlines()
    a, b = (line.split("\t")[1] for line in lines)
    edits = sum(x != y for x, y in itertools.zip_longest(a, b))
    assert len(a) > 3 and edits <= max(2, len(a) // 5)  # a network of three steps sits on the fence


def test_words_have_times_in_order_also_in_chunks_and_by_search(trained, clips, tmp_path, capsys):
    file = tmp_path / "long.wav"
    soundfile.write(file, torch.cat(clips * 2).numpy(), 8000)
    seconds = sum(map(len, clips)) * 2 / 8000
    for more in ([], ["chunk=2", "overlap=1"], ["num_beams=4"]):
        lines = said(capsys, f"ckpt={trained}", f"audio={file}", "words=true", *more).out.splitlines()
        times = [tuple(map(float, line.split("\t")[:2])) for line in lines]
        assert all(0 <= start < end <= seconds for start, end in times)
        assert all(a[1] <= b[0] + 1e-6 for a, b in itertools.pairwise(times))


def test_mistakes_are_told_in_one_line(trained, tmp_path, capsys):
    run, file = f"ckpt={trained}", tmp_path / "broken.wav"
    file.write_bytes(b"no sound")
    assert "cannot be read" in refused(capsys, run, f"audio={file}")
    assert "does not exist" in refused(capsys, run, "audio=nowhere.wav")
    (tmp_path / "empty").mkdir()
    assert "holds no sound file" in refused(capsys, run, f"audio={tmp_path / 'empty'}")
    assert "none of the 1 files" not in refused(capsys, run, f"audio={tmp_path}")
    assert "does not exist" in refused(capsys, "ckpt=nowhere", f"audio={file}")
    assert "overlap is at least" in refused(capsys, run, f"audio={file}", "overlap=0.1")
    assert "no run wrote it" in refused(capsys, f"ckpt={tmp_path}", f"audio={file}")
