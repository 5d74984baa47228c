"""Says in words that a run is collapsing, while there is still time to do something about it."""

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor

from ssl_lab import dist
from ssl_lab.spread import feature_std, rankme
from ssl_lab.train.callbacks import aside
from ssl_lab.train.sharded import gathered
from ssl_lab.types import Batch, Embeds

_PROBE = 256  # samples that are looked at
_SPREAD, _RANK, _NATS = 0.02, 1.2, 0.02  # far below what healthy runs show


class CollapseAlarm(L.Callback):
    """Measures the features of a training batch at every logged step and warns when they have become all alike.

    The first tenth of a training is left out, because an untrained encoder's class token hardly depends on its input.

    Args:
        say: gets the warning, once per kind.
        patience: logged steps in a row that must look bad.

    Attributes:
        values: train/feature_std and train/rankme of the last look, for the log.
    """

    def __init__(self, say: Callable[[str], None], *, patience: int = 3) -> None:
        self._say, self._patience = say, patience
        self._seen: dict[str, int] = {}
        self.values: dict[str, float] = {}

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if (batch_idx + 1) % trainer.accumulate_grad_batches or not isinstance(pl_module, Embeds):
            return
        if step % trainer.log_every_n_steps and step != trainer.max_steps:  # type: ignore[attr-defined]
            return
        with gathered(pl_module):  # which every rank must ask for
            if dist.rank() == 0:
                self._look(trainer, pl_module, batch, step)

    def _look(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, step: int) -> None:
        batch = batch if "views" not in batch else Batch(image=batch["views"][0])
        probe = {key: value[:_PROBE] for key, value in batch.items() if isinstance(value, Tensor)}
        with aside(pl_module), torch.no_grad(), trainer.precision_plugin.forward_context():
            features: Tensor = pl_module.embed(probe)  # type: ignore[operator]
        if not features.isfinite().all():  # of a batch that is not finite itself: the guard's business
            return
        self.values = {"train/feature_std": float(feature_std(features)), "train/rankme": float(rankme(features))}
        if len(features) > 4 and step >= 0.1 * trainer.max_steps:
            logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
            self._judge(diagnosis(self.values | logged), step)

    def _judge(self, found: dict[str, str], step: int) -> None:
        self._seen = {kind: self._seen.get(kind, 0) + 1 for kind in found}
        for kind, text in found.items():
            if self._seen[kind] == self._patience:
                self._say(f"step {step}: {text}")


def diagnosis(values: dict[str, float]) -> dict[str, str]:
    """What is wrong and what to try, by kind; empty if nothing is. `values` are logged numbers of one step."""
    found = {}
    std, rank = values["train/feature_std"], values["train/rankme"]
    if std < _SPREAD or rank < _RANK:
        found["features"] = (
            f"collapse: all samples get nearly the same features (feature_std {std:.2g}, where 1 is an even spread; "
            f"rankme {rank:.3g}). Try a lower optim.lr, a longer optim.warmup, or to start from trained weights"
        )
    information, entropy = values.get("train/teacher_information"), values.get("train/teacher_entropy")
    if information is None or entropy is None or information >= _NATS:
        return found
    if information + entropy < 0.5:
        found["teacher"] = (
            f"collapse: the teacher puts every sample on the same prototype (entropy of all its assignments "
            f"{information + entropy:.2g} nats). Try a higher method.teacher_temperature, a larger batch, or Sinkhorn "
            "centring where the method has it"
        )
    else:
        found["teacher"] = (
            f"collapse: the teacher gives every sample the same assignment (entropy {entropy:.3g} nats, of which "
            f"{information:.2g} depend on the sample). Try a lower method.teacher_temperature, a lower optim.lr, or a "
            "method.momentum closer to 1"
        )
    return found
