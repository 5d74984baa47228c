"""Where numbers and pictures of a run go. A logger is a convenience: one that fails is reported and left out."""

import csv
import io
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from torch import Tensor

from ssl_lab.train.checkpoint import write_text

log = logging.getLogger(__name__)

_CONNECT = 20  # seconds to wait for W&B's server
_UNUSABLE = "logger %s is left out, training goes on: %s"


class CSVLogger(Logger):
    """One table `metrics.csv` that a resumed run continues: one row per step, a column per name, written at once.

    Lightning's logger of this name deletes the file of an earlier run.
    """

    def __init__(self, save_dir: str | Path) -> None:
        super().__init__()
        self.path = Path(save_dir) / "metrics.csv"
        self._columns = self._header()

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run folder holds config.yaml."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row = {"step": step or 0, **metrics}
        if new := set(row) - set(self._columns):
            self._columns = ["step", *sorted({*self._columns, *new} - {"step"})]
            self._rewrite(self._rows())
        with open(self.path, "a", newline="") as file:
            file.write(_line([row.get(name, "") for name in self._columns]))

    def save(self) -> None:
        """Force the rows to disk."""
        if self.path.exists():
            with open(self.path, "a") as file:
                os.fsync(file.fileno())

    def rewind(self, step: int) -> None:
        """Drop rows after `step`, and a row that a killed run left half written."""
        if self.path.exists():
            self._rewrite([row for row in self._rows() if int(row["step"]) <= step])

    def _header(self) -> list[str]:
        if not self.path.exists():
            return []
        with open(self.path, newline="") as file:
            return next(csv.reader(file), [])

    def _rows(self) -> list[dict[str, str]]:
        """Whole rows of the file."""
        if not self.path.exists():
            return []
        with open(self.path, newline="") as file:
            text = file.read()
        whole = text[: text.rfind("\n") + 1]
        return [row for row in csv.DictReader(io.StringIO(whole)) if None not in row.values() and row["step"].isdigit()]

    def _rewrite(self, rows: Sequence[Mapping[str, str]]) -> None:
        lines = [_line(self._columns), *(_line([row.get(name, "") for name in self._columns]) for row in rows)]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.path, "".join(lines))


class Loggers:
    """All loggers of a run behind one door; silent on other ranks than the first."""

    def __init__(self, make: Mapping[str, Callable[[], Logger]], *, silent: bool = False) -> None:
        self._loggers: dict[str, Logger] = {}
        for name, build in {} if silent else make.items():
            try:
                logger = build()
                _ = getattr(logger, "experiment", None)  # connects: better now than at the first number
                self._loggers[name] = logger
            except Exception as error:
                log.warning(_UNUSABLE, name, _reason(error))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Log numbers by name, at a count of optimizer steps done."""
        self._each(lambda logger: logger.log_metrics(dict(values), step))

    def config(self, values: dict[str, Any]) -> None:
        """Show the resolved configuration where a logger shows one."""
        self._each(lambda logger: logger.log_hyperparams(values))

    def pictures(self, images: Mapping[str, Tensor], step: int) -> None:
        """Log pictures, (3, H, W) uint8 by name, where the logger shows pictures."""
        self._each(lambda logger: _show(logger, images, step))

    def rewind(self, step: int) -> None:
        """Go on after `step`: what was logged later by a run that was cut short is dropped, where that is possible."""
        self._each(lambda logger: logger.rewind(step) if isinstance(logger, CSVLogger) else None)

    def save(self) -> None:
        """Force what was logged to disk."""
        self._each(lambda logger: logger.save())

    def close(self, status: str = "success") -> None:
        """Finish every logger."""
        self._each(lambda logger: logger.finalize(status))
        self._each(lambda logger: logger.experiment.finish() if isinstance(logger, WandbLogger) else None)

    def _each(self, action: Callable[[Logger], None]) -> None:
        for name, logger in [*self._loggers.items()]:
            try:
                action(logger)
            except Exception as error:
                log.warning(_UNUSABLE, name, _reason(error))
                del self._loggers[name]


def wandb(save_dir: str | Path, *, project: str = "ssl_lab", name: str | None = None, mode: str = "offline") -> Logger:
    """Weights & Biases. A resumed run goes on under its own id; without a connection it stays on disk, for `wandb sync`."""
    import wandb as package

    note = Path(save_dir) / "wandb_id"
    if not note.exists():
        note.parent.mkdir(parents=True, exist_ok=True)
        write_text(note, package.util.generate_id())
    settings = package.Settings(init_timeout=_CONNECT, silent=True)

    def connect(mode: str) -> Logger:
        resume = "allow" if mode == "online" else None
        logger = WandbLogger(
            name, save_dir, id=note.read_text(), project=project, mode=mode, resume=resume, settings=settings
        )
        _ = logger.experiment
        return logger

    try:
        return connect(mode)
    except Exception as error:
        if mode != "online":
            raise
        log.warning("no connection to W&B (%s): the run is kept on disk, send it later with `wandb sync`", _reason(error))
        return connect("offline")


def _show(logger: Logger, images: Mapping[str, Tensor], step: int) -> None:
    for name, image in images.items():
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, image, step)
        elif isinstance(logger, WandbLogger):
            logger.log_image(name, [image.permute(1, 2, 0).numpy()], step)


def _line(values: Sequence[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue()


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
