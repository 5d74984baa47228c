"""The work of an experiment's step, as a plan needs it: batches put through the real network, counted and timed."""

import statistics
from dataclasses import replace

from ssl_lab.bench import plan
from ssl_lab.bench.machine import memory_of, resident
from ssl_lab.bench.probe import Probe, free, fused_attention, probe, state_bytes, tensor_bytes
from ssl_lab.bench.step import MethodStep
from ssl_lab.bench.timing import timed
from ssl_lab.cli.rehearsal import batch_of, batches_of, fresh
from ssl_lab.cli.train import Training
from ssl_lab.methods.base import Method
from ssl_lab.train.metrics import peak_memory

_CONTEXT = 600 * 2**20  # bytes of a CUDA context with its libraries
_ROUNDS = 4  # timed steps of each probe, after one that is not
_WALK, _PATIENCE = 48, 30.0  # steps through fresh batches, and the seconds after which they are enough


def work_here(training: Training, precision: str | int) -> plan.Work:
    """Of two small batches on the run's own device, timed; and of whole ones, if they leave half of its memory."""
    data, device = training.data, training.trainer.strategy.root_device
    work = _work(training, precision, _sizes(data.batch_size))
    peak = peak_memory(device)
    if plan.memory(work, data.batch_size).total < memory_of(device) / 2:
        large, peak = _whole(training, precision)
        work = replace(work, large=large)
    # libraries that the first step loads, what lives for a moment within it, and gaps between what lives longer
    beyond = peak - plan.memory(replace(work, process=0), work.large.batch_size).total
    return replace(work, process=max(work.process, int(beyond)))


def work_elsewhere(training: Training, precision: str | int) -> plan.Work:
    """Of two tiny batches counted on the CPU, as an accelerator's kernels would do and keep them; not timed."""
    with fused_attention(training.method):
        return replace(_work(training, precision, [2, 4], rounds=0), process=_CONTEXT)


def _work(training: Training, precision: str | int, sizes: list[int], rounds: int = _ROUNDS) -> plan.Work:
    method, device = training.method, training.trainer.strategy.root_device
    params = sum(p.numel() for p in method.parameters())
    before = resident() - _held(method)
    held, state, probes = 0, 0, list[Probe]()
    for rows in sizes:
        held_batch = batch_of(training, rows)
        step = MethodStep(method, held_batch, device=device, precision=precision)
        held = _held(method)  # in the dtype that the step gave it
        probes.append(probe(step, method, rows, tensor_bytes(held_batch), rounds=rounds))
        if not rounds:
            step()
        state = state_bytes(step.optimizer)
        del step, held_batch
        free()
    trained = [p for p in method.parameters() if p.requires_grad]
    return plan.Work(
        params,
        sum(p.numel() for p in trained),
        sum(tensor_bytes(p) for p in trained),
        held,
        state,
        int(before),
        small=probes[0],
        large=probes[-1],
    )


def _held(method: Method) -> int:
    return sum(tensor_bytes(t) for t in (*method.parameters(), *method.buffers()))


def _whole(training: Training, precision: str | int) -> tuple[Probe, int]:
    """Of whole batches, and the bytes that the process held at most while it went through fresh ones.

    Where batches differ in size: FLOPs and seconds on average, bytes of the largest.
    """
    method, device = training.method, training.trainer.strategy.root_device
    batch = training.data.batch_size
    seconds, peak = _walk(training, precision)
    found: dict[int, Probe] = {}
    probes, batches = [], batches_of(training)
    for held_batch in batches:
        size = tensor_bytes(held_batch)
        if size not in found:
            step = MethodStep(method, held_batch, device=device, precision=precision)
            found[size] = probe(step, method, batch, size, rounds=0)
            del step
            free()
        probes.append(found[size])
    whole = Probe(
        batch,
        flops=sum(p.flops for p in probes) // len(probes),
        saved=max(p.saved for p in probes),
        inputs=max(p.inputs for p in probes),
        seconds=seconds,
    )
    return whole, peak


def _walk(training: Training, precision: str | int) -> tuple[float, int]:
    """Seconds of the first steps of a run but the very first, and the process's most bytes by then.

    Seconds are the median, or the mean where batches differ in size. Each step has a batch of its own: what these leave
    behind in the allocator makes a process grow for a while, and a step is slower than one that is repeated.
    """
    device = training.trainer.strategy.root_device
    step: MethodStep | None = None
    seconds: list[float] = []
    sizes = set()
    for batch in fresh(training, _WALK):
        if step is None:
            step = MethodStep(training.method, batch, device=device, precision=precision)
        step.feed(batch)
        sizes.add(tensor_bytes(batch))
        seconds.append(timed(step, device))
        if len(seconds) > _ROUNDS and sum(seconds) > _PATIENCE:
            break
    del step
    free()
    typical = statistics.median if len(sizes) == 1 else statistics.fmean
    return typical(seconds[1:]), peak_memory(device)


def _sizes(batch: int) -> list[int]:
    """Two sizes that tell what grows with the batch; the larger is at most half of it, and small."""
    large = max(2, min(batch, max(batch // 2, 4), 64))
    return sorted({max(1, large // 2), large})
