"""Recordings in folders, tables and lists: classes, transcripts, and clips that cannot be read."""

import json
import logging

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sounds import RATE, encoded, number_of, sine, wav

from ssl_lab.data.audio import Clips
from ssl_lab.data.audio_text import Transcribed
from ssl_lab.data.audio_tokenizer import trained
from ssl_lab.errors import UserError

pytest.importorskip("soundfile", reason="soundfile is not installed")
pytest.importorskip("soxr", reason="soxr is not installed")

WORDS = ["zero", "one", "two", "three", "four", "five"]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def clips(path, *words, **options):
    return Clips(path, *words, sampling_rate=RATE, **options)


def folder(root, names, make=wav):
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(make(number))
    return root


def parquet(root, count=6, **columns):
    """Splits alike: row i sounds number i and says its name."""
    table = {"audio": [wav(i) for i in range(count)], "transcript": [WORDS[i % 6] for i in range(count)]} | columns
    for split in ("train", "test"):
        pq.write_table(pa.table({k: v for k, v in table.items() if v is not None}), root / f"{split}.parquet")
    return root


def test_folders_are_classes_and_splits(tmp_path):
    names = [f"{split}/{name}/{i}.wav" for split in ("train", "val") for name in ("cat", "dog") for i in range(2)]
    folder(tmp_path, [*names, "train/notes.txt", "train/cat/.hidden.wav"])
    (tmp_path / "train/cat/0.wav").write_bytes(encoded(sine(0), kind="MP3"))
    train, test = clips(tmp_path), clips(tmp_path, split="test")
    assert train.classes == test.classes == ["cat", "dog"] and (len(train), len(test)) == (4, 4)
    samples = test.read([3, 0])
    assert samples.targets.tolist() == [1, 0] and samples.rows.tolist() == [3, 0]
    assert [number_of(x) for x in samples.data] == [7, 4]
    assert all(x.dtype == torch.float32 and x.shape == (800,) for x in samples.data)
    assert train.transcripts([0, 3]) == ["cat", "dog"]  # the word of a class


def test_a_flat_folder_has_no_classes_and_is_divided(tmp_path):
    folder(tmp_path, [f"{i}.flac" for i in range(20)], lambda i: encoded(sine(i), kind="FLAC"))
    found = [clips(tmp_path, split=split) for split in ("train", "test")]
    parts = [[number_of(x) for x in part.read(range(len(part))).data] for part in found]
    assert sorted(parts[0] + parts[1]) == list(range(20)) and parts[1]
    assert clips(tmp_path).read([0]).targets.tolist() == [-1]


@pytest.mark.parametrize("kind", ["bytes", "struct", "typed", "paths"])
def test_tables_hold_bytes_structs_or_paths(tmp_path, kind):
    structs = [{"bytes": wav(i), "path": f"{i}.wav"} for i in range(6)]
    if kind == "typed":
        rows = datasets.Dataset.from_dict({"audio": structs, "label": [i % 2 for i in range(6)], "text": WORDS})
        rows = rows.cast_column("audio", datasets.Audio(decode=False))
        for split in ("train", "test"):
            rows.to_parquet(tmp_path / f"{split}.parquet")
    else:
        folder(tmp_path / "far", [f"{i}.wav" for i in range(6)])
        column = {"bytes": [wav(i) for i in range(6)], "struct": structs, "paths": [f"far/{i}.wav" for i in range(6)]}
        labels = [i % 2 for i in range(6)]
        parquet(tmp_path, audio=column[kind], label=labels, transcript=None, text=WORDS, speaker=["x"] * 6)
    found = clips(tmp_path)
    samples = found.read([4, 1])
    assert [number_of(x) for x in samples.data] == [4, 1] and samples.targets.tolist() == [0, 1]
    assert found.transcripts([4, 1]) == ["four", "one"] and found.classes == ["0", "1"]


def test_transcripts_come_with_the_clips(tmp_path):
    parquet(tmp_path, transcript=["zero", None, "two", "  ", "four", "five"])
    tokenizer = trained(str(tmp_path))
    assert tokenizer.pad == 0 and tokenizer.unk is None and " " in tokenizer.backend.get_vocab()
    found = clips(tmp_path, tokenizer)
    assert len(found) == 4 and found.tokenizer is tokenizer  # rows without a transcript are left out
    data = found.read([3, 1]).data
    assert isinstance(data, Transcribed) and data.transcripts == ["five", "two"]
    assert [number_of(x) for x in data.clips] == [5, 2]
    labels = data.encode(data.transcripts)["labels"]
    assert labels.shape == (2, 8) and labels[1, 3:].tolist() == [-100] * 5
    assert tokenizer.decode(labels[0, :4]) == "five"
    assert len(clips(tmp_path)) == 6 and clips(tmp_path).transcripts([1]) == [""]


@pytest.mark.parametrize("separator", [",", "\t"])
def test_lists_of_paths_and_transcripts(tmp_path, separator):
    folder(tmp_path / "clips", [f"{i}.wav" for i in range(6)])
    file = tmp_path / ("list.csv" if separator == "," else "list.tsv")
    lines = [f"clips/{i}.wav{separator}{'train' if i < 4 else 'test'}{separator}{WORDS[i]}" for i in range(6)]
    file.write_text("\n".join([separator.join(("path", "split", "transcript")), *lines]))
    tokenizer = trained(str(file))
    train, test = clips(file, tokenizer), clips(file, tokenizer, split="test")
    assert train.transcripts(range(4)) == WORDS[:4] and test.transcripts(range(2)) == WORDS[4:]
    assert [number_of(x) for x in test.read([0, 1]).data.clips] == [4, 5]
    assert clips(file).read([0]).data[0].shape == (800,)


