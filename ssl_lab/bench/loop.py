"""What surrounds a step in real training: the data that must be ready, and everything else of the loop."""

import time
from collections.abc import Callable, Iterable
from typing import Any

import lightning as L
import torch

from ssl_lab.bench.timing import timed
from ssl_lab.types import Batch


def data_wait(loader: Iterable[Batch], step: Callable[[], object], device: torch.device, *, batches: int) -> float:
    """Share of the time spent waiting for the next batch when a step follows on each.

    Workers, if the loader has any, prepare during the step as in training. The first batch, which starts them, is
    left out.
    """
    stream = iter(loader)
    next(stream)
    waited = busy = 0.0
    for _ in range(batches):
        busy += timed(step, device)
        start = time.perf_counter()
        next(stream)
        waited += time.perf_counter() - start
    return waited / (waited + busy)


class Clock(L.Callback):
    """Optimizer steps per second of a Trainer's loop by the wall clock, from the end of step `warmup` to the last."""

    def __init__(self, warmup: int = 3) -> None:
        self.warmup, self._ends = warmup, list[tuple[int, float]]()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step >= self.warmup:
            self._ends.append((trainer.global_step, time.perf_counter()))

    @property
    def steps_per_s(self) -> float:
        """The mean, so that what happens only every so often counts too."""
        (first, start), (last, end) = self._ends[0], self._ends[-1]
        return (last - first) / (end - start)
