"""Arithmetic of a plan: memory by part, step time, hours and cost on any number of devices."""

from dataclasses import asdict, dataclass

from ssl_lab.bench.devices import Accelerator
from ssl_lab.bench.probe import Probe

BACKWARD = 2 / 3  # share of forward and backward that is backward, where gradients may travel meanwhile


@dataclass(frozen=True)
class Work:
    """What one device does in one step, as probes of two batch sizes tell it.

    Attributes:
        params: all parameters, teachers and queues' encoders included.
        trained: those that take a gradient.
        gradient_bytes: of all gradients, which have the dtype of their parameters.
        held: bytes of all parameters and buffers.
        state: bytes of the optimizer's state.
        process: bytes that are there anyway: libraries, data in memory, a device's context.
        small, large: probes; what lies between and beyond is linear in the batch.
    """

    params: int
    trained: int
    gradient_bytes: int
    held: int
    state: int
    process: int
    small: Probe
    large: Probe

    def flops(self, batch: int) -> float:
        """FLOPs of forward and backward of a batch."""
        return self._linear(batch, self.small.flops, self.large.flops)

    def saved(self, batch: int) -> float:
        """Bytes kept between forward and backward."""
        return self._linear(batch, self.small.saved, self.large.saved)

    def inputs(self, batch: int) -> float:
        """Bytes of a batch as the step takes it."""
        return self._linear(batch, self.small.inputs, self.large.inputs)

    def seconds(self, batch: int) -> float | None:
        """Of a step on the machine of the probes; None where nothing was timed."""
        if self.small.seconds is None or self.large.seconds is None:
            return None
        return max(self.large.seconds, self._linear(batch, self.small.seconds, self.large.seconds))

    def _linear(self, batch: int, low: float, high: float) -> float:
        a, b = self.small.batch_size, self.large.batch_size
        slope = (high - low) / (b - a) if b > a else 0.0
        return max(0.0, high + slope * (batch - b))


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the moment of most, by part."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    batch: float
    process: float

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


def memory(work: Work, batch: int, *, shards: int = 1) -> Memory:
    """On one of `shards` devices that split weights, gradients and state among them (1 = each has all).

    Two batches are held: the step's, and the next.
    """
    return Memory(
        weights=work.held / shards,
        gradients=work.gradient_bytes / shards,
        optimizer=work.state / shards,
        activations=work.saved(batch),
        batch=2 * work.inputs(batch),
        process=work.process,
    )


def largest_batch(work: Work, room: float, *, shards: int = 1) -> int:
    """Rows of the largest batch that fits into `room` bytes; 0 if none does."""
    low, high = 0, 1
    while high < 1 << 24 and memory(work, high, shards=shards).total <= room:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if memory(work, middle, shards=shards).total <= room else (low, middle)
    return low


def traffic_seconds(work: Work, devices: int, device: Accelerator) -> float:
    """Of one average of all gradients: a ring within each machine, and one between machines for every device of them.

    A ring of n sends 2 (n - 1) / n of the bytes through each link (Patarasuk and Yuan, 2009).
    """
    size, near = work.gradient_bytes, min(devices, device.per_machine)
    machines = -(-devices // device.per_machine)
    seconds = 2 * (near - 1) / near * size / device.within
    return seconds + 2 * (machines - 1) / machines * size / near / device.between


@dataclass(frozen=True)
class Speed:
    """Of one step on a number of devices: seconds of work, and of traffic that nothing hides."""

    compute: float
    exposed: float

    @property
    def efficiency(self) -> float:
        """Share of the speed that as many devices without traffic would have."""
        return self.compute / (self.compute + self.exposed)


def speed(work: Work, batch: int, devices: int, device: Accelerator, utilisation: float, *, half: bool) -> Speed:
    """Gradients travel during backward; what does not fit into it is waited for."""
    compute = work.flops(batch) / ((device.half if half else device.single) * utilisation)
    exposed = max(0.0, traffic_seconds(work, devices, device) - BACKWARD * compute) if devices > 1 else 0.0
    return Speed(compute, exposed)
