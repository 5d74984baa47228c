"""Stops a run before a loss or gradient that is not finite reaches the weights."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from ssl_lab import dist
from ssl_lab.errors import UserError
from ssl_lab.types import Batch

_SHOWN = 32  # rows named in the message


class NonFiniteError(UserError):
    """A loss or a gradient became NaN or infinite; the weights are those of the step before."""


class Guard(L.Callback):
    """Checks loss and gradient norm after the backward pass and before clipping and the optimizer.

    All ranks agree first, so that none goes on alone. One number per step is waited for. With a loss scaler (16-mixed)
    an infinite gradient is the scaler's business, and the loss alone decides.

    Attributes:
        grad_norm: norm of the whole gradient of the latest step, before clipping; None before the first.
    """

    def __init__(self, last: Callable[[], Path | None] = lambda: None) -> None:
        self.grad_norm: Tensor | None = None
        self._last = last
        self._losses: list[Tensor] = []
        self._rows: list[Tensor] = []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._losses, self._rows = [], []
        if "index" in batch:
            self._rows.append(batch["index"])

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        self._losses.append(loss.detach())

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = _whole(torch.nn.utils.get_total_norm(grads))
        self.grad_norm = norm
        watched = [*self._losses] if getattr(trainer.precision_plugin, "scaler", None) else [*self._losses, norm]
        bad = ~torch.stack([value.float().reshape(()).to(norm.device) for value in watched]).isfinite().all()
        if bool(dist.all_reduce_mean(bad.float()) > 0):
            raise NonFiniteError(self._message(trainer.global_step + 1, float(norm)))

    def _message(self, step: int, norm: float) -> str:
        """One line: what, at which step, on which rows, and where the last good state is."""
        losses = [float(loss) for loss in self._losses]
        mine = [loss for loss in losses if not math.isfinite(loss)]
        what = f"loss is {mine[0]}" if mine else f"gradient norm is {norm}"
        ranks = _ranks_with(bool(mine), self._losses[0].device)
        if ranks and not mine:
            what = f"loss is not finite on rank {', '.join(map(str, ranks))}"
        suspects = [rows for rows, loss in zip(self._rows, losses, strict=False) if not (mine and math.isfinite(loss))]
        rows = torch.cat(suspects).tolist() if suspects else []
        more = f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
        where = f" (rank {dist.rank()})" if dist.world_size() > 1 else ""
        return (
            f"{what} at step {step}{where}: stopped before the optimizer could apply it; "
            f"data rows {rows[:_SHOWN]}{more}; last good checkpoint: {self._last() or 'none'}; "
            "lower optim.lr, set trainer.gradient_clip_val, or look at these rows"
        )


def _ranks_with(flag: bool, device: torch.device) -> list[int]:
    """Ranks that raise `flag`; every rank must ask."""
    return dist.gather(torch.tensor([float(flag)], device=device), grad=False).nonzero().flatten().tolist()


def _whole(norm: Tensor) -> Tensor:
    """The norm of sharded gradients (DTensor) as a plain tensor, the same on every rank."""
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
