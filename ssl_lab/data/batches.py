"""Batches by number: which samples they hold and how they look follows from the number alone."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ssl_lab.data.source import Source
from ssl_lab.data.stream import batch_positions, rows_at
from ssl_lab.data.views import Views
from ssl_lab.errors import UserError
from ssl_lab.rng import fold
from ssl_lab.types import Batch

_AUGMENT = 0xA06  # keeps the draws of the augmentation apart from those of the order


def augment(views: Views, data: Any, position: Tensor, seed: int) -> Batch:
    """What the views make of `Samples.data` in training, on the device of images."""
    return views(data, position, fold(seed, _AUGMENT))


@dataclass(frozen=True)
class TrainBatches:
    """Batch `number` of this rank from the endless stream; without `views` the pixels stay as they are stored."""

    source: Source
    views: Views | None
    batch_size: int
    seed: int
    rank: int
    world_size: int

    def __call__(self, number: int) -> Batch:
        """Keys: those of the views (or `image`, uint8), `target`, `index`, `position`."""
        position = batch_positions(number, self.batch_size, self.rank, self.world_size)
        own = getattr(self.source, "rows_at", None)  # shards have an order of their own
        rows = rows_at(position, self.seed, len(self.source)) if own is None else own(position, self.seed)
        samples = self.source.read(rows.tolist())
        if self.views is not None:
            batch = augment(self.views, samples.data, position, self.seed)
        elif isinstance(samples.data, Tensor):
            batch = {"image": samples.data}
        else:
            raise UserError("augment_on_device needs images of one size, held in memory: set it to false")
        batch.setdefault("target", samples.targets)  # views may make one, such as whether a sentence follows
        batch.update({"index": samples.rows, "position": position})
        return batch


@dataclass(frozen=True)
class EvalBatches:
    """Batch `number` of the given `rows` (N,) int64, through `views`."""

    source: Source
    views: Views
    batch_size: int
    rows: Tensor

    def __call__(self, number: int) -> Batch:
        """Keys: those of the views, `target`, `index`."""
        rows = self.rows[number * self.batch_size : (number + 1) * self.batch_size]
        samples = self.source.read(rows.tolist())
        batch = self.views(samples.data, rows, 0)
        batch.setdefault("target", samples.targets)
        batch["index"] = samples.rows
        return batch


class _Batches(Dataset[Batch | UserError]):
    """What a worker runs. A user's mistake comes back as a value: raised there, it would arrive inside a traceback."""

    def __init__(self, make: Callable[[int], Batch]):
        self.make = make

    def __getitem__(self, number: int) -> Batch | UserError:
        try:
            return self.make(number)
        except UserError as error:
            return error


def _live_with_training(worker: int) -> None:
    """A worker's life is that of the training process: it outlives every signal to the job, and nothing else."""
    for number in (
        signal.SIGTERM,
        signal.SIGINT,
        signal.SIGUSR1,
        signal.SIGUSR2,
    ):  # training needs its workers until it ends in order
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_training, daemon=True).start()


def _end_with_training() -> None:
    """PyTorch's own watch looks at the parent process, which is the fork server where that made the worker."""
    training = multiprocessing.parent_process()
    if training is not None:
        training.join()
        os._exit(1)


class Loader:
    """Iterates over the batches that `numbers()` lists, made ahead by `num_workers` processes.

    An iterable of its own rather than a `DataLoader`: `numbers` is asked anew whenever an iteration starts, and a
    Trainer finds no sampler to exchange. It has no length, since a training stream has no end.
    """

    def __init__(self, make: Callable[[int], Batch], numbers: Callable[[], Iterable[int]], num_workers: int = 0):
        self.make, self.numbers, self.num_workers = make, numbers, num_workers

    def __iter__(self) -> Iterator[Batch]:
        loader: DataLoader[Batch | UserError] = DataLoader(
            _Batches(self.make),
            batch_size=None,
            sampler=self.numbers(),
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_live_with_training,
            generator=torch.Generator(),  # else every iteration would advance the global random state
        )
        for batch in loader:
            if isinstance(batch, UserError):
                raise batch
            yield batch
