"""The work of an experiment's step, as a plan needs it: batches put through the real network, counted and timed."""

from dataclasses import replace

from ssl_lab.bench import plan
from ssl_lab.bench.machine import memory_of, resident
from ssl_lab.bench.probe import Probe, free, fused_attention, probe, state_bytes, tensor_bytes
from ssl_lab.bench.step import method_step
from ssl_lab.cli.rehearsal import batch_of, batches_of
from ssl_lab.cli.train import Training
from ssl_lab.train.metrics import peak_memory

_CONTEXT = 600 * 2**20  # bytes of a CUDA context with its libraries
_ROUNDS = 4  # timed steps of each probe, after one that is not


def work_here(training: Training, precision: str | int) -> plan.Work:
    """Of two small batches on the run's own device, timed; and of whole ones, if they leave half of its memory."""
    data, device = training.data, training.trainer.strategy.root_device
    work = _work(training, precision, _sizes(data.batch_size))
    if plan.memory(work, data.batch_size).total < memory_of(device) / 2:
        work = replace(work, large=_whole(training, precision))
    # libraries that the first step loads, and what lives for a moment within it
    beyond = peak_memory(device) - plan.memory(replace(work, process=0), work.large.batch_size).total
    return replace(work, process=max(work.process, int(beyond)))


def work_elsewhere(training: Training, precision: str | int) -> plan.Work:
    """Of two tiny batches counted on the CPU, as an accelerator's kernels would do and keep them; not timed."""
    with fused_attention(training.method):
        return replace(_work(training, precision, [2, 4], rounds=0), process=_CONTEXT)


def _work(training: Training, precision: str | int, sizes: list[int], rounds: int = _ROUNDS) -> plan.Work:
    method, device = training.method, training.trainer.strategy.root_device
    params = sum(p.numel() for p in method.parameters())
    held = sum(tensor_bytes(t) for t in (*method.parameters(), *method.buffers()))
    before = resident() - held
    state, probes = 0, list[Probe]()
    for rows in sizes:
        held_batch = batch_of(training, rows)
        step = method_step(method, held_batch, device=device, precision=precision)
        probes.append(probe(step, method, rows, tensor_bytes(held_batch), rounds=rounds))
        if not rounds:
            step()
        state = state_bytes(step.optimizer)
        del step, held_batch
        free()
    trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
    return plan.Work(params, trained, held, state, int(before), small=probes[0], large=probes[-1])


def _whole(training: Training, precision: str | int) -> Probe:
    """Of whole batches. Where these differ in size: FLOPs and seconds on average, bytes of the largest.

    Each size is put through the network, so that the process then holds what its libraries keep for every one of them.
    """
    method, device = training.method, training.trainer.strategy.root_device
    batch = training.data.batch_size
    found: dict[int, Probe] = {}
    probes, batches = [], batches_of(training)
    rounds = _ROUNDS if len(batches) == 1 else 1
    for held_batch in batches:
        size = tensor_bytes(held_batch)
        if size not in found:
            step = method_step(method, held_batch, device=device, precision=precision)
            found[size] = probe(step, method, batch, size, rounds=rounds)
            del step
            free()
        probes.append(found[size])
    return Probe(
        batch,
        flops=sum(p.flops for p in probes) // len(probes),
        saved=max(p.saved for p in probes),
        inputs=max(p.inputs for p in probes),
        seconds=sum(p.seconds or 0.0 for p in probes) / len(probes),
    )


def _sizes(batch: int) -> list[int]:
    """Two sizes that tell what grows with the batch; the larger is at most half of it, and small."""
    large = max(2, min(batch, max(batch // 2, 4), 64))
    return sorted({max(1, large // 2), large})
