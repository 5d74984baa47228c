"""`-m`: every combination is checked before the first runs; one failure does not stop the others."""

import json
import sys
from types import SimpleNamespace

import pytest

from ssl_lab.cli.main import main
from ssl_lab.errors import UserError


def sweep(line):
    """Exit code of `ssl-lab -m` with these words."""
    return main(["-m", *line.split()])


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Run in an empty folder with a stand-in for training; gives the configurations it was called with."""
    monkeypatch.chdir(tmp_path)
    seen = []

    def run(cfg):
        seen.append(cfg)
        if cfg.seed == 13:
            raise UserError("seed 13 brings bad luck")
        if cfg.seed == 14:
            raise ZeroDivisionError("a bug")

    monkeypatch.setitem(sys.modules, "ssl_lab.cli.train", SimpleNamespace(run=run))
    return seen


def statuses(tmp_path):
    (file,) = tmp_path.glob("runs/sweeps/*/jobs.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_every_combination_runs(runs, tmp_path, capsys):
    assert sweep("method=mae seed=0,1 optim.lr=0.1,0.2") == 0
    assert [(c.seed, c.optim.lr) for c in runs] == [(0, 0.1), (0, 0.2), (1, 0.1), (1, 0.2)]
    assert "4 ok, 0 failed" in capsys.readouterr().out
    assert {s["status"] for s in statuses(tmp_path)} == {"ok"}
    written = {str(p.relative_to(tmp_path)).split("/")[1] for p in tmp_path.rglob("*") if p.is_file()}
    assert written == {"sweeps"}, "nothing but the sweep's own folder"


def test_jobs_that_differ_in_more_than_the_seed_get_their_own_folder(runs):
    assert sweep("method=mae seed=0,1 optim.lr=0.1,0.2") == 0
    assert [c.out for c in runs] == [
        "runs/mae-optim.lr=0.1/0",
        "runs/mae-optim.lr=0.2/0",
        "runs/mae-optim.lr=0.1/1",
        "runs/mae-optim.lr=0.2/1",
    ]


def test_jobs_that_differ_in_the_seed_keep_the_usual_folder(runs):
    assert sweep("method=mae seed=0,1") == 0
    assert [c.out for c in runs] == ["runs/mae/0", "runs/mae/1"]


def test_one_folder_for_all_is_refused(runs, capsys):
    assert sweep("method=mae out=here optim.lr=0.1,0.2") == 2
    assert "here" in capsys.readouterr().err
    assert not runs


@pytest.mark.faults("C9", "jobs of a sweep fail: the others run, code 1")
def test_a_failing_job_does_not_stop_the_others(runs, tmp_path, capsys):
    assert sweep("method=mae seed=0,13,14,15") == 1
    assert len(runs) == 4
    captured = capsys.readouterr()
    assert "2 ok, 2 failed" in captured.out
    assert "bad luck" in captured.out
    assert "ZeroDivisionError" in captured.err
    assert [s["status"] for s in statuses(tmp_path)] == ["ok", "failed", "failed", "ok"]


def test_a_mistake_in_any_job_is_found_before_the_first(runs, tmp_path, capsys):
    assert sweep("method=mae optim.name=adamw,adamm") == 2
    assert "adamm" in capsys.readouterr().err
    assert not runs
    assert not list(tmp_path.iterdir())


def test_short_forms_work_in_sweeps(runs):
    assert sweep("method=mae backbone=vit_ti4,vit_s16 method.encoder.num_registers=0,4") == 0
    assert [(c.method.encoder.patch_size, c.method.encoder.num_registers) for c in runs] == [
        (4, 0),
        (4, 4),
        (16, 0),
        (16, 4),
    ]
    assert len({c.out for c in runs}) == 4


def test_an_interrupt_ends_the_sweep(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(cfg):
        if cfg.seed == 1:
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "ssl_lab.cli.train", SimpleNamespace(run=run))
    assert sweep("method=mae seed=0,1,2") == 130
    assert "1 ok, 0 failed, 2 not run" in capsys.readouterr().out
