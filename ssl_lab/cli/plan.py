"""`ssl-lab plan`: what a run will need and take, on this machine or on listed accelerators, before it starts."""

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf, open_dict
from rich.text import Text

from ssl_lab.bench import plan
from ssl_lab.bench.devices import Accelerator, accelerator
from ssl_lab.bench.machine import device_name, memory_of
from ssl_lab.bench.step import compute_dtype
from ssl_lab.cli.compose import steps_of
from ssl_lab.cli.plan_work import work_elsewhere, work_here
from ssl_lab.cli.rehearsal import rehearsal
from ssl_lab.cli.screen import screen
from ssl_lab.cli.trainer import quiet
from ssl_lab.cli.writable import require_file
from ssl_lab.errors import UserError

_ON_CPU = {"16": "bf16-mixed", "16-mixed": "bf16-mixed", "16-true": "bf16-true"}  # as wide, where fp16 is refused
_SCALES = (1, 8, 64, 256, 1024)


@dataclass(frozen=True)
class Plan:
    """All that is told, for `out=` and for the screen; times in seconds, memory in bytes."""

    name: str
    where: str
    devices: int
    precision: str
    batch: int
    accumulate: int
    params: int
    trained: int
    flops: float
    samples: int
    steps: int
    epochs: float
    input_bytes: float
    step_seconds: float
    exposed_seconds: float
    hours: float
    cost: float | None
    memory: dict[str, float]
    divided: float | None
    room: float
    advice: list[str]
    scaling: list[tuple[int, float]]


def run(cfg: DictConfig) -> None:
    """Probe small batches, and whole ones that fit, work the plan out, print it, and write `out` if it is given.

    Raises:
        UserError: no such accelerator, numbers that mean nothing, or an `out` that cannot be written.
    """
    if cfg.devices < 1 or not 0 < cfg.utilisation <= 1 or (cfg.rows is not None and cfg.rows < 1):
        raise UserError("devices and rows are at least 1, utilisation is above 0 and at most 1")
    if cfg.gpu is None and cfg.devices > 1:
        raise UserError(
            f"devices={cfg.devices} of this machine cannot be foretold: name what they are, such as gpu=h100"
        )
    if cfg.out is not None:
        require_file(Path(cfg.out))
    gpu = None if cfg.gpu is None else accelerator(cfg.gpu)
    if cfg.threads is not None and cfg.threads < 1:
        raise UserError(f"threads={cfg.threads}: give 1 or more, or null for torch's choice")
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    console = screen()
    with tempfile.TemporaryDirectory(prefix="ssl-lab-plan-") as folder, quiet():
        made = _plan(cfg, Path(folder), gpu)
    for line in _lines(made, cfg):
        console.print(line, soft_wrap=True)
    if cfg.out is not None:
        Path(cfg.out).write_text(json.dumps(asdict(made), indent=2) + "\n")
        console.print(f"figures: {cfg.out}")


def _plan(cfg: DictConfig, folder: Path, gpu: Accelerator | None) -> Plan:
    cfg = DictConfig(OmegaConf.to_container(cfg))
    with open_dict(cfg):
        cfg.trainer.devices, cfg.trainer.strategy, cfg.compile, cfg.float8 = 1, "auto", False, None
        if "num_workers" in cfg.data:
            cfg.data.num_workers = 0  # a few batches are not worth starting processes
        if gpu is not None:
            cfg.trainer.accelerator = "cpu"
            cfg.trainer.precision = _ON_CPU.get(str(cfg.trainer.precision), cfg.trainer.precision)
    training = rehearsal(cfg, str(folder / "run"), 1)
    training.method.configure_model()
    precision, device = cfg.trainer.precision, training.trainer.strategy.root_device
    work = work_here(training, precision) if gpu is None else work_elsewhere(training, precision)
    accumulate, data = training.trainer.accumulate_grad_batches, training.data
    return _worked_out(cfg, work, data.batch_size, accumulate, gpu, data.num_train, device)


