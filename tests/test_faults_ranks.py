"""Two ranks: one dies or hangs, the number of ranks changes."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from test_dist import PLAIN, TWO, finished
from test_orphans import of_session
from training import TINY, rows

from ssl_lab.train.checkpoint import find, read

FAULTY = """
import os, signal, time
from ssl_lab import dist
from ssl_lab.methods.mae import MAE
class Faulty(MAE):
    def step(self, batch, progress):
        if self.global_step == 3 and dist.rank() == 1:
            {fault}
        return super().step(batch, progress)
"""
FAULTS = {
    "killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "raises": "raise RuntimeError('a bug')",
    "hangs": "time.sleep(1000)",
}


@pytest.mark.slow
@pytest.mark.faults("C8", "one of two ranks is killed, raises, hangs: all end, not with 0, no process left")
@pytest.mark.parametrize("fault", FAULTS)
def test_the_other_rank_does_not_wait_for_ever(tmp_path, figure, fault):
    (tmp_path / "faulty.py").write_text(FAULTY.format(fault=FAULTS[fault]))
    words = [*TINY, *TWO, "method._target_=faulty.Faulty", "trainer.strategy.timeout.minutes=0.25"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", "ssl_lab", *words, f"out={tmp_path / 'run'}"]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        code = process.wait(120)
        deadline = time.monotonic() + 20
        while of_session(process.pid) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert code != 0, (tmp_path / "log").read_text()
        assert not of_session(process.pid)
        assert find(tmp_path / "run").name == "step=2.ckpt"
    finally:
        for left in of_session(process.pid):
            os.kill(left, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.faults("C4", "2 ranks become 1, 1 becomes 2, the global batch the same: what one process learns")
@pytest.mark.parametrize(("first", "then"), [(TWO, []), ([], TWO)], ids=["2 to 1", "1 to 2"])
def test_the_number_of_ranks_changes(tmp_path, first, then):
    whole, out = tmp_path / "whole", tmp_path / "out"
    words = [*PLAIN, "duration=8steps", "optim.name=sgd", "optim.lr=0.1"]
    finished([*words, f"out={whole}"])
    (tmp_path / "leaving.py").write_text(
        "import os, signal\n"
        "from ssl_lab import dist\n"
        "from ssl_lab.methods.supervised import Supervised\n"
        "class Leaving(Supervised):\n"
        "    def step(self, batch, progress):\n"
        "        if self.global_step == 3 and dist.rank() == 0 and os.environ.get('LEAVE'):\n"
        "            os.kill(os.getpid(), signal.SIGTERM)\n"
        "        return super().step(batch, progress)\n"
    )
    path = {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    words += ["method._target_=leaving.Leaving", f"out={out}"]
    finished([*words, *first], code=75, LEAVE="1", **path)
    assert find(out).name == "step=4.ckpt"
    finished([*words, *then], **path)
    a, b = (read(find(folder))["state_dict"] for folder in (whole, out))
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=1e-4, atol=1e-6, msg=name)
    losses = [[float(row["train/loss"]) for row in rows(folder)] for folder in (whole, out)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
