"""`ssl-lab scaling`: cells are made, run once, told when they fail, and fitted. Most tests train nothing."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image

from ssl_lab.cli import scaling
from ssl_lab.cli.main import main

LAW = {"E": 1.2, "A": 20.0, "B": 300.0, "alpha": 0.4, "beta": 0.5}
FAKE = """
import json, os, sys, time, yaml
cfg = yaml.safe_load(open(sys.argv[1])); out = cfg["out"]
open("calls", "a").write(os.path.basename(out) + chr(10))
dim, steps = cfg["method"]["decoder"]["dim"], int(cfg["duration"].removesuffix("steps"))
if dim == 24 and not os.path.exists("mended"): sys.exit("no luck with 24")
if os.path.exists("slow"):
    open("begun", "w").write("x"); time.sleep(60)
n, d = 100 * dim * dim, 1000 * steps
loss = 1.2 + 20 / n ** 0.4 + 300 / d ** 0.5
json.dump({"trained": n, "blocks": n // 2, "samples": steps, "tokens": d, "epochs": steps / 100, "flops": 7000 * n},
          open(out + "/cell.json", "w"))
cfg["method"]["decoder"]["vocab_size"] = 65  # as training enters what the data decide
yaml.safe_dump(cfg, open(out + "/config.yaml", "w"))
rows = [dict(subject="trained", step=steps, evaluator="perplexity", name="nats", value=loss, samples={}, protocol={},
             seconds=0, time="")]
json.dump(rows, open(out + "/metrics.json", "w"))
with open(out + "/metrics.csv", "w") as f:
    rows = (f"{s},{9 if s <= steps * 0.9 else 3}" for s in range(1, steps + 1))
    f.write(chr(10).join(["step,train/loss", *rows]) + chr(10))
"""
WORDS = ["scaling", "method=causal_lm", "sizes=[16,24,32,64]", "durations=[100steps,400steps,1600steps]", "out=sweep"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder, and cells that are a stand-in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setattr(scaling, "COMMAND", [sys.executable, str(tmp_path / "fake.py")])
    return tmp_path


def calls(folder):
    return (folder / "calls").read_text().split()


def test_a_failing_cell_is_told_and_the_others_run_once(folder, capsys):
    with pytest.raises(SystemExit) as left:
        main(WORDS)
    assert left.value.code == 1
    said = capsys.readouterr().out
    assert "failed, exit code 1, no luck with 24" in said and len(calls(folder)) == 12
    (folder / "mended").touch()
    assert main(WORDS) == 0
    assert len(calls(folder)) == 15 and "there already" in capsys.readouterr().out
    made = json.loads((folder / "sweep/scaling.json").read_text())
    law = made["laws"]["Chinchilla"]["law"]
    assert {name: pytest.approx(value, rel=1e-3) for name, value in law.items()} == LAW
    assert len(made["measured"]) == 12 and made["work"] == pytest.approx(7.0) and not made["failed"]
    best = made["best"][0]
    assert best["parameters"] * best["tokens"] * 7 == pytest.approx(best["flops"]) and best["times_largest"] == 1
    assert "| Chinchilla | 10 x the largest run |" in (folder / "sweep/scaling.md").read_text()
    pixels = torch.tensor(list(Image.open(folder / "sweep/scaling.png").getdata()))
    assert len(pixels.unique(dim=0)) > 10


def test_a_width_keeps_the_shape_of_the_network(folder):
    (folder / "mended").touch()
    words = [*WORDS, "sizes=[64,{dim: 16, depth: 7}]", "durations=[10steps]", "method.decoder.depth=6"]
    assert main([*words, "method.decoder.dim=128", "method.decoder.num_heads=4"]) == 0
    assert sorted(calls(folder)) == ["dim=16,depth=7_10steps", "dim=64,depth=3,num_heads=2_10steps"]
    made = json.loads((folder / "sweep/scaling.json").read_text())
    assert not made["laws"] and "there are 2 with 2 and 1" in made["notes"][0]


def test_what_stands_for_size_and_loss_can_be_chosen(folder):
    (folder / "mended").touch()
    assert main([*WORDS, "sizes=[16]", "durations=[100steps]", "count=blocks", "loss=train"]) == 0
    (one,) = json.loads((folder / "sweep/scaling.json").read_text())["measured"]
    assert (one["parameters"], one["loss"], one["unit"]) == (50 * 16 * 16, 3.0, "tokens")


def test_own_sizes_and_lengths_without_a_word(folder):
    (folder / "mended").touch()
    assert main(["scaling", "method=causal_lm", "duration=40steps", "out=sweep"]) == 0  # gpt: dim 256, depth 6, 4 heads
    assert len(calls(folder)) == 15 and calls(folder)[0] == "dim=64,depth=2,num_heads=1_10steps"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sizes=[3]"], "even widths of at least 8"),
        (["durations=[long]"], "duration=long: write a number and a unit"),
        (["network=method.nothing"], "network=method.nothing: there is no such part"),
        (["count=most"], "write trained or blocks"),
    ],
)
def test_mistakes_are_told_before_anything_runs(folder, words, said, capsys):
    assert main([*WORDS, *words]) == 2
    assert said in capsys.readouterr().err and not (folder / "calls").exists()


def test_another_sweep_is_refused_in_its_folder(folder, capsys):
    (folder / "mended").touch()
    assert main([*WORDS, "sizes=[16]"]) == 0
    assert main([*WORDS, "sizes=[16]", "optim.lr=0.5"]) == 2
    assert "optim.lr: not set there, 0.5 here" in capsys.readouterr().err


def test_a_signal_reaches_the_cell_and_ends_the_sweep(folder):
    (folder / "slow").touch()
    code = "import sys; from ssl_lab.cli import scaling; from ssl_lab.cli.main import main; "
    code += f"scaling.COMMAND = [sys.executable, 'fake.py']; sys.exit(main({WORDS!r}))"
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 120
    while not (folder / "begun").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(60) == 75
    assert not (folder / "sweep/scaling.json").exists() and len(calls(folder)) == 1


def test_a_real_cell(tmp_path, monkeypatch):
    """The whole way once: a process of its own, its facts counted on the real network."""
    monkeypatch.chdir(tmp_path)
    small = ["data.rows=64", "data.batch_size=4", "trainer.accelerator=cpu", "eval=[perplexity]"]
    words = ["scaling", "method=causal_lm", "sizes=[{dim: 16, depth: 1, num_heads: 1}]", "durations=[3steps]"]
    code = main([*words, *small, "out=sweep"])
    logs = "".join(path.read_text() for path in tmp_path.glob("sweep/*/log.txt"))
    assert code == 0, logs
    (one,) = json.loads((tmp_path / "sweep/scaling.json").read_text())["measured"]
    assert one["unit"] == "tokens" and one["tokens"] == 3 * 4 * 128 and 2 < one["loss"] < 5
    assert (tmp_path / "sweep/dim=16,depth=1,num_heads=1_3steps/last.safetensors").exists()
