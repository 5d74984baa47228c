"""Keeps a loss or gradient that is not finite from the weights: the step is left out, or the run stops."""

import itertools
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

    A bad step is left out on all ranks: no gradient, so nothing that the optimizer does, no average, no `after_step`.
    Where that is not enough, because a buffer has taken in what is not finite, and after too many in a row, the run
    stops. One number per step is waited for. With a loss scaler (16-mixed) an infinite gradient is the scaler's
    business, and the loss alone decides.

    Args:
        last: the newest checkpoint, for the message.
        skip: bad steps in a row that are left out; one more stops the run.
        say: shows a line.

    Attributes:
        grad_norm: norm of the whole gradient of the latest step, before clipping; None before the first.
    """

    def __init__(
        self,
        last: Callable[[], Path | None] = lambda: None,
        *,
        skip: int = 0,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.grad_norm: Tensor | None = None
        self._last, self._skip, self._say, self._in_a_row = last, skip, say, 0
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
        pl_module.skipped = bool(dist.all_reduce_mean(bad.float()) > 0)  # type: ignore[assignment]
        if not pl_module.skipped:
            self._in_a_row = 0
            return
        self._in_a_row += 1
        what, rows = self._facts(trainer.global_step + 1, float(norm))
        for parameter in itertools.chain(pl_module.parameters(), *(g["params"] for g in optimizer.param_groups)):
            parameter.grad = None  # a divided method's single numbers have theirs with the optimizer
        pl_module.after_skip()  # type: ignore[operator]
        poisoned = next((name for name, value in pl_module.named_buffers() if _bad(value)), None)
        if self._in_a_row <= self._skip and not _ranks_with(poisoned is not None, norm.device):
            self._say(f"{what}: step left out, {self._in_a_row} of at most {self._skip} in a row; {rows}")
            return
        and_that = f", and {poisoned} with it" if poisoned else f", {self._in_a_row} in a row" if self._skip else ""
        raise NonFiniteError(
            f"{what}{and_that}: stopped before the optimizer could apply it; {rows}; "
            f"last good checkpoint: {self._last() or 'none'}; "
            "lower optim.lr, set trainer.gradient_clip_val, or look at these rows"
        )

    def state_dict(self) -> dict[str, int]:
        return {"in_a_row": self._in_a_row}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._in_a_row = state_dict["in_a_row"]

    def _facts(self, step: int, norm: float) -> tuple[str, str]:
        """What is not finite, at which step and rank; on which rows."""
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
        return f"{what} at step {step}{where}", f"data rows {rows[:_SHOWN]}{more}"


def _ranks_with(flag: bool, device: torch.device) -> list[int]:
    """Ranks that raise `flag`; every rank must ask."""
    return dist.gather(torch.tensor([float(flag)], device=device), grad=False).nonzero().flatten().tolist()


def _bad(value: Tensor) -> bool:
    """-inf is left to the masks that some networks keep as buffers."""
    return value.is_floating_point() and bool((value.isnan() | value.isposinf()).any())


def _whole(norm: Tensor) -> Tensor:
    """The norm of sharded gradients (DTensor) as a plain tensor, the same on every rank."""
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
