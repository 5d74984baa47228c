"""One optimizer step as a call without arguments: the thing that is timed."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ssl_lab.errors import UserError
from ssl_lab.evals.base import moved
from ssl_lab.methods.base import Method
from ssl_lab.types import Batch

_DTYPES: dict[str, tuple[torch.dtype, torch.dtype | None]] = {  # of the weights, of autocast
    "32-true": (torch.float32, None),
    "bf16-mixed": (torch.float32, torch.bfloat16),
    "16-mixed": (torch.float32, torch.float16),
    "bf16-true": (torch.bfloat16, None),
}
_SHORT = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}


def dtypes(precision: str | int) -> tuple[torch.dtype, torch.dtype | None]:
    """Of the weights and of autocast (None = off) for a value of `trainer.precision`."""
    name = _SHORT.get(str(precision), str(precision))
    if name not in _DTYPES:
        raise UserError(f"trainer.precision={precision} cannot be timed; there are {', '.join(_DTYPES)}")
    return _DTYPES[name]


def compute_dtype(precision: str | int) -> torch.dtype:
    """The dtype of the matrix products."""
    weights, autocast = dtypes(precision)
    return autocast or weights


class TrainStep:
    """Forward under autocast, backward, optimizer, gradients dropped; gives the detached loss.

    Args:
        model: moved to the weights' dtype in place.
        loss: makes the scalar loss.
        optimizer: makes the optimizer of the model once it has its dtype.
        device: of the model and its batch.
        precision: as `trainer.precision`.
        before: called when the gradient is complete.
        after: called at the end of a step.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[], Tensor],
        optimizer: Callable[[], torch.optim.Optimizer],
        *,
        device: torch.device,
        precision: str | int,
        before: Callable[[], None] | None = None,
        after: Callable[[], None] | None = None,
    ) -> None:
        self.before = before
        weights, self.autocast = dtypes(precision)
        self.model, self.loss, self.after, self.device = model.to(device, weights).train(), loss, after, device
        self.optimizer = optimizer()
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.autocast == torch.float16)
        self.params = sum(p.numel() for p in model.parameters() if p.requires_grad)

    def __call__(self) -> Tensor:
        loss = self.forward_backward()
        if self.before is not None:
            self.scaler.unscale_(self.optimizer)
            self.before()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.after is not None:
            self.after()
        return loss

    def forward_backward(self) -> Tensor:
        """The part of a step that has matrix products."""
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            loss = self.loss()
        self.scaler.scale(loss).backward()
        return loss.detach()


class MethodStep(TrainStep):
    """A step of `method` on a batch in memory, half way through training: its loss, its optimizer, all its hooks.

    The images take the dtype of the weights, as Lightning's precision does it. Features of a frozen encoder that
    are kept are forgotten: it is a step of the first pass over the data.

    Args:
        method: moved to the device and the weights' dtype in place.
        batch: of the first step, see `feed`.
        device: where steps are made.
        precision: as `trainer.precision`.
    """

    def __init__(self, method: Method, batch: Batch, *, device: torch.device, precision: str | int) -> None:
        forget: Callable[[], None] = getattr(method, "forget_images", lambda: None)

        def loss() -> Tensor:
            forget()
            return method.step(self._batch, 0.5).loss

        def after() -> None:
            method.optim.update(self.optimizer, 0.5)
            method.after_step(0.5)
            forget()  # before another batch is read, which would leave out what is known

        super().__init__(
            method,
            loss,
            method.configure_optimizers,
            device=device,
            precision=precision,
            before=lambda: method.after_backward(0.5),
            after=after,
        )
        self._dtype = dtypes(precision)[0]
        self.feed(batch)
        after()

    def feed(self, batch: Batch) -> None:
        """Take `batch` in the steps to come."""
        self._batch = moved(batch, self.device, self._dtype)
