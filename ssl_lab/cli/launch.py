"""Jobs of a sweep, each in a process group of its own: started, watched, and ended together when a signal comes."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ssl_lab.errors import UserError
from ssl_lab.train.signals import Signals

COMMAND = [sys.executable, "-m", "ssl_lab.cli.job"]  # before the words of a job
_POLL, _PATIENCE = 0.1, 30.0  # seconds between two looks at the jobs, and for saving before they are killed


@dataclass(frozen=True)
class Job:
    """One run of a sweep.

    Args:
        number: from 0.
        label: the values that tell it apart.
        words: its command line after `ssl-lab`.
        out: its run folder, empty where the verb has none.
        devices: processes on each machine.
        gpus: whether each of them needs one.
        nodes: machines.
    """

    number: int
    label: str
    words: tuple[str, ...]
    out: str = ""
    devices: str = "1"
    gpus: bool = False
    nodes: int = 1


class Running(Protocol):
    """A job that was started."""

    def code(self) -> int | None:
        """Exit code, None while it runs."""

    def stop(self, number: signal.Signals) -> None:
        """Ask it to save and end."""

    def kill(self) -> None:
        """End it with all of its processes."""


class Launcher(Protocol):
    """Starts jobs; `jobs` at a time, None = as many as there are."""

    jobs: int | None

    def start(self, job: Job, log: Path) -> Running:
        """Start `job` with its output added to `log`.

        Raises:
            UserError: it cannot be started.
        """


class Source(Protocol):
    """Where jobs come from: `total` in all, `before` of them in earlier sweeps."""

    total: int
    before: int

    def next(self) -> Job | None:
        """The next job, None while there is none to start."""

    def ended(self, job: Job, code: int) -> str:
        """A job is over; gives what went wrong beyond its exit code, or nothing."""


class Local:
    """Processes of this machine. A job of several devices starts its ranks itself, in its own process group.

    Args:
        jobs: at a time. More than one share the cores: each gets its part as OMP_NUM_THREADS, unless that is set.
        gpus: indices, divided among the jobs of a time; none = every job sees all of them.

    Raises:
        UserError: fewer than one job, or fewer GPUs than jobs.
    """

    def __init__(self, jobs: int = 1, gpus: Sequence[int] = ()) -> None:
        if jobs < 1:
            raise UserError(f"launcher.jobs={jobs}: run at least one at a time")
        if 0 < len(gpus) < jobs:
            raise UserError(f"launcher.gpus={list(gpus)} are fewer than launcher.jobs={jobs}: each job needs one")
        self.jobs: int | None = jobs
        self._gpus = gpus
        self._slots: list[Process | None] = [None] * jobs

    def start(self, job: Job, log: Path) -> "Process":
        """Start `job` in a free slot; there must be one."""
        slot = next(i for i, process in enumerate(self._slots) if process is None or process.code() is not None)
        env = os.environ | {"PYTHONUNBUFFERED": "1"}  # what is said last stands last in the log
        if len(self._slots) > 1:
            env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // len(self._slots))))
        if self._gpus:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, self._gpus[slot :: len(self._slots)]))
        with log.open("a") as file:
            file.write(f"$ ssl-lab {shlex.join(job.words)}\n")
            file.flush()
            process = subprocess.Popen(
                [*COMMAND, *job.words],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a signal to the terminal's group reaches it once, through the sweep
            )
        self._slots[slot] = started = Process(process)
        return started


class Process:
    """A job of `Local`."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def code(self) -> int | None:
        return self._process.poll()

    def stop(self, number: signal.Signals) -> None:
        self._process.send_signal(number)  # not to its ranks: they all stop at the step that one of them names

    def kill(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)


def drive(
    launcher: Launcher,
    source: Source,
    signals: Signals,
    folder: Path,
    *,
    begun: Callable[[Job, Path], None],
    over: Callable[[Job, int, float, str], None],
) -> None:
    """Run all jobs of `source`. After a signal no more are started, and those that run are told to save and end.

    Args:
        launcher: starts them.
        source: says which.
        signals: entered; a second SIGINT kills what still runs.
        folder: of the sweep, for the logs.
        begun: called when a job starts, with its log.
        over: called when it has ended, with its exit code, its seconds, and what else went wrong.

    Raises:
        UserError: a job cannot be started; those that run are told to save and end.
    """
    running: dict[Job, tuple[Running, float]] = {}
    told, signals.deferred = False, True
    try:
        while True:
            if signals.received is None:
                while launcher.jobs is None or len(running) < launcher.jobs:
                    if (job := source.next()) is None:
                        break
                    log = folder / f"{job.number + 1}.log"
                    begun(job, log)
                    running[job] = launcher.start(job, log), time.monotonic()
            elif not told:
                told = True
                signal.signal(signal.SIGINT, signal.default_int_handler)
                for one, _ in running.values():
                    one.stop(signals.received)
            if not running:
                return
            for job, (one, since) in list(running.items()):
                if (code := one.code()) is not None:
                    del running[job]
                    over(job, code, time.monotonic() - since, source.ended(job, code))
            time.sleep(_POLL)
    except KeyboardInterrupt:  # a second one: there is no time to save
        for one, _ in running.values():
            one.kill()
        running.clear()
        raise
    finally:
        signals.deferred = False
        _end([one for one, _ in running.values()])


def _end(left: Sequence[Running]) -> None:
    """Tell jobs to save and end, and kill what has not done so in time."""
    deadline = time.monotonic() + _PATIENCE
    try:
        for one in left:
            one.stop(signal.SIGTERM)
        while time.monotonic() < deadline and any(one.code() is None for one in left):
            time.sleep(_POLL)
    finally:
        for one in left:
            one.kill()
