"""What `train` says before it starts and when it is done."""

from collections.abc import Sequence
from pathlib import Path

import lightning as L
from omegaconf import DictConfig
from rich.table import Table
from rich.text import Text

from ssl_lab.cli.resume import Standing
from ssl_lab.data.module import DataModule
from ssl_lab.evals.results import Row, table
from ssl_lab.methods.base import Method
from ssl_lab.nn.teacher import scaled_momentum
from ssl_lab.nn.tuning import share
from ssl_lab.schedules import Constant, Cosine, Linear, Schedule, Stairs, Warmup


def heading(
    cfg: DictConfig, method: Method, data: DataModule, trainer: L.Trainer, steps: int, standing: Standing
) -> list[str | Text | Table]:
    """The run in a few lines: what is trained, on what, for how long, and from where."""
    samples = method.samples_per_step
    epochs = steps * samples / max(1, data.num_train)
    rate, float8 = method.optim.peak_lr(samples), method.parallel.float8
    lines = {
        "method": f"{type(method).__name__}, {_parameters(method)}",
        **({"tuning": share(method)} if any(not p.requires_grad for p in method.parameters()) else {}),
        "data": _data(data),
        "length": f"{steps:,} steps x {samples} samples = {epochs:.4g} epochs",
        "optimizer": f"{method.optim.name}, peak lr {rate:.4g}, weight decay {_short(method.optim.weight_decay)}",
        **_schedules(method),
        "device": f"{trainer.world_size} x {trainer.strategy.root_device.type}, {trainer.precision}",
        **({"float8": float8.told(method)} if float8 is not None else {}),
        "folder": str(cfg.out),
    }
    if standing.path is not None:
        lines["goes on"] = f"from step {standing.step:,} ({standing.path})"
    width = max(11, *(len(name) + 2 for name in lines))
    told: list[str | Text | Table] = [Text.assemble((str(cfg.name), "bold"), f", seed {cfg.seed}")]
    told += [f"{name:<{width}}{text}" for name, text in lines.items()]
    if float8 is not None and not method.parallel.compile:
        told.append("float8 without compile=true is slower than no float8: its casts then are passes of their own")
    return told


def summary(out: Path, rows: Sequence[Row], steps: int) -> list[str | Table]:
    """Results as a table, and where everything is."""
    places = ("weights", "last.safetensors"), ("numbers", "metrics.csv"), ("results", "metrics.json"), ("pictures",) * 2
    shown = [row for row in rows if row.subject != "trained" or row.step == steps]
    found = [f"{name:<11}{out / place}" for name, place in places if (out / place).exists()]
    return [f"done: {steps:,} steps", *([table(shown)] if shown else []), *found]


def _data(data: DataModule) -> str:
    """Rows, and classes if there are any."""
    rows = f"{data.num_train:,} {data.train.unit}"
    return f"{rows}, {len(data.classes)} classes" if data.classes else rows


def _parameters(method: Method) -> str:
    """Parameters in millions, whole and by part, without parts that have none."""
    whole = f"{sum(p.numel() for p in method.parameters()) / 1e6:.3g}M parameters"
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in method.named_children()}
    parts = [f"{name} {count / 1e6:.3g}M" for name, count in counts.items() if count]
    return f"{whole} ({', '.join(parts)})" if len(parts) > 1 else whole


def _schedules(method: Method) -> dict[str, str]:
    """What changes over training by itself, from its first to its last value, as this run's batch resolves it."""
    lines = {}
    for name, schedule in vars(method).items():
        if isinstance(schedule, Constant | Linear | Cosine | Warmup | Stairs):
            values = [float(schedule(progress)) for progress in (0.0, 1.0)]
            if name == "momentum":
                reference = getattr(method, "momentum_batch", None)
                values = [scaled_momentum(value, method.samples_per_step, reference) for value in values]
            lines[name.replace("_", " ")] = " to ".join(dict.fromkeys(f"{value:.5g}" for value in values))
    return lines


def _short(value: float | Schedule) -> str:
    return type(value).__name__ if callable(value) else f"{value:g}"
