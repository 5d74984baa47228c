"""The parts of an experiment as `train` builds them, for verbs that try a few steps and keep nothing."""

import itertools

import torch
from omegaconf import DictConfig, OmegaConf

from ssl_lab.bench.probe import tensor_bytes
from ssl_lab.cli.train import Training
from ssl_lab.evals.base import moved
from ssl_lab.train.signals import Signals
from ssl_lab.types import Batch

_DRAWN = 17  # batches to choose from where they differ


def rehearsal(cfg: DictConfig, out: str, steps: int) -> Training:
    """The run of `cfg` in folder `out`, `steps` long, without evaluators, earlier state or loggers but the table."""
    config = OmegaConf.merge(cfg, {"out": out, "duration": f"{steps} steps", "ckpt": None, "baselines": False})
    config.eval, config.logger = {}, {"csv": {"_target_": "ssl_lab.train.loggers.CSVLogger", "save_dir": out}}
    return Training(config, Signals(), first=True)  # type: ignore[arg-type]


def batch_of(training: Training, rows: int | None = None) -> Batch:
    """A batch of training data on the run's device, as `step` takes it; `rows` instead of the configured number.

    The first one; where batches differ in size, as those of sound and sentences do, one of middling size.
    """
    batches = batches_of(training, rows)
    return batches[len(batches) // 2]


def batches_of(training: Training, rows: int | None = None) -> list[Batch]:
    """The first batch of training data as `batch_of` gives it, or, where batches differ in size, several by size."""
    data, device = training.data, training.trainer.strategy.root_device
    usual, data.batch_size = data.batch_size, rows or data.batch_size
    try:
        batches = iter(data.train_dataloader())
        drawn = [next(batches), next(batches)]
        if tensor_bytes(drawn[0]) == tensor_bytes(drawn[1]):
            del drawn[1]
        else:
            drawn += itertools.islice(batches, _DRAWN - 2)
            drawn.sort(key=tensor_bytes)
        return [data.on_after_batch_transfer(moved(batch, torch.device(device)), 0) for batch in drawn]
    finally:
        data.batch_size = usual
