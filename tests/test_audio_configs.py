"""The data sets of sound in conf/: what they build, and the shapes of their batches."""

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sounds import encoded, sine, wav

from ssl_lab.cli import catalog
from ssl_lab.cli.compose import build, compose

WORDS = ["zero", "one", "two"]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def data(name, *words):
    """Any method that composes will do: only the data are built."""
    given = ["method=supervised", "backbone=resnet18", f"data={name}", "views@data.views=audio", *words]
    return build(compose("train", given, [catalog.conf_folder()]).data)


def first(module):
    return next(iter(module.train_dataloader())), next(iter(module.eval_loader("test")))


def check(batch, size, rate, *, labels):
    assert batch["audio"].shape == batch["audio_valid"].shape and len(batch["audio"]) == size
    assert batch["audio"].dtype == torch.float32 and batch["audio_valid"].dtype == torch.bool
    assert batch["audio"].shape[1] % (rate // 10) == 0 and batch["audio_valid"].any(1).all()
    assert batch["target"].shape == batch["index"].shape == (size,)
    assert ("labels" in batch) == labels
    if labels:
        assert batch["labels"].dtype == torch.int64 and (batch["labels"][:, 0] >= 1).all()


@pytest.mark.parametrize("name", ["tones", "tones_sequences"])
def test_generated_sets(name):
    module = data(name, "data.train.length=40", "data.test.length=6", "data.batch_size=5")
    train, test = first(module)
    check(train, 5, 8000, labels=name != "tones")
    check(test, 5, 8000, labels=name != "tones")
    assert "position" in train and "position" not in test
    if name == "tones":
        assert len(module.classes) == 10 and train["target"].min() >= 0 and module.tokenizer is None
    else:
        text = module.tokenizer.decode(test["labels"][0][test["labels"][0] >= 0])
        assert module.tokenizer.pad == 0 and module.test.transcripts([0]) == [text]


@pytest.mark.parametrize("name", ["digits", "digits_connected", "speech", "audio"])
def test_recorded_sets(name, tmp_path):
    pytest.importorskip("soundfile", reason="soundfile is not installed")
    pytest.importorskip("soxr", reason="soxr is not installed")
    for split, count in (("train", 12), ("test", 5)):
        clips = [wav(i, 0.3) if i % 2 else encoded(sine(i, 0.4, 44100), 44100, "FLAC") for i in range(count)]
        columns = {"audio": clips, "label": [i % 3 for i in range(count)]}
        columns["transcript"] = [WORDS[i % 3] for i in range(count)]
        table = pa.table(columns).replace_schema_metadata({"classes": '["zero", "one", "two"]'})
        pq.write_table(table, tmp_path / f"{split}.parquet")
    module = data(name, f"data.path={tmp_path}", "data.batch_size=4", "data.num_workers=0")
    rate = module.sampling_rate
    assert rate == (8000 if name.startswith("digits") else 16000)
    labels = name in ("digits_connected", "speech")
    train, test = first(module)
    check(train, 4, rate, labels=labels)
    check(test, 4, rate, labels=labels)
    assert (module.classes == WORDS) == (name != "digits_connected")
    if name == "digits_connected":
        seen = {row for i in range(200) for row in module.test.rows_of(i)}
        assert seen == set(range(5)) and module.test.source.split == "test"
    else:
        assert test["audio_valid"].sum(1).tolist() == [round(x * rate) for x in (0.4, 0.3, 0.4, 0.3)]
