"""`ssl-lab doctor` looks into recordings: rates, lengths, what is silent, broken or cannot be learned."""

import datasets
import numpy as np
import pytest
from sounds import encoded, sine, wav

from ssl_lab.cli.doctor_sound import sound
from ssl_lab.cli.main import main
from ssl_lab.data.tokenizer import Tokenizer
from ssl_lab.data.tokenizer_train import train
from ssl_lab.errors import UserError

pytest.importorskip("soundfile", reason="needs soundfile")
pytest.importorskip("soxr", reason="needs soxr")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def recordings(tmp_path):
    clips = {
        "good.wav": wav(0, 1.0),
        "fast.flac": encoded(sine(1, 2.0, 44100), 44100, "FLAC"),
        "stereo.wav": encoded(np.stack([sine(2), sine(2)], 1)),
        "silent.wav": encoded(np.zeros(4000, "f4")),
        "broken.wav": b"RIFF and nothing else",
        "long.wav": wav(3, 0.3),
        "other.wav": wav(4, 0.5),
    }
    texts = {"good.wav": "one two", "fast.flac": "three", "stereo.wav": "si", "silent.wav": "six", "broken.wav": "one",
             "long.wav": "far too many letters"}  # fmt: skip
    for name, data in clips.items():
        (tmp_path / name).write_bytes(data)
    rows = [f"{name},{text},train" for name, text in texts.items()] + ["other.wav,n\u00efne,test"]
    (tmp_path / "list.csv").write_text("\n".join(["audio,transcript,split", *rows]))
    return tmp_path


def test_everything_is_found(recordings):
    found = {f.name: f for f in sound(str(recordings / "list.csv"))[:9]}
    (name,) = [n for n in found if n.endswith("train")]
    assert "6 clips" in found[name].value and found[name].problem is None
    assert "8,000 Hz (4)" in found["  rates"].value and "44,100 Hz (1)" in found["  rates"].value
    assert "8,000 to 44,100" in found["  rates"].problem
    assert "2 in each (1)" in found["  channels"].value
    assert found["  lengths"].value.startswith("0.10 to 2.00 s") and "1 below 0.2 s" in found["  lengths"].value
    assert "broken.wav" in found["  unreadable"].value and "mend" in found["  unreadable"].problem
    assert "silent.wav" in found["  silent"].value
    assert "20 letters in 0.30 s" in found["  too dense"].value and found["  too dense"].value.startswith("1:")
    assert "'v'" not in found["  characters"].value and "'f'" in found["  characters"].value


def test_a_tokenizer_tells_what_it_lacks(recordings, tmp_path):
    Tokenizer(train(["one two three six far too many letters "], "character", 0, ["<pad>"])).save(tmp_path / "words")
    found = [f for f in sound(str(recordings / "list.csv"), str(tmp_path / "words")) if f.name.startswith("  unknown")]
    assert [f.value.startswith("1:") for f in found] == [False, True]  # only the test split has it
    assert "n\u00efne" in found[1].value and "ends a run" in found[1].problem


def test_folders_of_classes_and_images_are_told_apart(recordings, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    for i, name in enumerate(["yes", "no"] * 4):
        (recordings / "classes" / name).mkdir(parents=True, exist_ok=True)
        (recordings / "classes" / name / f"{i}.wav").write_bytes(wav(i))
    assert main(["doctor", f"data.path={recordings / 'classes'}"]) == 0
    assert "2 classes" in (text := capsys.readouterr().out) and "lengths" in text
    assert main(["doctor", f"data.path={recordings / 'nowhere'}"]) == 0
    assert "not usable" in (text := capsys.readouterr().out) and "as sound" not in text
    with pytest.raises(UserError):
        sound(str(recordings / "nowhere"))
