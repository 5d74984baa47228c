"""`ssl-lab -m`: one run for each combination of values, each in a process of its own, with a summary."""

import contextlib
import json
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from hydra.errors import InstantiationException
from omegaconf import DictConfig
from rich.table import Table

from ssl_lab.cli import compose as composing
from ssl_lab.cli import overrides
from ssl_lab.cli.launch import Job, Launcher, Source, drive
from ssl_lab.cli.mistakes import explain_build
from ssl_lab.cli.screen import screen, unbroken
from ssl_lab.errors import UserError
from ssl_lab.train.signals import CODES, Interrupted, Signals

SWEEPS = Path("runs/sweeps")
OWN = ("launcher", "sweeper")  # groups of the sweep itself
_AFTERWORDS = re.compile(r"srun: |slurmstepd: |ssl-lab: \w+ failed, see")  # said when the reason has been
TELLING = ("seed", "experiment", "name", "out")  # keys that the run folder shows without help


@dataclass(frozen=True)
class Status:
    """How one job of a sweep ended; a line of `jobs.jsonl`."""

    job: int
    overrides: str
    status: str  # "ok" | "failed" | "stopped"
    seconds: float
    out: str
    message: str = ""
    code: int = 0


class Planner:
    """Turns words into jobs, after checking them as the job itself will.

    Args:
        verb: of all jobs.
        folders: `conf/`, then the user's own.
    """

    def __init__(self, verb: str, folders: list[Path]) -> None:
        self.verb, self.folders = verb, folders
        self._settled: dict[tuple[str, ...], list[str]] = {}

    def composed(self, words: Sequence[str], naming: dict[str, str] | None = None) -> DictConfig:
        """The configuration of a job; `naming` is added to its name.

        Raises:
            UserError: a mistake in `words`.
        """
        if (typed := tuple(words)) not in self._settled:
            self._settled[typed] = list(composing.settled(self.verb, list(words), self.folders).values())
        return composing.assemble(self.verb, self._settled[typed], self.folders, naming)

    def job(self, number: int, words: Sequence[str], values: dict[str, str], naming: dict[str, str]) -> Job:
        """A job of these words. `values` are what tells it apart, and of those `naming` joins its name."""
        cfg = self.composed(words, naming)
        if naming and "name" in cfg:
            words = [*(word for word in words if not word.startswith("name=")), f'name="{cfg.name}"']
        trainer = cfg.get("trainer") or {}
        verb = self.verb
        if verb == "bench_suite":  # as it is typed
            verb, words = "bench", [re.sub("^name=", "suite=", word) for word in words]
        more = [word for folder in self.folders[1:] for word in ("--config-dir", str(folder))]
        return Job(
            number,
            " ".join(f"{key}={value}" for key, value in values.items()),
            (verb, *words, *more),
            out=str(cfg.get("out") or ""),
            devices=str(trainer.get("devices", 1)),
            gpus=trainer.get("accelerator", "cpu") != "cpu",
            nodes=int(trainer.get("num_nodes", 1)),
        )


class Grid:
    """Every combination of the values."""

    def source(self, planner: Planner, words: list[str]) -> "Combinations":
        """The jobs, all of them checked.

        Raises:
            UserError: a mistake in any of them, or two that share a run folder.
        """
        jobs, swept = combinations(words, planner.folders)
        made = [planner.job(n, job, _values(job, swept), {}) for n, job in enumerate(jobs)]
        if _clash(made):
            naming = tuple(key for key in swept if key not in TELLING)
            made = [planner.job(n, job, _values(job, swept), _values(job, naming)) for n, job in enumerate(jobs)]
        if clash := _clash(made):
            raise UserError(f"several jobs would share the run folder {clash}: let out=... name what differs")
        return Combinations(made)


class Combinations:
    """The jobs of a `Grid`, one after the other."""

    def __init__(self, jobs: list[Job]) -> None:
        self.total, self.before = len(jobs), 0
        self._left = iter(jobs)

    @contextlib.contextmanager
    def opened(self) -> Iterator[Path]:
        """A folder of its own for every sweep."""
        yield _new_folder()

    def next(self) -> Job | None:
        return next(self._left, None)

    def ended(self, job: Job, code: int) -> str:
        return ""

    def conclusion(self) -> str:
        return ""