def _worked_out(
    cfg: DictConfig,
    work: plan.Work,
    batch: int,
    accumulate: int,
    gpu: Accelerator | None,
    rows: int,
    device: torch.device,
) -> Plan:
    half = compute_dtype(cfg.trainer.precision) != torch.float32
    together = batch * accumulate * cfg.devices
    rows = cfg.rows or rows
    steps = steps_of(cfg.duration, together, rows)
    need = plan.memory(work, batch)
    divided = plan.memory(work, batch, shards=cfg.devices).total if cfg.devices > 1 else None
    room = memory_of(device) if gpu is None else gpu.memory
    if gpu is None:
        compute, exposed, scaling, price = work.seconds(batch) or 0.0, 0.0, list[tuple[int, float]](), cfg.price
    else:
        told = plan.speed(work, batch, cfg.devices, gpu, cfg.utilisation, half=half)
        compute, exposed, price = told.compute, told.exposed, cfg.price or gpu.price
        scaling = [
            (n, plan.speed(work, batch, n, gpu, cfg.utilisation, half=half).efficiency)
            for n in sorted({*_SCALES, cfg.devices})
        ]
    seconds = compute * accumulate + exposed
    hours = steps * seconds / 3600
    return Plan(
        name=str(cfg.name), where=device_name(device) if gpu is None else str(cfg.gpu), devices=cfg.devices,
        precision=str(cfg.trainer.precision), batch=batch, accumulate=accumulate, params=work.params,
        trained=work.trained, flops=work.flops(batch) / batch, samples=steps * together, steps=steps,
        epochs=steps * together / max(1, rows), input_bytes=work.inputs(batch) / batch, step_seconds=seconds,
        exposed_seconds=exposed, hours=hours, cost=None if price is None else hours * cfg.devices * price,
        memory=asdict(need), divided=divided, room=room,
        advice=_advice(cfg, work, batch, accumulate, need, room), scaling=scaling,
    )  # fmt: skip


def _advice(cfg: DictConfig, work: plan.Work, batch: int, accumulate: int, need: plan.Memory, room: float) -> list[str]:
    """What would make it fit, in the words to add."""
    if need.total <= room:
        return []
    advice = [f"it does not fit: {_size(need.total)} are needed, {_size(room)} are there"]
    if (fits := plan.largest_batch(work, room)) > 0:
        times = next(n for n in range(-(-batch // fits), batch + 1) if batch % n == 0)  # the same samples a step
        advice.append(
            f"data.batch_size={batch // times} trainer.accumulate_grad_batches={accumulate * times} fits (losses that "
            f"compare the samples of a batch then see fewer)"
        )
    if not cfg.checkpoint_blocks:
        advice.append("checkpoint_blocks=true keeps only what enters each block, for a third more work")
    if cfg.trainer.precision == "32-true":
        advice.append("trainer.precision=bf16-mixed halves most of the activations")
    if (split := plan.memory(work, batch, shards=max(2, cfg.devices))).total <= room:
        advice.append(f"sharded over {max(2, cfg.devices)} devices it would need {_size(split.total)}")
    return advice


def _lines(p: Plan, cfg: DictConfig) -> list[str | Text]:
    """The plan in words and numbers."""
    rate = p.batch * p.accumulate * p.devices / p.step_seconds
    took = "timed here" if cfg.gpu is None else f"assumed: {cfg.utilisation:.0%} of the peak"
    memory = ", ".join(f"{name} {_size(size)}" for name, size in p.memory.items())
    lines = {
        "model": f"{p.params / 1e6:.3g}M parameters, {p.trained / 1e6:.3g}M learn",
        "length": f"{p.steps:,} steps x {p.batch * p.accumulate * p.devices:,} samples = {p.epochs:.4g} epochs",
        "work": f"{p.flops / 1e9:.4g} GFLOP a sample, {p.flops * p.samples:.3g} FLOP in all",
        "step": f"{p.step_seconds * 1e3:.4g} ms ({took}), {rate:,.4g} samples/s",
        "data": f"{_size(rate * p.input_bytes)}/s into the steps of all devices",
        "memory": f"{_size(sum(p.memory.values()))} of {_size(p.room)} a device: {memory}",
    }
    if p.divided is not None:
        lines["fsdp2"] = f"{_size(p.divided)} a device: weights, gradients and optimizer divided over {p.devices}"
    lines["time"] = f"{_hours(p.hours)}, {p.hours * p.devices:,.3g} device hours"
    if cfg.method.get("cache_features") and p.epochs > 1:
        lines["step"] += "; features are kept, so after the first pass it is shorter"
    if p.cost is not None:
        lines["time"] += f", about {p.cost:,.0f} dollars"
    if p.exposed_seconds > 0:
        lines["step"] += f", {p.exposed_seconds / p.step_seconds:.0%} of it waiting for gradients"
    if p.scaling:
        shares = ", ".join(f"{n}: {share:.0%}" for n, share in p.scaling)
        lines["scaling"] = f"simulated from message sizes and bandwidths, speed beside perfect scaling: {shares}"
    head = Text.assemble((p.name, "bold"), f" on {p.devices} x {p.where}, {p.precision}, {p.batch} samples each")
    if left := [key for key in ("compile", "float8") if cfg[key]]:
        lines["speed"] = f"{' and '.join(left)} left out of these figures"
    return [head, *(f"{name:<11}{text}" for name, text in lines.items()), *(f"-> {line}" for line in p.advice)]


def _size(count: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


def _hours(hours: float) -> str:
    if hours < 1 / 60:
        return f"{hours * 3600:.0f} s"
    return f"{hours * 60:.0f} min" if hours < 2 else f"{hours:.1f} h" if hours < 72 else f"{hours / 24:.1f} days"
