"""A run that dies without a word takes its loader's processes with it, however Python starts them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training import TINY

RUN = """
import multiprocessing, sys
from ssl_lab.cli.main import main
if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv.pop(1))
    sys.exit(main(sys.argv[1:]))
"""


def of_session(leader: int) -> list[int]:
    """Living processes of the session that `leader` began."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session = status.read_text().rsplit(")", 1)[1].split()[:4]
        except OSError:  # ended meanwhile
            continue
        if int(session) == leader and state not in "ZX":
            found.append(int(status.parent.name))
    return found


@pytest.mark.faults("C8", "SIGKILL of a run with loader workers: no process left")
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="counts processes in /proc")
@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_nothing_survives_a_killed_run(tmp_path, method):
    script, out = tmp_path / "run.py", tmp_path / "run"
    script.write_text(RUN)
    words = [*TINY, "duration=4000steps", "trainer.log_every_n_steps=10", "data.num_workers=2", f"out={out}"]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, str(script), method, *words], stdout=log, stderr=log, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 120
        while not ((out / "metrics.csv").exists() and (out / "metrics.csv").stat().st_size):
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.1)
        assert len(of_session(process.pid)) >= 3  # training and its two workers: else this test shows nothing
        process.kill()
        process.wait()
        deadline = time.monotonic() + 30
        while of_session(process.pid) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not of_session(process.pid)
    finally:
        for left in of_session(process.pid):
            os.kill(left, signal.SIGKILL)
