"""What recordings of one's own bring along: each is handled, with a line that says so and no value that is none."""

import csv
import math

import datasets
import numpy as np
import pytest
from sounds import RATE, encoded, sine, wav

from ssl_lab.cli.main import main
from ssl_lab.data.audio import Clips
from ssl_lab.data.audio_tokenizer import trained

soundfile = pytest.importorskip("soundfile", reason="needs soundfile")
pytest.importorskip("soxr", reason="needs soxr")

SMALL = [f"method.encoder.{word}" for word in ("dim=16", "depth=1", "num_heads=2", "stem.channels=8")]
FAST = [
    "duration=2steps", "data.batch_size=8", "data.num_workers=0", "trainer.enable_progress_bar=false",
    "trainer.accelerator=cpu", "data.sampling_rate=8000",
]  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def table(folder, rows, name="list.csv"):
    """Rows of (file, bytes, transcript, split) as a .csv beside the files."""
    for file, data, _, _ in rows:
        (folder / file).write_bytes(data)
    lines = [["audio", "transcript", "split"], *([file, text, split] for file, _, text, split in rows)]
    with (folder / name).open("w", newline="") as file:
        csv.writer(file).writerows(lines)
    return folder / name


def good(count, start=0):
    words = ["one two", "three", "two three", "one"]
    split = ["train"] * 3 + ["test"]
    return [(f"{i}.wav", wav(i, 0.8), words[i % 4], split[i // 4 % 4]) for i in range(start, start + count)]


def losses(out):
    with (out / "metrics.csv").open() as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row.get("train/loss")]


def test_a_run_learns_from_what_is_good(tmp_path, capsys):
    rows = [
        *good(48),
        ("broken.wav", b"RIFF and no more", "one", "train"),
        ("empty.wav", b"", "two", "train"),
        ("text.wav", b"these are words", "three", "train"),
        ("silent.wav", encoded(np.zeros(8000, "f4")), "one", "train"),
        ("short.wav", wav(3, 0.05), "two", "train"),
        ("dense.wav", wav(4, 0.2), "three two one three two one", "train"),  # more letters than frames
        ("wordless.wav", wav(5, 0.5), "", "train"),
        ("stereo.wav", encoded(np.stack([sine(1, 0.5, 44100)] * 2, 1), 44100), "one", "train"),
    ]
    path, out = table(tmp_path, rows), tmp_path / "run"
    words = ["method=ctc", "data=speech", f"data.path={path}", *SMALL, *FAST, "eval=[wer]", f"out={out}"]
    words += [f"data.train.bad_samples={tmp_path / 'bad.jsonl'}", "trainer.log_every_n_steps=1"]
    assert main(words) == 0, capsys.readouterr().err
    assert all(math.isfinite(loss) for loss in losses(out)) and losses(out)
    bad = (tmp_path / "bad.jsonl").read_text()
    assert all(name in bad for name in ("broken.wav", "empty.wav", "text.wav")) and bad.count("\n") == 3
    assert "inf" not in (out / "metrics.json").read_text().lower().replace("information", "")


def test_characters_that_a_tokenizer_lacks_are_told_before_the_run(tmp_path, capsys):
    path, out = table(tmp_path, good(16)), tmp_path / "run"
    words = ["method=ctc", "data=speech", *SMALL, *FAST, "eval=[]", f"out={out}"]
    assert main([*words, f"data.path={path}"]) == 0, capsys.readouterr().err
    other = tmp_path / "other"
    other.mkdir()
    path = table(other, [*good(16)[:15], ("x.wav", wav(1), "one \u00e9t\u00e9", "train")])
    capsys.readouterr()
    assert main([*words[:-1], f"data.path={path}", f"data.tokenizer={out}", f"out={tmp_path / 'two'}"]) == 2
    told = capsys.readouterr().err
    assert "one \u00e9t\u00e9" in told and "\u00e9" in told and told.count("\n") == 1


def test_attention_writes_down_what_it_was_taught(tmp_path, capsys):
    """From `data.train.end=true` to `ssl-lab transcribe`, with a folder, a search and no times."""
    small = ["method.model.dim=32", "method.model.depth=1", "method.model.num_heads=2", "method.model.stem.channels=16"]
    size = ["data.train.length=32", "data.test.length=4", "data.train.source.length=40", "data.test.source.length=20"]
    words = ["experiment=speech_transformer_digits", "data=tones_sequences", *small, *size, *FAST[:1], *FAST[3:5]]
    words += ["data.batch_size=8", "trainer.precision=32-true", f"out={tmp_path / 'run'}"]
    assert main(words) == 0, capsys.readouterr().err
    assert "time/real_time_factor" in (tmp_path / "run/metrics.json").read_text()
    (tmp_path / "sounds").mkdir()
    soundfile.write(tmp_path / "sounds/a.wav", sine(2, 1.5, 16000), 16000)
    soundfile.write(tmp_path / "sounds/b.wav", np.zeros(8000, "f4"), 8000)
    capsys.readouterr()
    run = f"ckpt={tmp_path / 'run'}"
    for more in ([], ["num_beams=3"]):
        assert main(["transcribe", run, f"audio={tmp_path / 'sounds'}", *more]) == 0
        told = capsys.readouterr()
        assert [line.split("\t")[0][-5:] for line in told.out.splitlines()] == ["a.wav", "b.wav"]
        assert "b.wav: no words in it" in told.err
    for more, said in (["words=true", "does not know when"], ["lm=x.arpa", "helps a search over frames"]):
        assert main(["transcribe", run, f"audio={tmp_path / 'sounds'}", more]) == 2
        assert said in capsys.readouterr().err


def test_a_language_model_of_letters_or_of_the_same_tokens_helps(tmp_path, capsys):
    size = ["data.train.length=32", "data.test.length=4", "data.train.source.length=40", "data.test.source.length=20"]
    out = tmp_path / "ctc"
    assert main(["method=ctc", *SMALL, *size, *FAST[:1], *FAST[3:5], "eval=[]", f"out={out}"]) == 0
    (tmp_path / "texts.txt").write_text("rise fall hum peak dip trill buzz chime hiss knock " * 60)
    small = ["method.decoder.dim=16", "method.decoder.depth=1", "method.decoder.num_heads=2"]
    words = ["method=causal_lm", "data=text", f"data.path={tmp_path / 'texts.txt'}", f"data.tokenizer={out}", *small]
    words += ["data.train.length=32", "data.test.length=32", "data.batch_size=4"]
    assert main([*words, *FAST[:1], *FAST[3:5], "eval=[]", f"out={tmp_path / 'lm'}"]) == 0, capsys.readouterr().err
    arpa = tmp_path / "words.arpa"
    arpa.write_text("\\1-grams:\n-1 <unk>\n-1 rise\n-1 hum\n\\end\\\n")
    soundfile.write(tmp_path / "a.wav", sine(2, 1.0), 8000)
    run = [f"ckpt={out}", f"audio={tmp_path / 'a.wav'}"]
    for lm in (tmp_path / "lm", arpa):
        assert main(["transcribe", *run, "num_beams=4", f"lm={lm}"]) == 0, capsys.readouterr().err
    capsys.readouterr()
    for lm, beams, said in (
        (arpa, 1, "needs a search"), (out, 4, "give a run of causal_lm"), (tmp_path / "a.wav", 4, "ARPA"),
        (tmp_path / "nowhere", 4, "does not exist"),
    ):  # fmt: skip
        assert main(["transcribe", *run, f"num_beams={beams}", f"lm={lm}"]) == 2
        told = capsys.readouterr().err
        assert said in told and told.count("\n") == 1


def test_weights_that_are_no_numbers_are_told(tmp_path, capsys, monkeypatch):
    from ssl_lab.train import checkpoint

    size = ["data.train.length=16", "data.test.length=4", "data.train.source.length=40", "data.test.source.length=20"]
    out, read = tmp_path / "run", checkpoint.read
    assert main(["method=ctc", *SMALL, *size, *FAST[:1], *FAST[3:5], "eval=[]", f"out={out}"]) == 0

    def poisoned(path):
        held = read(path)
        held["state_dict"]["head.weight"].fill_(math.nan)
        return held

    monkeypatch.setattr(checkpoint, "read", poisoned)
    soundfile.write(tmp_path / "a.wav", sine(2, 1.0), 8000)
    capsys.readouterr()
    assert main(["transcribe", f"ckpt={out}", f"audio={tmp_path / 'a.wav'}"]) == 2
    assert "diverged" in capsys.readouterr().err


def test_transcripts_in_memory_are_of_what_is_heard(tmp_path):
    rows = [
        (name, b"no sound" if i in (5, 9) else data, f"{'ab' * i}a", "test" if i == 12 else "train")
        for i, (name, data, _, _) in enumerate(good(13))
    ]
    path = table(tmp_path, rows)
    found = Clips(path, trained(str(path)), sampling_rate=RATE, in_memory=True)
    samples = found.read(range(12))
    heard = samples.rows.tolist()
    assert [i for i in range(12) if heard[i] != i] == [5, 9]
    assert found.transcripts(range(12)) == samples.data.transcripts == [rows[row][2] for row in heard]
    assert found.transcripts(heard) == samples.data.transcripts
