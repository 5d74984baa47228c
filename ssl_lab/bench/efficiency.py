"""How well a run uses its devices, for the rows of its log."""

from typing import Any

import lightning as L
import torch
from torch.nn.parallel import DistributedDataParallel

from ssl_lab.bench.devices import ACCELERATORS
from ssl_lab.bench.flops import counter
from ssl_lab.types import Batch


class Efficiency(L.Callback):
    """Counts the work of a run's first step while it is made, which changes nothing in it, and knows the device's peak.

    Products and convolutions of forward and backward count, as they are executed: what activation checkpointing or a
    kernel computes again counts again. Batches of other lengths than the first one's have other work, which is not
    seen. torch's counter cannot look into compiled blocks.

    Args:
        compiled: the run compiles its blocks, so nothing is counted.
        half: products are in bf16 or fp16.
    """

    def __init__(self, *, compiled: bool, half: bool) -> None:
        self._half, self._compiled = half, compiled
        self._counting: Any = None
        self._flops: int | None = None
        self._strategy: Any = None
        self._micro = 1
        self._peak: float | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._strategy, self._micro = trainer.strategy, trainer.accumulate_grad_batches
        self._peak = listed_peak(pl_module.device, half=self._half)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        if self._flops is None and self._counting is None and not self._compiled:
            self._counting = counter()
            self._counting.__enter__()

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._counting is not None:
            self._counting.__exit__(None, None, None)
            self._flops, self._counting = int(self._counting.get_total_flops()), None

    def rates(self, seconds: float) -> dict[str, float]:
        """From the seconds of an optimizer step: what is known of the following.

        time/tflops_per_s of this device, time/mfu, its share of the peak that the data sheet of a listed accelerator
        names, and time/communication, the share of the time in which DDP waits for gradients after the backward pass
        has come to its end, by torch's own clock (a mean over the steps that it samples).
        """
        known: dict[str, float] = {}
        if self._flops:
            rate = self._flops * self._micro / seconds
            known["time/tflops_per_s"] = rate / 1e12
            if self._peak is not None:
                known["time/mfu"] = rate / self._peak
        if (waited := _waited_for_gradients(self._strategy)) is not None:
            known["time/communication"] = min(1.0, waited / seconds)
        return known


def listed_peak(device: torch.device, *, half: bool) -> float | None:
    """FLOP/s of a listed accelerator by its name; None for another device.

    The data sheet's figure is of a card with the full power limit; the name does not tell that.
    """
    if device.type != "cuda":
        return None
    words = torch.cuda.get_device_name(device).lower().replace("geforce rtx ", "rtx").replace("-", " ").split()
    found = next((ACCELERATORS[word] for word in words if word in ACCELERATORS), None)
    return None if found is None else found.half if half else found.single


def _waited_for_gradients(strategy: Any) -> float | None:
    """Seconds a step, on average; None where there is no DDP, or it has not measured yet."""
    model = getattr(strategy, "model", None)
    if not isinstance(model, DistributedDataParallel):
        return None
    facts = model._get_ddp_logging_data()
    sent, hidden = (facts.get(f"avg_backward_{name}") for name in ("comm_time", "compute_comm_overlap_time"))
    return None if sent is None or hidden is None else max(0, sent - hidden) / 1e9
