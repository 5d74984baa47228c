"""Jobs of a sweep on SLURM: a job script each, which puts itself back into the queue after a signal."""

import contextlib
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssl_lab.cli.launch import Job
from ssl_lab.errors import UserError

COMMAND = [sys.executable, "-m", "ssl_lab"]  # before the words of a job
SCRIPT = """#!/bin/bash
{options}
cd {here}
export PYTHONUNBUFFERED=1  # what is said last stands last in the log
srun {command}
code=$?
if {{ [ $code -eq 75 ] || [ $code -gt 128 ]; }} && [ "${{SLURM_RESTART_COUNT:-0}}" -lt 100 ]; then
  scontrol requeue "$SLURM_JOB_ID" && exit $code
fi
echo $code > {ending}
exit $code
"""
_LOOK = 10.0  # seconds between two looks at the queue
_LOST = 3  # looks in a row that miss a job before it is given up


class Slurm:
    """Each job is a job script beside its log; SLURM keeps it when the sweep is gone.

    The script alone puts a job back into the queue, by the exit code of its ranks: after a signal (75) and after being
    killed (above 128). That is also why no submission library stands between: it would requeue beside the script.

    Args:
        jobs: in the queue at a time, None = all at once.
        options: of sbatch, by their long names. Machines and ranks come from `trainer.num_nodes` and `trainer.devices`
            of each job, and a GPU for each rank unless options name GPUs or the job is on CPUs.
        warn_seconds: between SLURM's signal and the end of the time, in which the run saves.

    Raises:
        UserError: fewer than one job.
    """

    def __init__(
        self, jobs: int | None = None, options: Mapping[str, Any] | None = None, warn_seconds: int = 120
    ) -> None:
        if jobs is not None and jobs < 1:
            raise UserError(f"launcher.jobs={jobs}: run at least one at a time, or null for all")
        self.jobs, self._options, self._warn_seconds = jobs, dict(options or {}), warn_seconds
        self._queue = Queue()

    def start(self, job: Job, log: Path) -> "Submitted":
        """Submit `job`.

        Raises:
            UserError: the number of ranks is not written, or sbatch refuses.
        """
        ending, script = log.with_suffix(".code").resolve(), log.with_suffix(".sh")
        ending.unlink(missing_ok=True)
        command = shlex.join([*COMMAND, *job.words])
        text = SCRIPT.format(
            options="\n".join(f"#SBATCH --{line}" for line in self._lines(job, log)),
            here=shlex.quote(str(Path.cwd())),
            command=command,
            ending=shlex.quote(str(ending)),
        )
        script.write_text(text)
        with log.open("a") as file:
            file.write(f"$ ssl-lab {shlex.join(job.words)}\n")
        return Submitted(asked("sbatch", "--parsable", str(script)).strip().partition(";")[0], ending, self._queue)

    def _lines(self, job: Job, log: Path) -> list[str]:
        if not job.devices.isdigit():
            raise UserError(f"trainer.devices={job.devices}: SLURM must know how many, write a number")
        given: dict[str, Any] = {
            "job-name": f"ssl-lab-{job.number + 1}",
            "output": str(log.resolve()),
            "open-mode": "append",
            "requeue": True,
            "signal": f"USR1@{self._warn_seconds}",
            "nodes": job.nodes,
            "ntasks-per-node": job.devices,
        }
        if job.gpus and not any(re.match("gpus|gres", str(name)) for name in self._options):
            given["gpus-per-node"] = job.devices
        given |= {str(name).replace("_", "-"): value for name, value in self._options.items()}
        return [
            name if value is True else f"{name}={shlex.quote(str(value))}"
            for name, value in given.items()
            if value is not False and value is not None
        ]


class Queue:
    """Which jobs SLURM still knows, asked now and then for all of them."""

    def __init__(self) -> None:
        self._looks, self._known, self._asked = 0, frozenset[str](), -_LOOK

    def look(self) -> tuple[int, frozenset[str]]:
        """How often the queue was asked, and the ids in it."""
        if time.monotonic() - self._asked >= _LOOK:
            self._asked = time.monotonic()
            with contextlib.suppress(OSError, UserError):  # a controller that does not answer says nothing about jobs
                known = asked("squeue", "--me", "-h", "-o", "%i").split()
                self._looks, self._known = self._looks + 1, frozenset(known)
        return self._looks, self._known


class Submitted:
    """A job of `Slurm`."""

    def __init__(self, number: str, ending: Path, queue: Queue) -> None:
        self.number, self._ending, self._queue = number, ending, queue
        self._seen, self._cancelled, self._left = queue.look()[0], False, False

    def code(self) -> int | None:
        """What the script wrote at its end; else 75 of a job that was cancelled or left here, 1 of a lost one."""
        if self._ending.is_file() and (text := self._ending.read_text().strip()):
            return int(text)
        if self._left:
            return 75
        looks, known = self._queue.look()
        if self.number in known:
            self._seen = looks
        if looks - self._seen < _LOST:
            return None
        return 75 if self._cancelled else 1

    def stop(self, number: signal.Signals) -> None:
        """Cancel: SLURM tells the ranks to end, which save; what is cancelled does not go back into the queue.

        A terminal that is closed (SIGHUP) is no reason: SLURM keeps the job.
        """
        if number == signal.SIGHUP:
            self._left = True
            return
        self._cancelled = True
        self.kill()

    def kill(self) -> None:
        with contextlib.suppress(OSError, UserError):
            asked("scancel", self.number)


def asked(*command: str) -> str:
    """What a command of SLURM answers.

    Raises:
        UserError: there is no such command here, or it refuses.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError(f"launcher=slurm: there is no {command[0]} on this machine; use launcher=local") from None
    if done.returncode:
        raise UserError(f"{command[0]}: {' '.join(done.stderr.split())}; set launcher.options={{partition: ...}}")
    return done.stdout
