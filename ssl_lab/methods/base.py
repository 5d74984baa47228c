"""The one place that knows Lightning's hooks. A method says `step`, and what it can do; nothing else of training."""

from collections.abc import Iterable
from typing import Any, ClassVar

import lightning as L
import torch
from torch import Tensor, nn

from ssl_lab import dist
from ssl_lab.rng import fold, seed_all
from ssl_lab.train.optim import Optim
from ssl_lab.train.parallel import Parallel
from ssl_lab.types import Batch, Step


class Method(L.LightningModule):
    """A network and its objective. Subclasses write `step`, some `after_backward`, `after_step`, `after_skip`,
    `param_groups`.

    They override no other hook, never log and never touch the trainer, so a method is tested with
    `method.step(batch, 0.5).loss.backward()` and trained with `L.Trainer(max_steps=...).fit(method, data)`.

    Attributes:
        optim: optimizer and schedules; the command line sets it from YAML.
        parallel: float8, activation checkpointing, compilation.
        seed: every random number of a step comes from (seed, global step, micro-batch, rank).
        samples_per_step: global batch times accumulation, for the scaling of the learning rate.
        skipped: the latest step's loss or gradient was not finite, and it was left out.
        small_steps: what moves by less than weights of 16 bits can follow (a teacher, a learned scale); None = nothing.
    """

    small_steps: ClassVar[str | None] = None

    def __init__(self) -> None:
        super().__init__()
        self.optim, self.parallel = Optim(), Parallel()
        self.seed, self.samples_per_step, self.skipped = 0, 256, False

    def step(self, batch: Batch, progress: float) -> Step:
        """Loss of one batch at `progress` in [0, 1] through training."""
        raise TypeError(f"{type(self).__name__} must define step(batch, progress)")

    def after_backward(self, progress: float) -> None:
        """Called once per optimizer step when the gradient is complete, before clipping: to change or drop some."""

    def after_step(self, progress: float) -> None:
        """Called once per optimizer step: a teacher's update, a clamp."""

    def after_skip(self) -> None:
        """Called instead of `after_step` when a step is left out: forget what `step` has kept for it."""

    def param_groups(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Named parameters to train; those that need no gradient are left out by the optimizer."""
        return self.named_parameters()

    # ---- Lightning's side; no method overrides what follows

    @property
    def progress(self) -> float:
        """Share of the optimizer steps done."""
        total = self.trainer.max_steps
        return min(1.0, self.global_step / total) if total and total > 0 else 0.0

    def configure_model(self) -> None:
        self.parallel(self)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optim.build(self.param_groups(), self.samples_per_step)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        micro = batch_idx % self.trainer.accumulate_grad_batches
        seed_all(fold(self.seed, self.global_step, micro, dist.rank()))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        step = self.step(batch, self.progress)
        done = self.global_step + 1
        if done % self.trainer.log_every_n_steps == 0 or done == self.trainer.max_steps:  # type: ignore[attr-defined]
            logs = {"train/loss": step.loss.detach(), **{f"train/{k}": v for k, v in step.logs.items()}}
            self.log_dict(logs, sync_dist=dist.world_size() > 1)
        return step.loss

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        self.after_backward(self.progress)  # a loss scaler has been taken out by now
        super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        progress = self.progress
        self.optim.update(optimizer.optimizer if hasattr(optimizer, "optimizer") else optimizer, progress)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if not self.skipped:
            self.after_step(progress)
