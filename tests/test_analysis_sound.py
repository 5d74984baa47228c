"""Pictures of sound: boxes stand where tokens were said, counts are those of a loop, and runs leave them behind."""

import torch

from ssl_lab.analysis.confusion import confusion_counts, confusion_matrix, most_confused
from ssl_lab.analysis.neighbours import OTHER, SAME
from ssl_lab.analysis.spectrogram import Span, Utterance, alignments
from ssl_lab.cli.main import main

TOKEN, WORD = (222, 235, 247), (158, 202, 225)
TINY = [
    "duration=2steps", "data.batch_size=4", "trainer.enable_progress_bar=false", "trainer.accelerator=cpu",
    *(f"method.encoder.{word}" for word in ("dim=16", "depth=1", "num_heads=2", "stem.channels=8")),
]  # fmt: skip


def where(picture, colour):
    """(H, W) bool."""
    return (picture == torch.tensor(colour, dtype=torch.uint8)[:, None, None]).all(0)


def utterance(said="ab", frames=100):
    energies = torch.full((frames, 20), -20.0)
    energies[40:60, 5:8] = 3.0
    spans = [Span("a", 0.2, 0.3), Span("b", 0.6, 0.68)]
    return Utterance(energies, spans, [Span("ab", 0.2, 0.68)], said)


def test_boxes_stand_at_their_times_below_what_was_loud():
    picture = alignments([utterance()], 0.01, 4000)
    left, rate = 64, 600  # six pixels a frame
    for colour, spans in ((TOKEN, [(0.2, 0.3), (0.6, 0.68)]), (WORD, [(0.2, 0.68)])):
        columns = where(picture, colour).any(0).nonzero()[:, 0]
        for start, end in spans:
            inside = columns[(columns >= left + start * rate - 3) & (columns <= left + end * rate + 3)]
            assert abs(int(inside.min()) - (left + start * rate)) <= 2
            assert abs(int(inside.max()) - (left + end * rate)) <= 3
        outside = (columns < left + spans[0][0] * rate - 3) | (columns > left + spans[-1][1] * rate + 3)
        assert not outside.any()
    mels = picture[:, 26:146, left : left + 600].sum(0)
    loud = (mels > 500).nonzero()
    assert 230 < loud[:, 1].min() < 250 and 350 < loud[:, 1].max() < 370  # frames 40 to 60
    assert loud[:, 0].min() > 60  # low bins are below


def test_the_heading_says_whether_it_is_right():
    right, wrong = (alignments([utterance(said)], 0.01, 4000) for said in ("ab", "ac"))
    assert where(right, SAME).any() and not where(right, OTHER).any()
    assert where(wrong, OTHER).any() and not where(wrong, SAME).any()
    both = alignments([utterance(), utterance(None, 50)], 0.01, 4000)
    assert both.shape[1] == 2 * right.shape[1] and not where(both[:, right.shape[1] :], SAME).any()
    assert alignments([Utterance(torch.zeros(3, 20), [], [], None)], 0.01, 4000).dtype == torch.uint8


def test_confusions_are_counted_as_in_a_loop():
    generator = torch.Generator().manual_seed(0)
    predicted, target = torch.randint(0, 4, (2, 60), generator=generator)
    target[:5] = -1
    counts = confusion_counts(predicted, target, 4)
    naive = torch.zeros(4, 4, dtype=torch.int64)
    for p, t in zip(predicted.tolist(), target.tolist(), strict=True):
        if t >= 0:
            naive[t, p] += 1
    assert torch.equal(counts, naive)
    names = ["ant", "bee", "cat", "a dog with a very long name indeed"]
    row, column = divmod(int(naive.fill_diagonal_(0).argmax()), 4)
    assert most_confused(counts, names)[0] == f"{names[row]} as {names[column]} ({int(naive[row, column])})"
    assert most_confused(torch.eye(4), names) == []
    picture = confusion_matrix(torch.eye(4, dtype=torch.int64) * 3, names)
    assert where(picture, (0, 109, 80)).any() and not where(picture, (178, 24, 43)).any()
    assert confusion_matrix(torch.ones(60, 60), [str(i) for i in range(60)]).shape[1] < 900


def test_runs_of_both_kinds_leave_their_pictures(tmp_path, capsys):
    size = ["data.train.length=16", "data.test.length=12"]
    words = ["method=audio_classification", *TINY, *size, "eval=[accuracy]", f"out={tmp_path / 'a'}"]
    assert main(words) == 0, capsys.readouterr().err
    assert main(["evaluate", f"ckpt={tmp_path / 'a'}", "eval=[accuracy]"]) == 0, capsys.readouterr().err
    assert {p.name for p in (tmp_path / "a/pictures").iterdir()} >= {"index.html", "confusion.png", "map.png"}
    assert "Most often confused" in (tmp_path / "a/pictures/index.html").read_text()
    size += ["data.train.source.length=20", "data.test.source.length=20"]
    words = ["method=ctc", *TINY, *size, "eval=[wer]", "picture_steps=1", f"out={tmp_path / 'b'}"]
    assert main(words) == 0, capsys.readouterr().err
    assert (tmp_path / "b/pictures/alignment_step=2.png").is_file()
    assert main(["evaluate", f"ckpt={tmp_path / 'b'}", "eval=[wer]"]) == 0, capsys.readouterr().err
    assert (tmp_path / "b/pictures/alignment.png").is_file()
    assert "time/real_time_factor" in (tmp_path / "b/metrics.json").read_text()
