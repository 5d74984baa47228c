"""Values that change over training, as functions of progress in [0, 1]: learning rate, weight decay, momentum, ...

A schedule never sees a step or an epoch, so a recipe means the same at any length.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

Schedule = Callable[[float], float]


@dataclass(frozen=True)
class Constant:
    """The same value throughout."""

    value: float

    def __call__(self, progress: float) -> float:
        return self.value


@dataclass(frozen=True)
class Linear:
    """A straight line from `start` to `end`."""

    start: float
    end: float

    def __call__(self, progress: float) -> float:
        return self.start + (self.end - self.start) * min(max(progress, 0.0), 1.0)


@dataclass(frozen=True)
class Cosine:
    """Half a cosine from `start` to `end` (SGDR, arXiv:1608.03983, without restarts)."""

    start: float
    end: float

    def __call__(self, progress: float) -> float:
        progress = min(max(progress, 0.0), 1.0)
        return self.end + (self.start - self.end) * 0.5 * (1.0 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class Warmup:
    """A straight line from `start` to `end` until progress `until`; then `then`, run over the rest, or `end`."""

    start: float
    end: float
    until: float
    then: Schedule | None = None

    def __call__(self, progress: float) -> float:
        if progress < self.until:
            return self.start + (self.end - self.start) * progress / self.until
        if self.then is None:
            return self.end
        return self.then((progress - self.until) / (1.0 - self.until) if self.until < 1.0 else 1.0)


@dataclass(frozen=True)
class Stairs:
    """`schedule` held constant within each of `steps` equal parts of training, as recipes do that change per epoch."""

    schedule: Schedule
    steps: int

    def __call__(self, progress: float) -> float:
        return self.schedule(math.floor(progress * self.steps + 1e-9) / self.steps)


def as_schedule(value: "float | Schedule") -> Schedule:
    """A number becomes a `Constant`; a schedule stays as it is."""
    return value if callable(value) else Constant(float(value))
