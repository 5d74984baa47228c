"""The parts of an experiment as `train` builds them, for verbs that try a few steps and keep nothing."""

import torch
from omegaconf import DictConfig, OmegaConf

from ssl_lab.cli.train import Training
from ssl_lab.evals.base import moved
from ssl_lab.train.signals import Signals
from ssl_lab.types import Batch


def rehearsal(cfg: DictConfig, out: str, steps: int) -> Training:
    """The run of `cfg` in folder `out`, `steps` long, without evaluators, earlier state or loggers but the table."""
    config = OmegaConf.merge(cfg, {"out": out, "duration": f"{steps} steps", "ckpt": None, "baselines": False})
    config.eval, config.logger = {}, {"csv": {"_target_": "ssl_lab.train.loggers.CSVLogger", "save_dir": out}}
    return Training(config, Signals(), first=True)  # type: ignore[arg-type]


def batch_of(training: Training, rows: int | None = None) -> Batch:
    """A batch of training data on the run's device, as `step` takes it; `rows` instead of the configured number."""
    data, device = training.data, training.trainer.strategy.root_device
    usual, data.batch_size = data.batch_size, rows or data.batch_size
    try:
        batch = moved(next(iter(data.train_dataloader())), torch.device(device))
        return data.on_after_batch_transfer(batch, 0)
    finally:
        data.batch_size = usual
