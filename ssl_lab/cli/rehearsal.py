"""The parts of an experiment as `train` builds them, for verbs that try a few steps and keep nothing."""

import itertools
from collections.abc import Iterator

import torch
from omegaconf import DictConfig, OmegaConf, open_dict

from ssl_lab.bench.probe import tensor_bytes
from ssl_lab.cli.train import Training
from ssl_lab.evals.base import moved
from ssl_lab.train.signals import Signals
from ssl_lab.types import Batch

_DRAWN = 17  # batches to choose from where they differ


def rehearsal(cfg: DictConfig, out: str, steps: int) -> Training:
    """The run of `cfg` in folder `out`, `steps` long, without evaluators, earlier state or loggers but the table.

    It is one of this machine alone: those that the run is for need not be there.
    """
    config = OmegaConf.merge(cfg, {"out": out, "duration": f"{steps} steps", "ckpt": None, "baselines": False})
    with open_dict(config):
        config.trainer.num_nodes = 1
    config.eval, config.logger = {}, {"csv": {"_target_": "ssl_lab.train.loggers.CSVLogger", "save_dir": out}}
    return Training(config, Signals(), first=True)  # type: ignore[arg-type]


def batch_of(training: Training, rows: int | None = None) -> Batch:
    """A batch of training data on the run's device, as `step` takes it; `rows` instead of the configured number.

    The first one; where batches differ in size, as those of sound and sentences do, one of middling size.
    """
    drawn = _drawn(training, rows)
    return _ready(training, drawn[len(drawn) // 2 if len(drawn) > 2 else 0])


def batches_of(training: Training) -> list[Batch]:
    """The first batch of training data as `batch_of` gives it, or, where batches differ in size, several by size."""
    return [_ready(training, batch) for batch in _drawn(training)]


def fresh(training: Training, count: int) -> Iterator[Batch]:
    """`count` batches one after another as a run reads them, each made when the one before is done with."""
    for batch in itertools.islice(training.data.train_dataloader(), count):
        yield _ready(training, batch)


def _ready(training: Training, batch: Batch) -> Batch:
    device = torch.device(training.trainer.strategy.root_device)
    return training.data.on_after_batch_transfer(moved(batch, device), 0)


def _drawn(training: Training, rows: int | None = None) -> list[Batch]:
    """As the loader gives them: one, or several by size."""
    data = training.data
    usual, data.batch_size = data.batch_size, rows or data.batch_size
    try:
        batches = iter(data.train_dataloader())
        drawn = [next(batches), next(batches)]
        if tensor_bytes(drawn[0]) == tensor_bytes(drawn[1]):
            return drawn[:1]
        return sorted([*drawn, *itertools.islice(batches, _DRAWN - 2)], key=tensor_bytes)
    finally:
        data.batch_size = usual
