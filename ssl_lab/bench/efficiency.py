"""How well a run uses its device, for the rows of its log."""

import contextlib
import copy
import functools
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import lightning as L
import torch
from torch import nn

from ssl_lab import dist
from ssl_lab.bench.devices import ACCELERATORS
from ssl_lab.bench.flops import count
from ssl_lab.bench.step import compute_dtype
from ssl_lab.bench.timing import matmul_peak
from ssl_lab.errors import UserError
from ssl_lab.methods.base import Method
from ssl_lab.types import Batch

log = logging.getLogger(__name__)


class Efficiency(L.Callback):
    """Counts the work of the run's first batch on a shadow of the method, so that no bit of the run changes.

    The shadow shares the weights and has gradients and buffers of its own; it goes forward and backward once, by
    itself, blocks not compiled. Later batches are taken to have the same work a sample. Weights that are divided among
    ranks have no shadow; where one cannot be made, or memory does not suffice for it, nothing is told.
    """

    def __init__(self) -> None:
        self._flops: float | None = None  # of a sample
        self._peak = 0.0
        self._tried = False

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """The method seeds itself after this, so what is drawn here is nobody's loss."""
        if self._tried:
            return
        self._tried = True
        assert isinstance(pl_module, Method)
        if any(hasattr(p, "to_local") for p in pl_module.parameters()):
            return
        rows = pl_module.samples_per_step / trainer.accumulate_grad_batches / trainer.world_size
        try:
            self._flops = _work(pl_module, batch, trainer.precision_plugin) / rows
        except UserError:  # of data or settings: the step itself will say it
            return
        except Exception as error:  # of whatever kind: a figure beside the run must not end it
            why = f"{type(error).__name__}: {error}".partition("\n")[0]
            log.warning(f"the work of a step could not be counted, so the log has no time/mfu: {why}")
        with contextlib.suppress(UserError):  # a precision without a peak
            self._peak = peak(pl_module.device, compute_dtype(trainer.precision))
        if pl_module.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def rates(self, samples_per_s: float) -> Mapping[str, float]:
        """Of a device that takes in so many: time/tflops_per_s, and time/mfu, its share of `peak`; what is known."""
        if not self._flops:
            return {}
        rate = self._flops * samples_per_s
        told = {"time/tflops_per_s": rate / 1e12}
        return told | {"time/mfu": rate / self._peak} if self._peak else told


def _work(method: Method, batch: Batch, precision: Any) -> int:
    """FLOPs of forward and backward; neither the method nor the batch is touched."""
    shadow = shadow_of(method)

    def call() -> None:
        with precision.train_step_context():  # a step may write into its batch, as Mixup does
            loss = shadow.step(precision.convert_input(copy.deepcopy(batch)), 0.5).loss
        loss.backward()

    with dist.alone(), _silent():
        if getattr(shadow, "cache_features", False):
            call()  # what it keeps is not computed again in later passes over the data
        return count(call, shadow)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """What a step says the run itself will say."""
    ours = logging.getLogger("ssl_lab")
    before = ours.level
    ours.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        ours.setLevel(before)


def shadow_of(method: Method) -> Method:
    """A method with the same weights, in the same memory, and with gradients, buffers and all else of its own."""
    same: dict[int, Any] = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in method.parameters()}
    trainer, method._trainer = method._trainer, None
    try:
        return copy.deepcopy(method, same)
    finally:
        method._trainer = trainer


@functools.cache
def peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of matrix products: by the data sheet of a listed accelerator, measured in a moment on any other device.

    The data sheet's figure is of a card with its full power limit, which the name does not tell.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device).lower().replace("geforce rtx ", "rtx").replace("-", " ")
        if card := next((ACCELERATORS[word] for word in name.split() if word in ACCELERATORS), None):
            return card.single if dtype == torch.float32 else card.half
    return matmul_peak(device, dtype, repeats=3, shapes=1)
