"""Lightning's Trainer, set up for runs whose length is counted in steps and which log and save by their own rules."""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig

from ssl_lab.cli.compose import build
from ssl_lab.errors import UserError
from ssl_lab.methods.base import Method
from ssl_lab.nn.mel import LogMel
from ssl_lab.nn.waveform import ConvFeatures
from ssl_lab.train.base import Base
from ssl_lab.train.checkpoint import CheckpointFiles
from ssl_lab.train.metrics import DataWait
from ssl_lab.train.signals import Signals

_NOISE = (  # advice that does not apply here
    ".*broadcast_buffers.*is deprecated.*",  # its successor is younger than the oldest PyTorch that is supported
    ".*does not have many workers.*",
    ".*configure_model.*callback.*",
    ".*LeafSpec.*",
    ".*module\\(s\\) in eval mode at the start of training.*",
    ".*`srun` command is available.*",
)


def make_trainer(
    node: DictConfig,
    out: Path,
    callbacks: list[L.Callback],
    keep: int = 2,
    base: Base | None = None,
    background: bool = False,
) -> L.Trainer:
    """The Trainer of a configuration; how many steps it runs is set as soon as its number of devices is known.

    `keep` checkpoints stay in the run folder; `base` is what they leave out; `background` writes them beside training.

    Raises:
        UserError: a value that Lightning refuses, or would quietly replace.
    """
    require_precision(node.precision, node.accelerator)
    if node.log_every_n_steps < 1:
        raise UserError(f"trainer.log_every_n_steps={node.log_every_n_steps}: give 1 or more optimizer steps")
    if node.accumulate_grad_batches < 1:
        raise UserError(
            f"trainer.accumulate_grad_batches={node.accumulate_grad_batches}: give 1 or more batches a step"
        )
    plugins: list[Any] = [CheckpointFiles(keep, base, background=background)]
    try:
        if (
            SLURMEnvironment.detect() and not TorchElasticEnvironment.detect()
        ):  # `srun torchrun` counts ranks by torchrun
            plugins.append(SLURMEnvironment(auto_requeue=False))  # the exit code of a signal asks for it
        trainer: L.Trainer = build(
            node,
            **({"profiler": DataWait()} if node.profiler is None else {}),
            max_epochs=-1,
            logger=False,  # ours write before a checkpoint is taken; Lightning would write after it
            callbacks=callbacks,
            plugins=plugins,
            default_root_dir=out,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            enable_model_summary=False,
        )
    except (ValueError, RuntimeError, MisconfigurationException) as error:
        raise UserError(f"trainer: {' '.join(str(error).split())}") from error
    return trainer


def require_precision(precision: Any, accelerator: str) -> None:
    """Half precision needs a GPU: Lightning would quietly train in another.

    Raises:
        UserError: 16-mixed or 16-true on a CPU.
    """
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.accelerator.is_available())
    if on_cpu and str(precision).startswith("16"):
        raise UserError(f"trainer.precision={precision} needs a GPU, and this run is on the CPU: use bf16-mixed")


def require_width(precision: Any, method: Method, ema: float | None) -> None:
    """Check that nothing is lost where weights and inputs have 16 bits.

    Raises:
        UserError: an average, a learned scale, or sound, whose quiet parts vanish beside loud ones.
    """
    if not str(precision).endswith("16-true"):
        return
    small = f"{type(method).__name__}'s {method.small_steps}" if method.small_steps else None
    if (small := small if ema is None else f"ema={ema}") is not None:
        raise UserError(f"{small} moves by steps that 16 bits round away: set trainer.precision=bf16-mixed")
    if any(isinstance(part, LogMel | ConvFeatures) for part in method.modules()):
        raise UserError(f"trainer.precision={precision} rounds sound before it is heard: take bf16-mixed")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without Lightning's notices, and its advice on what is set on purpose here."""
    loggers = [logging.getLogger(f"lightning.{name}") for name in ("pytorch", "fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    with warnings.catch_warnings():
        for text in _NOISE:
            warnings.filterwarnings("ignore", text)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


class Handlers(L.Callback):
    """Takes the signals back from Lightning, which sets handlers of its own when training starts."""

    def __init__(self, signals: Signals) -> None:
        self._signals = signals

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._signals.install()
