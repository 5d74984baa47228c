"""`ssl-lab doctor` says what is there, and what to do about what is not."""

import shutil
from types import SimpleNamespace

import torch

from ssl_lab.cli import machine
from ssl_lab.cli.doctor import unavailable
from ssl_lab.cli.main import main
from ssl_lab.nn.attend import KERNELS


def test_report(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["doctor", "data.path=no/such/folder"]) == 0
    text = capsys.readouterr().out
    for word in ("torchvision", "processor", "shapes", "wandb", "free disk", "cpu bfloat16", *KERNELS):
        assert word in text, word
    assert "no/such/folder" in text
    assert "1 problem" in text or "problems" in text
    assert not list(tmp_path.iterdir())


def test_kernels_are_tried():
    assert unavailable("eager", "cpu", torch.float32) is None
    assert "CUDA" in (unavailable("cudnn", "cpu", torch.float32) or "")


def test_full_disk_and_small_shared_memory_are_problems(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=64 << 20, free=1 << 20))
    problems = [finding.problem for finding in machine.disk(tmp_path / "runs") if finding.problem]
    assert any("out=" in problem for problem in problems)
    assert any("num_workers=0" in problem for problem in problems)


def test_mismatched_torchvision_is_a_problem(monkeypatch):
    monkeypatch.setattr(machine.metadata, "requires", lambda name: ["torch==1.0.0"])
    assert "made for torch 1.0.0" in (machine._pair() or "")


def test_wandb_key_is_looked_for_but_not_shown(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert not machine._has_key()
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password not-a-real-one\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert machine._has_key()
    assert all("not-a-real-one" not in finding.value for finding in machine.tracking())
