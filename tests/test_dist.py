"""Two gloo processes on the CPU learn what one process learns from the joined batch, and end together."""

import csv
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from training import TINY, rows, same_end

from ssl_lab import dist
from ssl_lab.train.checkpoint import facts, find, read

PLAIN = ["method=supervised", "method.mixup=null"] + [
    w for w in TINY if not w.startswith(("method=", "method.decoder"))
]
TWO = ["strategy=ddp", "trainer.devices=2", "data.batch_size=4"]


def launch(words, **options):
    """A command line in a process of its own, since Lightning starts the second one by repeating it."""
    env = os.environ | {"OMP_NUM_THREADS": "1"} | options
    command = [sys.executable, "-m", "ssl_lab", *map(str, words)]
    return subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finished(words, code=0, **options):
    process = launch(words, **options)
    text, _ = process.communicate(timeout=180)
    assert process.returncode == code, text
    return text


def test_training_on_two_ranks_equals_one(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    words = [*PLAIN, "duration=4steps", "optim.name=sgd", "optim.lr=0.1"]  # Adam makes a step of a gradient of 1e-9 too
    finished([*words, f"out={one}"])
    finished([*words, *TWO, f"out={two}"])
    a, b = (read(find(out))["state_dict"] for out in (one, two))
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=1e-4, atol=1e-6, msg=name)
    for left, right in zip(rows(one), rows(two), strict=True):
        assert left["step"] == right["step"]
        assert float(left["train/loss"]) == pytest.approx(float(right["train/loss"]), abs=1e-5)
    with open(two / "metrics.csv", newline="") as file:
        shares = [float(row["time/communication"]) for row in csv.DictReader(file) if row["time/communication"]]
    assert shares and all(0 <= share <= 1 for share in shares) and any(shares)
    assert "time/communication" not in (one / "metrics.csv").read_text()
    assert facts(find(two))["world_size"] == 2 and facts(find(two))["samples_per_step"] == 8
    text = finished([*words, f"out={two}", "data.batch_size=4"], code=2)
    assert "samples per step" in text


def test_other_threads_are_alone_too(monkeypatch):
    """As those in which CUDA computes checkpointed blocks again."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    found = []
    with dist.alone():
        thread = threading.Thread(target=lambda: found.append(dist.world_size()))
        thread.start()
        thread.join()
    assert found == [1] and dist.world_size() == 2


def wait_for(path):
    for _ in range(1200):
        if path.exists():
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} did not appear")


@pytest.mark.faults("C2", "SIGTERM, SIGKILL of two ranks: the same end to the bit")
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_two_ranks_go_on_where_they_were(tmp_path, number):
    whole, out = tmp_path / "whole", tmp_path / "out"
    words = [*TINY, *TWO, "ema=0.9", "duration=60steps", "eval=[knn]", "eval.knn.k=3", "eval.knn.every=7"]
    finished([*words, f"out={whole}"])
    process = launch([*words, f"out={out}"])
    wait_for(out / "checkpoints" / "step=12.ckpt")
    process.send_signal(number)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == (75 if number == signal.SIGTERM else -9), text
    finished([*words, f"out={out}"])
    same_end(whole, out)