def sweep(verb: str, typed: list[str], folders: list[Path]) -> int:
    """Check every combination, run them, print the summary. 0 if all went well, else 1.

    Raises:
        UserError: a mistake in any combination, two that share a run folder, or nowhere to write.
        Interrupted: a signal came; jobs that ran have saved.
    """
    for word in typed:
        if word.startswith(("hydra/", "hydra.launcher", "hydra.sweep")):
            raise UserError(f"{word}: sweeps are started by launcher=local or launcher=slurm, see docs/cluster.md")
    own = [word for word in typed if word.lstrip("+~").partition("=")[0].partition(".")[0] in OWN]
    parts = composing.compose("sweep", own, folders)
    if parts.sweeper._target_.endswith("Optuna") and find_spec("optuna") is None:
        raise UserError('sweeper=optuna needs Optuna: pip install "ssl-lab[optuna]"')
    try:
        launcher, sweeper = composing.build(parts.launcher), composing.build(parts.sweeper)
    except InstantiationException as error:
        raise explain_build(error, parts) or error from error.__cause__
    source = sweeper.source(Planner(verb, folders), [word for word in typed if word not in own])
    try:
        with unbroken(), Signals() as signals, source.opened() as folder:
            done = run(launcher, source, signals, folder)
            if conclusion := source.conclusion():
                print(conclusion)
    except OSError as error:
        where = error.filename or SWEEPS
        raise UserError(f"{where}: {error.strerror}; a sweep writes its logs to {SWEEPS}, make room there") from error
    if signals.received is not None:
        raise Interrupted(signals.received)
    return 0 if done else 1


def run(launcher: Launcher, source: Source, signals: Signals, folder: Path) -> bool:
    """Run all jobs and print the table of them, whatever happens; whether all went well."""
    ended: list[Status] = []

    def begun(job: Job, log: Path) -> None:
        print(f"job {job.number + 1} of {source.total}: {job.label}  ({log})", flush=True)

    def over(job: Job, code: int, seconds: float, problem: str) -> None:
        status = "ok" if code == 0 and not problem else "stopped" if code in CODES.values() else "failed"
        message = "" if status == "ok" else problem or _last_words(folder / f"{job.number + 1}.log", code)
        ended.append(Status(job.number, job.label, status, round(seconds, 1), job.out, message, code))
        print(f"job {job.number + 1} of {source.total}: {status}{f', {message}' if message else ''}", flush=True)
        try:
            with (folder / "jobs.jsonl").open("a") as file:
                file.write(json.dumps(asdict(ended[-1])) + "\n")
        except OSError as error:  # no reason to end the jobs that run
            print(f"{folder}/jobs.jsonl: {error.strerror}, so that job {job.number + 1} is not in it", flush=True)

    try:
        drive(launcher, source, signals, folder, begun=begun, over=over)
    finally:
        bad = _summary(folder, ended, source.total - source.before)
    return bad == 0


def combinations(typed: list[str], folders: list[Path]) -> tuple[list[list[str]], tuple[str, ...]]:
    """Every combination as a list of overrides, in Hydra's order (the last key runs fastest), and the swept keys."""
    jobs: list[list[str]] = [[]]
    swept = []
    for text in typed:
        word = overrides.parse(text, folders)
        values = [text]
        if word.is_sweep_override():
            if not word.is_discrete_sweep():
                raise UserError(
                    f"{text}: write the values one by one, as range(start,stop,step), or add sweeper=optuna"
                )
            key = word.get_key_element()
            values = [f"{key}={value}" for value in word.sweep_string_iterator()]
            swept.append(key.lstrip("+"))
        jobs = [[*job, value] for job in jobs for value in values]
    return jobs, tuple(swept)


def _clash(jobs: list[Job]) -> str | None:
    """A run folder that two jobs would write to."""
    outs = [job.out for job in jobs if job.out]
    return next((out for n, out in enumerate(outs) if out in outs[:n]), None)


def _values(job: list[str], keys: tuple[str, ...]) -> dict[str, str]:
    pairs = (word.lstrip("+").partition("=")[::2] for word in job)
    return {key: value for key, value in pairs if key in keys}


def _last_words(log: Path, code: int) -> str:
    """Why a job failed: the last line of its log, without the name of the program."""
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    lines = [line for line in lines if line.strip() and not _AFTERWORDS.match(line)]
    told = lines[-1].removeprefix("ssl-lab: ") if len(lines) > 1 else "nothing was said"
    return f"exit code {code}: {told}"


def _new_folder() -> Path:
    stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
    for extra in ["", *(f"_{n}" for n in range(2, 1000))]:
        folder = SWEEPS / f"{stamp}{extra}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
    raise UserError(f"no free folder name in {SWEEPS}")


def _summary(folder: Path, done: list[Status], total: int) -> int:
    """Print the table of all jobs; gives the number that did not end well."""
    table = Table("job", "overrides", "status", "seconds", "run folder", title=f"sweep: {folder}", title_justify="left")
    for status in sorted(done, key=lambda s: s.job):
        shown = status.status if not status.message else f"{status.status}: {status.message}"
        table.add_row(str(status.job + 1), status.overrides, shown, f"{status.seconds:.1f}", status.out)
    ok, failed = (sum(status.status == wanted for status in done) for wanted in ("ok", "failed"))
    rest = {"stopped": len(done) - ok - failed, "not run": total - len(done)}
    console = screen()
    console.print(table)
    told = "".join(f", {count} {name}" for name, count in rest.items() if count)
    console.print(f"{ok} ok, {failed} failed{told}")
    return total - ok
