"""What happens beside the steps of a run: averaging, checkpoints, evaluations, pictures. None of it changes a step."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint, WeightAveraging
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ssl_lab import dist
from ssl_lab.dist import local
from ssl_lab.errors import UserError
from ssl_lab.pictures import save_png
from ssl_lab.train.checkpoint import CheckpointFiles
from ssl_lab.train.loggers import Loggers
from ssl_lab.train.sharded import gathered, load_
from ssl_lab.train.sharded_optim import collected

log = logging.getLogger(__name__)


Weights = Callable[[L.LightningModule], contextlib.AbstractContextManager[None]]


def as_they_are(method: L.LightningModule) -> contextlib.AbstractContextManager[None]:
    """The weights that train: nothing is put in their place. Those that are divided among ranks are gathered."""
    return gathered(method)


@contextlib.contextmanager
def aside(method: L.LightningModule) -> Iterator[None]:
    """Do something else with a method in training: in eval mode, leaving modes and random states as they were."""
    training = {module: module.training for module in method.modules()}
    with torch.random.fork_rng():
        method.eval()
        try:
            yield
        finally:
            for module, mode in training.items():
                module.training = mode


class EMA(WeightAveraging):
    """Exponential moving average of the weights: what is evaluated, exported and found under `state_dict`.

    The weights that train on stay in the checkpoint beside it.
    """

    def __init__(self, decay: float) -> None:
        if not isinstance(decay, float | int) or not 0 < decay < 1:
            raise UserError(f"ema={decay} is no decay of an average: give a number between 0 and 1, such as 0.999")
        move = get_ema_multi_avg_fn(decay)

        def average(averages: Sequence[Tensor], current: Sequence[Tensor], count: Any) -> None:
            mine, now = [*map(local, averages)], [*map(local, current)]  # of divided weights each rank moves its part
            if mine[0].is_floating_point():
                move(mine, now, count)
            else:  # counters, tables of places: an average of such means nothing
                for before, after in zip(mine, now, strict=True):
                    before.copy_(after)

        super().__init__(multi_avg_fn=average)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kwargs: Any) -> None:
        if pl_module.skipped:  # a step that was left out is none of the average's either, also after a resume
            self._latest_update_step = trainer.global_step
        else:
            super().on_train_batch_end(trainer, pl_module, *args, **kwargs)

    @contextlib.contextmanager
    def applied(self, method: L.LightningModule) -> Iterator[None]:
        """The average in place of the weights, gathered, bit for bit undone at the end."""
        self._swap_models(method)
        try:
            with gathered(method):
                yield
        finally:
            self._swap_models(method)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        checkpoint["state_dict"] = collected(checkpoint["state_dict"])

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Whole tensors into what may be divided; a run without an average goes on from its weights with one."""
        assert self._average_model is not None
        averaged = "current_model_state" in checkpoint
        load_(self._average_model.module, checkpoint["state_dict"], strict=averaged)
        if averaged:
            self._average_model.n_averaged.copy_(checkpoint["averaging_state"]["n_averaged"])
            load_(pl_module, checkpoint["current_model_state"])


