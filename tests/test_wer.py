"""Word error rate: counted by hand, in order, and skipped where nothing was said."""

import pytest
import torch
from torch import nn

from ssl_lab.cli.catalog import conf_folder
from ssl_lab.cli.compose import build, compose
from ssl_lab.data.audio_joined import Joined
from ssl_lab.data.audio_tokenizer import trained
from ssl_lab.data.tones import Tones
from ssl_lab.evals.runner import run_all
from ssl_lab.evals.wer import WordErrorRate


@pytest.fixture(scope="module")
def data():
    size = ["data.train.length=4", "data.test.length=5", "data.test.source.length=40", "data.train.source.length=40"]
    words = ["method=supervised", "backbone=resnet18", "data=tones_sequences", "views@data.views=audio_whole"]
    made = build(compose("train", [*words, *size, "data.batch_size=2"], [conf_folder()]).data)
    made.setup("test")
    return made


class Hears(nn.Module):
    """Says what it is told about each row of the test data, by way of its labels."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def transcribe(self, batch, *, num_beams=1):
        return [self.change(row[row >= 0].tolist()) for row in batch["labels"]]


def measured(data, change, **settings):
    rows = run_all({"wer": WordErrorRate(**settings)}, Hears(change), data)
    return {row.name: row.value for row in rows}


def test_the_right_words_have_no_errors(data):
    found = measured(data, lambda ids: ids)
    factor = found.pop("time/real_time_factor")
    assert 0 < factor < 1 and found == {"wer": 0, "cer": 0, "rows/right": 100}


def test_edits_are_counted_over_all_words(data):
    texts = data.test.transcripts(range(5))
    total = sum(len(text.split()) for text in texts)
    blank = data.tokenizer.encode(" ")
    hum = data.tokenizer.encode("hum")
    found = measured(data, lambda ids: ids + blank + hum)  # one insertion in each row
    assert found["wer"] == pytest.approx(100 * 5 / total)
    assert found["cer"] == pytest.approx(100 * 5 * 4 / sum(map(len, texts)))
    assert found["rows/right"] == 0
    assert measured(data, lambda ids: [])["wer"] == 100
    assert measured(data, lambda ids: ids, max_tokens=1)["wer"] > 50


def test_data_without_transcripts_are_skipped(data, capsys):
    class Plain:
        tokenizer = None
        test = None

    assert run_all({"wer": WordErrorRate()}, Hears(list), Plain()) == []
    assert "no transcripts" in capsys.readouterr().out
    assert isinstance(data.test, Joined) and isinstance(data.test.source, Tones)
    assert trained("tones").pad == 0 and torch.tensor(data.tokenizer.encode("hum")).min() > 0
