"""Two ranks: one dies or hangs, both are told to stop or are killed again and again, their number changes."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from ranks import ended, logs, start_ranks
from test_dist import PLAIN, TWO, finished
from test_faults_kills import logged, saved
from test_orphans import of_session
from training import TINY, rows, same_end

from ssl_lab.train.checkpoint import damage, find, read, stored

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
def test_the_other_rank_does_not_wait_for_ever(tmp_path, fault):
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
@pytest.mark.parametrize(
    ("first", "then", "step"),
    [(TWO, [], 4), ([], TWO, 4), (TWO, ["data.batch_size=4", "trainer.accumulate_grad_batches=2"], 3)],
    ids=["2 to 1", "1 to 2", "2 to 1 that accumulates"],
)
def test_the_number_of_ranks_changes(tmp_path, first, then, step):
    whole, out = tmp_path / "whole", tmp_path / "out"
    words = [*PLAIN, "duration=8steps", "optim.name=sgd", "optim.lr=0.1"]
    finished([*words, f"out={whole}"])
    (tmp_path / "leaving.py").write_text(
        "import os, signal\n"
        "from ssl_lab import dist\n"
        "from ssl_lab.methods.supervised import Supervised\n"
        "class Leaving(Supervised):\n"
        "    def step(self, batch, progress):\n"
        "        if self.global_step == int(os.environ.get('LEAVE', 0)) - 1 and dist.rank() == 0:\n"
        "            os.kill(os.getpid(), signal.SIGTERM)\n"
        "        return super().step(batch, progress)\n"
    )
    path = {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    words += ["method._target_=leaving.Leaving", f"out={out}"]
    finished([*words, *first], code=75, LEAVE=str(step), **path)
    assert find(out).name == f"step={step}.ckpt"
    finished([*words, *then], **path)
    a, b = (read(find(folder))["state_dict"] for folder in (whole, out))
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=1e-4, atol=1e-6, msg=name)
    accumulates = "trainer.accumulate_grad_batches=2" in then  # after that the loss of a step's last batch is logged
    told = step if accumulates else 8
    losses = [[float(row["train/loss"]) for row in rows(folder)][:told] for folder in (whole, out)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


SIGNALS = {signal.SIGTERM: 75, signal.SIGUSR1: 75, signal.SIGUSR2: 75, signal.SIGINT: 130}
TOLD = [(number, ranks, 1) for number in SIGNALS for ranks in ((0, 1), (0,), (1,))]
LONG = [pytest.param(*case, marks=pytest.mark.slow) for case in TOLD]


@pytest.mark.faults("C6", "two ranks, SIGTERM, SIGINT, SIGUSR1, SIGUSR2: saved at the end of the step, no process left")
@pytest.mark.parametrize(("number", "ranks", "workers"), [(signal.SIGTERM, (0, 1), 0), *LONG])
def test_two_ranks_are_told_to_stop(tmp_path, figure, number, ranks, workers):
    """At any moment; all processes of some ranks, as a cluster does."""
    draw, out = random.Random(10 * int(number) + sum(ranks)), tmp_path / "run"
    words = [*TINY, *TWO, "duration=4000steps", "save_steps=0", f"data.num_workers={workers}", f"out={out}"]
    started = start_ranks(words, tmp_path)
    first, deadline = draw.randint(1, 20), time.monotonic() + 300
    while logged(out) < first and all(one.is_alive() for one in started) and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(draw.uniform(0, 0.2))
    counts = [len(of_session(one.pid)) for one in started]
    for rank in ranks:
        os.killpg(started[rank].pid, number)
    codes, text = ended(started, 60), logs(tmp_path)
    assert codes == [SIGNALS[number] if 0 in ranks else 75, 0], text
    assert min(counts) > workers  # each with its worker: else this test shows nothing
    deadline = time.monotonic() + 120  # a server of workers that is being imported sees it when it is there
    while (left := [pid for one in started for pid in of_session(one.pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left, text
    assert "the same command goes on" in text and "Traceback" not in text
    assert first <= saved(out) < 4000 and damage(find(out)) is None
    figure("steps lost", logged(out) - saved(out))
    assert logged(out) == saved(out)


COUNTED = """
import os
from ssl_lab import dist
from ssl_lab.methods.mae import MAE
class Counted(MAE):
    def step(self, batch, progress):
        if dist.rank() == 0 and "STEPS" in os.environ:
            with open(os.environ["STEPS"], "ab") as file:
                file.write(b"1")
        return super().step(batch, progress)
"""


@pytest.mark.faults("C20", "two ranks, one or both killed again and again: the same end to the bit")
@pytest.mark.parametrize("kills", [2, pytest.param(15, marks=pytest.mark.slow)])
def test_two_ranks_outlive_many_kills(tmp_path, figure, kills):
    (tmp_path / "counted.py").write_text(COUNTED)
    draw, out, whole, steps = random.Random(kills), tmp_path / "out", tmp_path / "whole", tmp_path / "steps"
    total = 12 * kills + 12
    words = [*TINY, *TWO, "method._target_=counted.Counted", "ema=0.9", "save_steps=1", f"duration={total}steps"]
    words += ["eval=[knn]", "eval.knn.k=3", "trainer.strategy.timeout.minutes=1"]
    assert ended(start_ranks([*words, f"out={whole}"], tmp_path)) == [0, 0], logs(tmp_path)
    for _ in range(kills):
        before, deadline = saved(out), time.monotonic() + 300
        both = start_ranks([*words, f"out={out}"], tmp_path, STEPS=str(steps))
        until = before + draw.randint(3, 8)
        while saved(out) < until and all(one.is_alive() for one in both) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.1))
        victims = draw.choice([both[:1], both[1:], both])
        for victim in victims:
            victim.kill()
        codes = ended(both, 90)  # the one that is left ends by itself
        assert all(victim.exitcode == -signal.SIGKILL for victim in victims), logs(tmp_path)
        assert None not in codes and 0 not in codes, (codes, logs(tmp_path))
        assert saved(out) >= until and not [path.name for path in stored(out / "checkpoints") if damage(path)]
    assert ended(start_ranks([*words, f"out={out}"], tmp_path, STEPS=str(steps))) == [0, 0], logs(tmp_path)
    same_end(whole, out)
    kept = total / steps.stat().st_size
    figure("steps computed for one", 1 / kept)
    assert kept >= 0.7
