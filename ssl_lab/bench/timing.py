"""Clocks: interleaved rounds of several steps, and what the device's matrix products can do at best."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

_SHAPES = {  # rows, outputs, inputs of the products that the peak is sought with
    "cpu": [(1024, 1024, 1024), (1536, 1536, 1536), (2048, 768, 192), (2048, 192, 768)],
    "other": [(4096, 4096, 4096), (8192, 8192, 8192), (16384, 4096, 4096)],
}


@dataclass(frozen=True)
class Timing:
    """Seconds of the rounds of one step."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Lower and upper quartile; both the one value after a single round."""
        if len(self.seconds) == 1:
            return self.seconds[0], self.seconds[0]
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high


def synchronize(device: torch.device) -> None:
    """Wait until an accelerator has done what it was given; nothing on a CPU."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, with all it started on `device`."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def interleave(
    steps: Mapping[str, Callable[[], object]], device: torch.device, *, rounds: int, warmup: int = 2
) -> dict[str, Timing]:
    """Time each step once per round, A B C A B C ..., so that a machine that drifts drifts for all alike.

    Ratios of medians within one call can be trusted; times of different calls differ by more.
    """
    for step in steps.values():
        for _ in range(warmup):
            step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    gc.collect()
    gc.disable()  # a collection would hit one of them by chance
    try:
        for _ in range(rounds):
            for name, step in steps.items():
                seconds[name].append(timed(step, device))
    finally:
        gc.enable()
    return {name: Timing(tuple(s)) for name, s in seconds.items()}


def matmul_peak(device: torch.device, dtype: torch.dtype, *, repeats: int = 12, shapes: int | None = None) -> float:
    """FLOP/s of the best matrix product seen here and now: the yardstick, in the process and dtype of the measurement.

    The lower quartile of the times of a shape counts, so that one disturbed product does not. `shapes` takes the first
    few alone: in a tenth of the time, a little less than the peak.
    """
    best = 0.0
    for rows, outputs, inputs in _SHAPES["cpu" if device.type == "cpu" else "other"][:shapes]:
        x = torch.randn(rows, inputs, device=device).to(dtype)
        weight = torch.randn(outputs, inputs, device=device).to(dtype)
        product = Product(x, weight)
        for _ in range(3):
            product()
        seconds = sorted(timed(product, device) for _ in range(repeats))[repeats // 4]
        best = max(best, 2 * rows * outputs * inputs / seconds)
    return best


@dataclass(frozen=True)
class Product:
    """x (M, K) times weight (N, K) transposed."""

    x: torch.Tensor
    weight: torch.Tensor

    def __call__(self) -> torch.Tensor:
        return F.linear(self.x, self.weight)