@pytest.mark.parametrize("folders", [["clips"], ["clips", "more"]])  # one is no class, two would be
def test_a_tokenizer_is_trained_on_the_transcripts_of_lists_in_a_folder(tmp_path, folders):
    names = [f"{name}/{i}.wav" for name in folders for i in range(3)]
    folder(tmp_path, names)
    for split, words in (("train", WORDS[:3]), ("test", WORDS[3:])):
        lines = [f"{names[i % len(names)]},{word}" for i, word in enumerate(words)]
        (tmp_path / f"{split}.csv").write_text("\n".join(["path,transcript", *lines]))
    tokenizer = trained(str(tmp_path), "word")
    assert set(tokenizer.backend.get_vocab()) == {"<pad>", *WORDS}
    assert clips(tmp_path, tokenizer, split="test").transcripts(range(3)) == WORDS[3:]
    with pytest.raises(UserError, match=r"no transcripts and no classes: .*no column 'said'"):
        trained(str(tmp_path), "word", transcript_column="said")


def test_a_tokenizer_is_trained_on_the_classes_of_a_list_or_beside_one(tmp_path):
    folder(tmp_path, [f"{name}/{i}.wav" for name in ("one", "two") for i in range(10)])
    lines = [f"{name}/{i}.wav,{name}" for name in ("one", "two") for i in range(10)]
    (tmp_path / "labels.csv").write_text("\n".join(["path,label", *lines]))
    for path in (tmp_path / "labels.csv", tmp_path):
        assert set(trained(str(path), "word").backend.get_vocab()) == {"<pad>", "one", "two"}
        assert set(clips(path).transcripts(range(10))) == {"one", "two"}


def test_clips_in_memory_are_the_same(tmp_path):
    lengths = [0.1, 0.3, 0.05, 0.2, 0.15, 0.1]
    parquet(tmp_path, audio=[wav(i, s) for i, s in enumerate(lengths)])
    kept, read = clips(tmp_path, in_memory=True), clips(tmp_path, in_memory=False)
    a, b = kept.read([5, 0, 2, 2]).data, read.read([5, 0, 2, 2]).data
    assert len(a) == 4 and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert kept.lengths.tolist() == [round(s * RATE) for s in lengths]
    assert torch.equal(kept.lengths.argsort(stable=True), read.lengths.argsort(stable=True))  # of bytes
    files = folder(tmp_path / "files", [f"{split}/{i}.wav" for split in ("train", "test") for i in range(3)])
    assert clips(files, in_memory=False).lengths.tolist() == [(files / "train/0.wav").stat().st_size] * 3


@pytest.mark.parametrize("in_memory", [True, False])
def test_unreadable_clips_are_replaced_counted_and_reported(tmp_path, in_memory, caplog):
    bad = {3: b"", 11: b"no sound" * 30, 20: encoded(sine(0, 1))[:3000]}
    parquet(tmp_path, 40, audio=[bad.get(i, wav(i)) for i in range(40)], transcript=list("ab" * 20))
    tokenizer, listed = trained(str(tmp_path)), tmp_path / "bad.jsonl"

    def read():
        with caplog.at_level(logging.WARNING):
            found = clips(tmp_path, tokenizer, in_memory=in_memory, bad_samples=listed)
            return found, found.read(list(range(40)))

    found, samples = read()
    rows = samples.rows.tolist()
    assert sorted(found.bad) == sorted(bad) == [i for i in range(40) if rows[i] != i]
    assert [number_of(x) for x in samples.data.clips] == rows  # a stand-in is a whole row:
    assert samples.data.transcripts == ["ab"[row % 2] for row in rows]
    assert read()[1].rows.tolist() == rows
    lines = [json.loads(line) for line in listed.read_text().splitlines()]
    assert [x["row"] for x in lines] == sorted(bad) and all("parquet row" in x["clip"] and x["reason"] for x in lines)
    assert "skipped an unreadable clip" in caplog.text and "(3 so far)" in caplog.text


def test_too_many_unreadable_clips_end_the_run(tmp_path):
    parquet(tmp_path, 30, audio=[b"x" * 99 if i % 3 else wav(i) for i in range(30)])
    with pytest.raises(UserError, match=r"clips of .* are unreadable, such as .*no sound file"):
        clips(tmp_path)


def test_mistakes_are_one_line(tmp_path):
    parquet(tmp_path)
    tokenizer = trained(str(tmp_path))
    pictures, plain, other = tmp_path / "pictures", tmp_path / "plain", tmp_path / "other"
    folder(pictures, ["a.png", "b.png"])
    folder(plain, ["a.wav", "b.wav"])
    other.mkdir()
    parquet(other, transcript=["zero", "one", "naïve", "two", "two", "two"])
    cases = [
        ((tmp_path / "nowhere",), {}, "no file or folder"),
        ((pictures,), {}, r"no audio clips in .*looked for .wav"),
        ((plain, tokenizer), {}, "files without transcripts: list them"),
        ((tmp_path,), {"audio_column": "sound"}, "no column 'sound'"),
        ((tmp_path, tokenizer), {"transcript_column": "words"}, "'words' is not there"),
        ((other, tokenizer), {}, r"the transcript 'naïve' cannot be learned: .*no token for '.*ï'"),
    ]
    for words, options, message in cases:
        with pytest.raises(UserError, match=message) as error:
            clips(*words, **options)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="sampling_rate is 16"):
        Clips(tmp_path, sampling_rate=16)
    with pytest.raises(UserError, match="no transcripts and no classes"):
        trained(str(plain))
