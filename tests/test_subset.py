"""Training on some rows: the first, or a balanced share of the labelled ones."""

import pytest
import torch

from ssl_lab.data import source as module
from ssl_lab.data.audio_module import AudioModule
from ssl_lab.data.audio_views import WholeAudio
from ssl_lab.data.source import Subset, subset
from ssl_lab.data.tones import Tones
from ssl_lab.errors import UserError


def words(length: int = 200) -> Tones:
    return Tones("train", length)


def test_a_share_has_equally_many_of_each_class_and_grows():
    source = words()
    few, more = subset(source, 0.1, 0), subset(source, 0.5, 0)
    assert isinstance(few, Subset) and isinstance(more, Subset)
    targets = few.read(range(len(few))).targets
    counts = targets.bincount(minlength=len(source.classes))
    assert counts.tolist() == [round(0.1 * 200 / len(source.classes))] * len(source.classes)
    assert set(few.rows.tolist()) < set(more.rows.tolist())
    assert torch.equal(few.rows, subset(source, 0.1, 0).rows)
    assert not torch.equal(few.rows, subset(source, 0.1, 1).rows)


def test_rows_are_those_of_the_source_and_numbered_anew():
    source = words()
    few = subset(source, 0.1, 0)
    found, whole = few.read([3, 1]), source.read(few.rows[[3, 1]].tolist())
    assert found.rows.tolist() == [3, 1]
    assert torch.equal(found.targets, whole.targets)
    assert all(torch.equal(a, b) for a, b in zip(found.data, whole.data, strict=True))
    assert torch.equal(subset(source, 5, 0).rows, torch.arange(5)) and len(subset(source, 500, 0)) == 200


def test_a_share_of_classes_without_a_label_is_refused(monkeypatch: pytest.MonkeyPatch):
    source = words()
    monkeypatch.setattr(module, "_targets", lambda source: torch.full((len(source),), -1))
    with pytest.raises(UserError, match=r"data\.rows=0\.1 of 0 .* leaves none"):
        subset(source, 0.1, 0)


def test_clips_of_like_length_are_batched_together_from_a_share_too():
    source = words()
    views = WholeAudio(8000)
    data = AudioModule(source, words(10), views, batch_size=4, eval_views=views, sampling_rate=8000, bucket=4, rows=0.2)
    seen = data._ordered(1)
    assert len(seen) == data.num_train == len(data.train) < 200
    assert data.classes == source.classes


def test_what_is_no_share_is_told():
    views = WholeAudio(8000)
    for rows in (0, -1, 2.5, 1.0):
        with pytest.raises(UserError, match=r"data.rows is .*: give a whole number, or a share"):
            AudioModule(words(), words(), views, batch_size=4, eval_views=views, sampling_rate=8000, rows=rows)
    with pytest.raises(UserError, match=r"data.rows=0.001 of 200 .* leaves none of some of the"):
        subset(words(), 0.001, 0)
    unlabelled = words()
    unlabelled.classes = []
    with pytest.raises(UserError, match="a share takes equally many of each class, and these words have none"):
        subset(unlabelled, 0.1, 0)
