"""Numbers of a run: losses, rates, speed and memory, read every `every` steps and not in between."""

import resource
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.profilers import PassThroughProfiler
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ssl_lab.train.loggers import Loggers
from ssl_lab.types import Batch


class DataWait(PassThroughProfiler):
    """Seconds that training waited for the next batch, through Lightning's own marks around the loader."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0
        self._start = 0.0

    def start(self, action_name: str) -> None:
        if action_name.endswith("train_dataloader_next"):
            self._start = time.perf_counter()

    def stop(self, action_name: str) -> None:
        if action_name.endswith("train_dataloader_next"):
            self.seconds += time.perf_counter() - self._start


class Log(L.Callback):
    """Writes one row per `trainer.log_every_n_steps` optimizer steps, and one at the last step.

    train/* are the values of that step, not means since the row before, so that a resumed run repeats them. opt/lr and
    opt/weight_decay are the largest of the parameter groups, opt/grad_norm comes before clipping. time/samples_per_s
    and, for text, time/tokens_per_s leave out evaluations, pictures and checkpoints; time/data_wait is the share of the
    time spent waiting for data, time/communication, under DDP, that spent waiting for gradients after the backward
    pass, by torch's own clock: a mean over the steps that it samples. `more` gives further numbers, `rates` those that
    follow from the samples per second of one device.
    """

    def __init__(
        self,
        loggers: Loggers,
        grad_norm: Callable[[], Tensor | None] = lambda: None,
        more: Callable[[], Mapping[str, float]] = dict,
        rates: Callable[[float], Mapping[str, float]] = lambda samples_per_s: {},
    ) -> None:
        self._loggers, self._grad_norm, self._more, self._rates = loggers, grad_norm, more, rates
        self._busy, self._wait, self._steps, self._start, self._tokens = 0.0, 0.0, 0, 0.0, 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._restart(trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        self._start = time.perf_counter()
        self._tokens += batch["tokens"].numel() if "tokens" in batch else 0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self._busy += time.perf_counter() - self._start
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        self._steps += 1
        step = trainer.global_step
        if step % trainer.log_every_n_steps == 0 or step == trainer.max_steps:  # type: ignore[attr-defined]
            self._loggers.scalars(self._row(trainer, pl_module), step)
            self._restart(trainer)

    def _row(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, float]:
        row = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("train/")}
        row |= self._more()
        groups = trainer.optimizers[0].param_groups
        row |= {f"opt/{name}": max(float(group[name]) for group in groups) for name in ("lr", "weight_decay")}
        if (norm := self._grad_norm()) is not None:
            row["opt/grad_norm"] = float(norm)
        waited = _waited(trainer) - self._wait
        seconds = max(self._busy + waited, 1e-9)
        row["time/samples_per_s"] = rate = self._steps * int(pl_module.samples_per_step) / seconds  # type: ignore[arg-type]
        if self._tokens:
            row["time/tokens_per_s"] = self._tokens * trainer.world_size / seconds
        row["time/data_wait"] = waited / seconds
        row |= self._rates(rate / trainer.world_size)
        if (sent := _exposed(trainer.strategy)) is not None:
            row["time/communication"] = min(1.0, sent * self._steps / seconds)
        row["memory/peak_gb"] = peak_memory(pl_module.device) / 1e9
        return row

    def _restart(self, trainer: L.Trainer) -> None:
        self._busy, self._steps, self._wait, self._tokens = 0.0, 0, _waited(trainer), 0


def _waited(trainer: L.Trainer) -> float:
    profiler = getattr(trainer, "profiler", None)
    return profiler.seconds if isinstance(profiler, DataWait) else 0.0


def _exposed(strategy: Any) -> float | None:
    """Seconds a step in which gradients travel and nothing else is done; None where DDP is not, or has not measured."""
    model = getattr(strategy, "model", None)
    if not isinstance(model, DistributedDataParallel):
        return None
    facts = model._get_ddp_logging_data()
    sent, hidden = (facts.get(f"avg_backward_{name}") for name in ("comm_time", "compute_comm_overlap_time"))
    return None if sent is None or hidden is None else max(0, sent - hidden) / 1e9


def peak_memory(device: torch.device) -> int:
    """Largest memory held so far: the allocator's on a GPU, the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
