"""On a real SLURM: the job script of docs/training.md brings a run through signals, requeues and a crash to its end."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_dist import TWO, finished
from training import TINY, same_end

ROOT = Path(__file__).parent.parent
WORDS = [*TINY, *TWO, "ema=0.9", "duration=300steps", "save_steps=0", "trainer.log_every_n_steps=1"]
FAULTS = ["USR1", "TERM", "KILL", "USR1"]
needs_slurm = pytest.mark.skipif(
    not shutil.which("sbatch") or subprocess.run(["sinfo"], capture_output=True).returncode != 0,
    reason="needs a SLURM that takes jobs: sbatch, and sinfo that answers",
)


def job_script(folder: Path, words: list[str]) -> Path:
    """The script of the page, with this run in the place of its own and the two cores of this machine."""
    page = (ROOT / "docs/training.md").read_text()
    text = next(fence for fence in re.findall(r"^```sh\n(.*?)^```", page, re.M | re.S) if "#SBATCH" in fence)
    command = " ".join([sys.executable, "-m", "ssl_lab", *words, f"out={folder / 'run'}"])
    text, runs = re.subn(r"^srun ssl-lab.*$", f"srun {command}", text, flags=re.M)
    text, sizes = re.subn("--nodes=2.*$", "--nodes=1 --ntasks-per-node=2", text, flags=re.M)
    assert runs == sizes == 1
    (folder / "job.sh").write_text(text)
    return folder / "job.sh"


def control(*words: str) -> str:
    return subprocess.run(["scontrol", *words], capture_output=True, text=True, check=True).stdout


def state(job: str) -> str:
    return re.search(r"JobState=(\w+)", control("show", "job", job))[1]


def starts_now(job: str) -> bool:
    """Ask SLURM not to wait two minutes before a requeued job starts; it refuses while it clears the last start."""
    asked = subprocess.run(["scontrol", "update", f"jobid={job}", "StartTime=now"], capture_output=True)
    return asked.returncode == 0 or state(job) != "PENDING"


def ranks(out: Path) -> list[int]:
    """Processes that train in a folder, by their command line."""
    found = []
    for words in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if f"out={out}" in (line := words.read_text().split("\0")) and "srun" not in line[0]:
                found.append(int(words.parent.name))
        except OSError:  # ended meanwhile
            continue
    return sorted(found)


def wait_for(condition, seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.3)


@needs_slurm
@pytest.mark.slow
@pytest.mark.faults("C7", "SLURM, two ranks: USR1, TERM, KILL, USR1, put back each time: the same end to the bit")
def test_a_job_comes_through(tmp_path, figure):
    finished([*WORDS, f"out={tmp_path / 'whole'}"])
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    script = job_script(tmp_path, [word for word in WORDS if "save_steps" not in word] + ["save_steps=10"])
    told = subprocess.run(
        ["sbatch", "--parsable", f"--output={tmp_path / 'log'}", script], env=env, capture_output=True, text=True
    )
    assert told.returncode == 0, told.stderr
    job, rows = told.stdout.strip(), tmp_path / "run" / "metrics.csv"
    try:
        for lives, fault in enumerate(FAULTS):
            before = rows.read_text().count("\n") if rows.exists() else 0
            told = f"{fault}: the job makes no steps\n{(tmp_path / 'log').read_text() if lives else ''}"
            wait_for(lambda before=before: rows.exists() and rows.read_text().count("\n") > before + 20, 180, told)
            if fault == "KILL":
                os.kill(ranks(tmp_path / "run")[-1], signal.SIGKILL)  # scancel would take it for the end of the job
            else:
                subprocess.run(["scancel", f"--signal={fault}", job], check=True)
            wait_for(lambda: state(job) == "PENDING", 60, f"{fault}: not put back\n{(tmp_path / 'log').read_text()}")
            time.sleep(2)  # SLURM revokes the credential of a job that starts in the second of its requeue
            wait_for(lambda: starts_now(job), 60, "SLURM does not take the job back")
        wait_for(lambda: state(job) in ("COMPLETED", "FAILED"), 240, "does not end")
    finally:
        subprocess.run(["scancel", job])
    facts = control("show", "job", job)
    assert "JobState=COMPLETED" in facts and "ExitCode=0:0" in facts, (tmp_path / "log").read_text()
    restarts = int(re.search(r"Restarts=(\d+)", facts)[1])
    figure("requeues", restarts)
    assert restarts == len(FAULTS)
    same_end(tmp_path / "whole", tmp_path / "run")
