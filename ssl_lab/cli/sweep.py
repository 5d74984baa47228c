"""`ssl-lab -m`: one run for each combination of values, through Hydra's sweeper and launcher, with a summary."""

import json
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, ListConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from ssl_lab.cli import compose as composing
from ssl_lab.cli import overrides
from ssl_lab.cli.mistakes import COMPOSING, explain
from ssl_lab.errors import UserError

SWEEPS = Path("runs/sweeps")
TELLING = ("seed", "experiment", "name", "out")  # keys that the run folder shows without help


@dataclass(frozen=True)
class Status:
    """How one job of a sweep ended; a line of `jobs.jsonl`."""

    job: int
    overrides: str
    status: str  # "ok" | "failed"
    seconds: float
    out: str
    message: str = ""


@dataclass(frozen=True)
class Job:
    """What Hydra calls for every combination. A failure is written down, so that the other jobs still run."""

    verb: str
    total: int
    swept: dict[str, str]  # key as Hydra knows it -> key as typed
    naming: tuple[str, ...]  # typed keys that `name` must show
    folder: str

    def __call__(self, cfg: DictConfig) -> None:
        """Run one job; `cfg` is as Hydra composed it."""
        settings = HydraConfig.get()
        pairs = (word.lstrip("+").partition("=")[::2] for word in settings.overrides.task)
        values = {self.swept[key]: value for key, value in pairs if key in self.swept}
        label = " ".join(f"{key}={value}" for key, value in values.items())
        number = int(settings.job.num)
        print(f"job {number + 1} of {self.total}: {label}", flush=True)
        started, message = time.monotonic(), ""
        try:
            cfg = composing.finish(self.verb, cfg, {key: values[key] for key in self.naming})
            composing.perform(self.verb, cfg)
        except UserError as error:
            message = str(error)
        except Exception as error:
            traceback.print_exc()
            message = f"{type(error).__name__}: {error}".splitlines()[0]
        seconds = round(time.monotonic() - started, 1)
        out = OmegaConf.select(cfg, "out", throw_on_resolution_failure=False)
        status = Status(number, label, "failed" if message else "ok", seconds, str(out), message)
        print(f"job {number + 1} of {self.total}: {status.status}{f', {message}' if message else ''}", flush=True)
        with (Path(self.folder) / "jobs.jsonl").open("a") as file:
            file.write(json.dumps(asdict(status)) + "\n")


def sweep(verb: str, typed: list[str], folders: list[Path]) -> int:
    """Check every combination, run them, print the summary. 0 if all went well, else 1.

    Raises:
        UserError: a mistake in any combination, two that share a run folder, or several devices in one process.
    """
    jobs, swept = combinations(typed, folders)
    settled = [composing.settled(verb, job, folders) for job in jobs]
    naming: tuple[str, ...] = ()
    clash = _clash(verb, settled, folders, [{} for _ in jobs])
    if clash:
        naming = tuple(key for key in swept if key not in TELLING)
        clash = _clash(verb, settled, folders, [_values(job, naming) for job in jobs])
    if clash:
        raise UserError(f"several jobs would share the run folder {clash}: let out=... name what differs")
    places = [
        max((words[job[n]] for words, job in zip(settled, jobs, strict=True)), key=_prefix) for n in range(len(typed))
    ]
    keys = [place.partition("=")[0] for place in places]
    words = [key + text[text.index("=") :] if "=" in text else text for key, text in zip(keys, typed, strict=True)]
    names = {key.lstrip("+"): text.partition("=")[0].lstrip("+") for key, text in zip(keys, typed, strict=True)}
    folder = _new_folder()
    task = Job(
        verb, len(jobs), {key: name for key, name in names.items() if name in swept}, naming, str(folder.resolve())
    )
    try:
        _launch(verb, task, [f"hydra.sweep.dir='{folder}'", "hydra.sweep.subdir=.", *words], folders)
    finally:
        failed = _summary(folder, len(jobs))
    return 1 if failed else 0


def _launch(verb: str, task: Job, words: list[str], folders: list[Path]) -> None:
    with composing.session(folders):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        try:
            settings = [*composing.SETTINGS, *composing.search_path(folders)]
            hydra.multirun(verb, task, [*settings, *words], with_log_configuration=False)
        except COMPOSING as error:
            raise explain(error) from None


def combinations(typed: list[str], folders: list[Path]) -> tuple[list[list[str]], tuple[str, ...]]:
    """Every combination as a list of overrides, in Hydra's order (the last key runs fastest), and the swept keys."""
    jobs: list[list[str]] = [[]]
    swept = []
    for text in typed:
        word = overrides.parse(text, folders)
        values = [text]
        if word.is_sweep_override():
            if not word.is_discrete_sweep():
                raise UserError(f"{text}: write the values one by one, or as range(start,stop,step)")
            key = word.get_key_element()
            values = [f"{key}={value}" for value in word.sweep_string_iterator()]
            swept.append(key.lstrip("+"))
        jobs = [[*job, value] for job in jobs for value in values]
    return jobs, tuple(swept)


def _clash(verb: str, jobs: list[dict[str, str]], folders: list[Path], naming: list[dict[str, str]]) -> str | None:
    """Compose every job, to find its mistakes now; gives a run folder that two of them would write to."""
    outs: list[str] = []
    for job, names in zip(jobs, naming, strict=True):
        cfg = composing.assemble(verb, list(job.values()), folders, names)
        basic = not any(word.startswith("hydra/launcher=") for word in job)
        if basic and "trainer" in cfg and not _one_device(cfg.trainer):
            raise UserError(
                f"trainer.devices={cfg.trainer.get('devices')} in a sweep: jobs of several processes hang when one "
                f"fails; run them one by one, or each on its own with hydra/launcher=submitit_slurm"
            )
        if cfg.get("out") is not None:
            outs.append(str(cfg.out))
    return next((out for n, out in enumerate(outs) if out in outs[:n]), None)


def _values(job: list[str], keys: tuple[str, ...]) -> dict[str, str]:
    pairs = (word.lstrip("+").partition("=")[::2] for word in job)
    return {key: value for key, value in pairs if key in keys}


def _prefix(word: str) -> int:
    """Length of the key with its `+`: the longest serves every job."""
    return len(word.partition("=")[0])


def _one_device(trainer: Any) -> bool:
    devices = trainer.get("devices", "auto")
    if isinstance(devices, ListConfig):
        return len(devices) == 1
    return str(devices) == "1" or (str(devices) == "auto" and trainer.get("accelerator") == "cpu")


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


def _summary(folder: Path, total: int) -> int:
    """Print the table of all jobs; gives the number that did not end well."""
    file = folder / "jobs.jsonl"
    done = [Status(**json.loads(line)) for line in file.read_text().splitlines()] if file.is_file() else []
    table = Table("job", "overrides", "status", "seconds", "run folder", title=f"sweep: {folder}", title_justify="left")
    for status in sorted(done, key=lambda s: s.job):
        shown = status.status if not status.message else f"{status.status}: {status.message}"
        table.add_row(str(status.job + 1), status.overrides, shown, f"{status.seconds:.1f}", status.out)
    failed = sum(status.status != "ok" for status in done)
    missing = total - len(done)
    console = Console()
    console.print(table, highlight=False)
    console.print(
        f"{len(done) - failed} ok, {failed} failed{f', {missing} not run' if missing else ''}", highlight=False
    )
    return failed + missing