class Checkpoints(Checkpoint):
    """Saves at step 0 (so that what cannot be saved shows at once), every so often, at the end and when told to stop.

    Args:
        folder: where `step=N.ckpt` go.
        every_steps: optimizer steps between files, 0 = by time alone.
        every_minutes: minutes between files, 0 = by steps alone.
        stop: asked at the end of every step whether to save and end the training.
        before: called before a file is written, so that what was logged up to its step is on disk first.
        extra: plain values to keep in every file, such as the config.
    """

    def __init__(
        self,
        folder: Path,
        *,
        every_steps: int = 0,
        every_minutes: float = 5.0,
        stop: Callable[[], bool] = lambda: False,
        before: Callable[[], None] = lambda: None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        if every_steps < 0 or every_minutes < 0:
            raise UserError(f"save_steps={every_steps}, save_minutes={every_minutes}: give 0 or more, 0 = not by these")
        self.folder, self.every_steps, self.every_minutes = folder, every_steps, every_minutes
        self._stop, self._before, self._extra = stop, before, dict(extra or {})
        self._saved, self._clock, self._between_steps = -1, 0.0, False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._saved, self._clock = trainer.global_step, time.monotonic()
        if trainer.global_step == 0:
            self.save(trainer)

    def on_train_batch_start(self, *_: Any) -> None:
        self._between_steps = False

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return  # a file in the middle of an accumulation would lose the gradient so far
        step = trainer.global_step
        minutes = (time.monotonic() - self._clock) / 60
        stop = self._stop() or trainer.should_stop  # others may end the training too
        stop, late = _any_rank(pl_module.device, stop, 0 < self.every_minutes <= minutes)
        due = self.every_steps > 0 and step % self.every_steps == 0
        if stop or late or due or step == trainer.max_steps:
            self.save(trainer)
        trainer.should_stop |= stop
        self._between_steps = True

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        # Only between two steps is the state that of a step; with several ranks the others would not come to save.
        if self._between_steps and trainer.global_step > self._saved and dist.world_size() == 1:
            self.save(trainer)
        with contextlib.suppress(UserError):  # the exception itself is the news
            _wait(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        _wait(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint |= {"samples_per_step": pl_module.samples_per_step, **self._extra}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Count the batches behind as those of this run: on other devices a step may be made of more or fewer."""
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counts in (progress["total"], progress["current"]):
            shift = checkpoint["global_step"] * trainer.accumulate_grad_batches - counts["ready"]
            counts.update({name: count + shift for name, count in counts.items()})

    def save(self, trainer: L.Trainer) -> None:
        """Write the state as it is now, which must be that of a finished optimizer step."""
        self._before()
        trainer.save_checkpoint(self.folder / f"step={trainer.global_step}.ckpt")
        self._saved, self._clock = trainer.global_step, time.monotonic()


class RunEvals(L.Callback):
    """Runs evaluators in the middle of training, each at its own pace. The one at the end is not its business.

    Args:
        every: name -> steps between two runs, 0 = not during training.
        run: takes (names, step), gives scores by name, and leaves the method as it was.
        loggers: where scores go.
        weights: gives a context in which the method holds the weights to judge.
    """

    def __init__(
        self,
        every: Mapping[str, int],
        run: Callable[[Sequence[str], int], Mapping[str, float]],
        loggers: Loggers,
        weights: Weights = as_they_are,
    ) -> None:
        for name, steps in every.items():
            if steps < 0:
                raise UserError(f"eval.{name}.every={steps}: give a number of steps, or 0 for the end alone")
        self._every, self._run, self._loggers, self._weights = dict(every), run, loggers, weights

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if (batch_idx + 1) % trainer.accumulate_grad_batches or step == trainer.max_steps:
            return
        if names := [name for name, every in self._every.items() if every and step % every == 0]:
            with self._weights(pl_module):
                scores = self._run(names, step)
            self._loggers.scalars(scores, step)


class Pictures(L.Callback):
    """Draws what a method does with the same few images, every `every` steps and when asked, into `folder`.

    Args:
        folder: where `NAME_step=N.png` go.
        draw: gives pictures (3, H, W) uint8 by name.
        loggers: which show them too.
        every: steps between two drawings, 0 = when asked only.
        weights: as in `RunEvals`.
    """

    def __init__(
        self,
        folder: Path,
        draw: Callable[[], Mapping[str, Tensor]],
        loggers: Loggers,
        *,
        every: int = 0,
        weights: Weights = as_they_are,
    ) -> None:
        if every < 0:
            raise UserError(f"picture_steps={every}: give a number of steps, or 0 for the end alone")
        self.folder, self.every = folder, every
        self._draw, self._loggers, self._weights = draw, loggers, weights

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if (batch_idx + 1) % trainer.accumulate_grad_batches or step == trainer.max_steps:
            return
        if self.every and step % self.every == 0:
            with self._weights(pl_module):
                self.show(pl_module, step)

    def show(self, method: L.LightningModule, step: int) -> list[Path]:
        """Draw now; gives the files."""
        if dist.rank() > 0:
            return []
        with aside(method), torch.no_grad():
            images = {f"pictures/{name}": image.cpu() for name, image in self._draw().items()}
        self._loggers.pictures(images, step)
        files = []
        for name, image in images.items():
            files.append(self.folder / f"{name.removeprefix('pictures/')}_step={step}.png")
            save_png(files[-1], image)
        return files


def _wait(trainer: L.Trainer) -> None:
    """Until a checkpoint that is written in the background is there."""
    if isinstance(files := trainer.strategy.checkpoint_io, CheckpointFiles):
        files.wait()


def _any_rank(device: torch.device, *flags: bool) -> list[bool]:
    """Each flag, true when it is on some rank."""
    if dist.world_size() == 1:
        return [*flags]
    return (dist.all_reduce_mean(torch.tensor(flags, dtype=torch.float32, device=device)) > 0).tolist()
