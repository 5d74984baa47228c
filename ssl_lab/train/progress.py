"""What a person sees while a run trains: a bar with samples per second and time left."""

import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

_REFRESH, _LINE = 0.5, 30.0  # seconds between updates of the bar, and between lines where there is no terminal


class _Rate(ProgressColumn):
    """Samples per second from the bar's own speed in steps."""

    def __init__(self, samples_per_step: int) -> None:
        super().__init__()
        self.samples_per_step = samples_per_step

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed * self.samples_per_step:,.0f} samples/s" if task.speed else "")


class StepBar(ProgressBar):
    """rich's bar, counted in optimizer steps, so that it knows its end though the data has none.

    Where the output is no terminal, a plain line every half minute says the same.
    """

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console
        self._enabled = True
        self._bar: Progress | None = None

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._shown = self._begun = time.monotonic()
        self._first, self._samples = trainer.global_step, int(pl_module.samples_per_step)  # type: ignore[arg-type]
        if self._enabled and self._console.is_terminal:
            loss = TextColumn("{task.fields[loss]}")
            columns = BarColumn(), MofNCompleteColumn(), _Rate(self._samples), TimeRemainingColumn(), loss
            self._bar = Progress(*columns, console=self._console)
            self._task = self._bar.add_task("", total=trainer.max_steps, completed=self._first, loss="")
            self._bar.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now, step = time.monotonic(), trainer.global_step
        if not self._enabled or now - self._shown < (_REFRESH if self._bar else _LINE):
            return
        self._shown = now
        loss = f"loss {float(outputs['loss']):.4g}"
        if self._bar:
            self._bar.update(self._task, completed=step, loss=loss)
            return
        rate = (step - self._first) / (now - self._begun)
        left = (trainer.max_steps - step) / rate / 60 if rate else float("inf")
        speed = f"{rate * self._samples:,.0f} samples/s"
        self._console.print(f"step {step}/{trainer.max_steps}  {loss}  {speed}  {left:.1f} min left", highlight=False)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._bar:
            self._bar.update(self._task, completed=trainer.global_step)
        self._stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None
