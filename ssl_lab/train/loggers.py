"""Where numbers and pictures of a run go. A logger is a convenience: one that fails is reported and left out."""

import csv
import io
import logging
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from torch import Tensor

from ssl_lab.files import write_text

log = logging.getLogger(__name__)

_CONNECT = 20  # seconds to wait for W&B's server
_UNUSABLE = "logger %s is left out, training goes on: %s"


class CSVLogger(Logger):
    """One table `metrics.csv` that a resumed run continues: a row per step, a column per name, on file at once.

    What is logged again for the latest step is added to its row. Lightning's logger of this name deletes the file of
    an earlier run.
    """

    def __init__(self, save_dir: str | Path) -> None:
        super().__init__()
        self.path = Path(save_dir) / "metrics.csv"
        self._columns, rows = self._read()
        self._last: dict[str, Any] = rows[-1] if rows else {}

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run folder holds config.yaml."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row: dict[str, Any] = {"step": str(step or 0), **metrics}
        again, new = row["step"] == self._last.get("step"), set(row) - set(self._columns)
        self._last = self._last | row if again else row
        if again or new:
            rows = self._read()[1]
            self._columns = ["step", *sorted({*self._columns, *new} - {"step"})]
            self._write([*(rows[:-1] if again else rows), self._last])
        else:
            with open(self.path, "a", newline="") as file:
                file.write(self._line(row))

    def save(self) -> None:
        """Force the rows to disk."""
        if self.path.exists():
            with open(self.path, "a") as file:
                os.fsync(file.fileno())

    def rewind(self, step: int) -> None:
        """Drop rows after `step`, and a row that a killed run left half written."""
        if self.path.exists():
            rows = [row for row in self._read()[1] if int(row["step"]) <= step]
            self._last = rows[-1] if rows else {}
            self._write(rows)

    def _read(self) -> tuple[list[str], list[dict[str, Any]]]:
        """Columns and whole rows of the file."""
        if not self.path.exists():
            return [], []
        with open(self.path, newline="") as file:
            text = file.read()
        table = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
        rows = [row for row in table if None not in row.values() and row["step"].isdigit()]
        return [*(table.fieldnames or [])], rows

    def _write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.path, "".join(map(self._line, [dict(zip(self._columns, self._columns, strict=True)), *rows])))

    def _line(self, row: Mapping[str, Any]) -> str:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow([row.get(name, "") for name in self._columns])
        return text.getvalue()


class Loggers:
    """All loggers of a run behind one door, which stays closed until there is something to log.

    Args:
        make: name -> makes the logger; none on ranks other than the first.
    """

    def __init__(self, make: Mapping[str, Callable[[], Logger]]) -> None:
        self._make = dict(make)
        self._loggers: dict[str, Logger] = {}

    def open(self) -> None:
        """Make every logger that is not open yet."""
        while self._make:
            name, build = self._make.popitem()
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
    """Weights & Biases. A resumed run keeps its id; without a connection it stays on disk, for `wandb sync`."""
    import wandb as package

    note = Path(save_dir) / "wandb_id"
    if not note.exists():
        note.parent.mkdir(parents=True, exist_ok=True)
        write_text(note, secrets.token_hex(4))
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
        log.warning("no connection to W&B (%s): kept on disk, to be sent later with `wandb sync`", _reason(error))
        return connect("offline")


def _show(logger: Logger, images: Mapping[str, Tensor], step: int) -> None:
    for name, image in images.items():
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, image, step)
        elif isinstance(logger, WandbLogger):
            logger.log_image(name, [image.permute(1, 2, 0).numpy()], step)


def _reason(error: BaseException) -> str:
    error = error.__cause__ or error  # Hydra wraps what a constructor raised
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
