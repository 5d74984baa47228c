"""A run that saves at every step is killed again and again, its folder on another filesystem than the temporary one."""

import csv
import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

import pytest
from training import TINY, start

from ssl_lab.train.checkpoint import damage, find, stored

KILLS = 50  # a few of them in an ordinary run of the tests
MEMORY = Path("/dev/shm")
WORDS = [*TINY, "duration=100000steps", "save_steps=1", "ema=0.9", "method.encoder.dim=64"]


@pytest.fixture(scope="module")
def out():
    """A run folder that outlives its kills."""
    if not MEMORY.is_dir() or os.stat(MEMORY).st_dev == os.stat(tempfile.gettempdir()).st_dev:
        pytest.skip("there is no second filesystem, /dev/shm, here")
    folder = Path(tempfile.mkdtemp(dir=MEMORY))
    yield folder / "run"
    shutil.rmtree(folder)


def logged(out: Path) -> int:
    """The last step whose numbers are whole."""
    if not (out / "metrics.csv").exists():
        return 0
    with open(out / "metrics.csv", newline="") as file:
        return max((int(row["step"]) for row in csv.DictReader(file) if row["step"].isdigit()), default=0)


def saved(out: Path) -> int:
    found = find(out)
    return 0 if found is None else int(found.stem.partition("=")[2])


@pytest.mark.faults("C1", "SIGKILL in or around a save, folder on another filesystem: goes on, no damaged file")
@pytest.mark.parametrize("kill", [k if k < 4 else pytest.param(k, marks=pytest.mark.slow) for k in range(KILLS)])
def test_killed_while_it_saves(out, tmp_path, figure, kill):
    """Every other time inside the writing of a file (some 1,300 writes each), else at any moment."""
    draw, before = random.Random(kill), saved(out)
    inside = kill % 2 == 0
    process = start([*WORDS, f"out={out}"], ("save", draw.randint(1800, 6000)) if inside else None, tmp_path / "log")
    if not inside:
        deadline = time.monotonic() + 60
        while saved(out) <= before + 1 and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(draw.uniform(0, 0.3))
        process.kill()
    process.join(120)
    text = (tmp_path / "log").read_text()
    assert process.exitcode == -signal.SIGKILL, text
    after = saved(out)
    assert after > before, text
    damaged = [path.name for path in stored(out / "checkpoints") if damage(path)]
    assert not damaged
    figure("steps repeated", logged(out) - after)
    assert logged(out) - after <= 1
    left = [path.name for path in out.rglob(".*.tmp") if f".{process.pid}." not in path.name]
    assert not left  # the process that was killed before this one may have left some; they are gone by now
