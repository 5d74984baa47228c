"""`ssl-lab scaling`: runs of several sizes and lengths, the laws that they follow, and the best size for a budget."""

import csv
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf, open_dict

from ssl_lab.bench.scaling_report import Measured, Result, conclude
from ssl_lab.cli import catalog
from ssl_lab.cli.duration import parse_duration
from ssl_lab.cli.resume import holding, require_same
from ssl_lab.cli.screen import screen, unbroken
from ssl_lab.errors import UserError
from ssl_lab.evals.results import latest, read
from ssl_lab.files import write_text
from ssl_lab.train.signals import Interrupted, Signals

COMMAND = [sys.executable, "-m", "ssl_lab.cli.cell"]  # runs the cell of a YAML file
_PARTS = ("encoder", "decoder", "model")
_WIDTHS, _LENGTHS = (0.25, 0.375, 0.5, 0.75, 1.0), (0.25, 0.5, 1.0)  # of the experiment's own
_LAST = 0.1  # share of training whose rows make up the training loss at the end


@dataclass(frozen=True)
class Cell:
    """One run of the sweep: its place in the table, its folder, and its whole configuration."""

    size: str
    duration: str
    out: Path
    config: dict[str, Any]


def run(cfg: DictConfig) -> None:
    """Run what is missing of the sweep, fit, print, and write scaling.json, scaling.md and scaling.png into `out`.

    Raises:
        UserError: sizes or lengths that mean nothing, a folder with other runs, or a loss that no run measures.
        SystemExit: 1 when a cell failed, after all others ran; 75 or 130 after a signal, the running cell being saved.
    """
    if cfg.count not in ("trained", "blocks"):
        raise UserError(f"count={cfg.count}: write trained or blocks")
    cells, out, console = list(_cells(cfg)), Path(cfg.out), screen()
    failed: list[str] = []
    measured: list[Measured] = []
    with unbroken(), Signals() as signals, holding(out):
        for number, cell in enumerate(cells, 1):
            started, head = time.monotonic(), f"{number}/{len(cells)} {cell.size}, {cell.duration}"
            there = _finished(cell)
            problem = None if there else _train(cell, signals)
            if problem is not None:
                failed.append(f"{cell.size}, {cell.duration}: {problem}")
                console.print(f"{head}: failed, {problem}", soft_wrap=True)
                continue
            measured.append(_measured(cell, cfg))
            one, took = measured[-1], "there already" if there else f"{time.monotonic() - started:.0f} s"
            console.print(
                f"{head}: {one.parameters:.3g} parameters, {one.tokens:.3g} {one.unit}, loss {one.loss:.4f}, {took}",
                soft_wrap=True,
            )
    result = conclude(str(cfg.name), measured, failed)
    _write(result, out)
    console.print(result.markdown(), soft_wrap=True)
    console.print(f"figures: {out}/scaling.json, scaling.md, scaling.png", soft_wrap=True)
    if failed:
        raise SystemExit(1)


def _write(result: Result, out: Path) -> None:
    write_text(out / "scaling.json", json.dumps(asdict(result), indent=1) + "\n")
    write_text(out / "scaling.md", result.markdown())
    if result.measured:
        from ssl_lab.bench.scaling_picture import draw
        from ssl_lab.pictures import save_png

        save_png(out / "scaling.png", draw(result))


def _cells(cfg: DictConfig) -> Iterator[Cell]:
    """Every size with every length, the cheap ones first."""
    known = catalog.root("train").names
    where, node = _network(cfg)
    durations = [str(text) for text in cfg.durations] or _lengths(cfg.duration)
    for text in durations:
        parse_duration(text)
    sizes = [_size(size, node) for size in OmegaConf.to_container(cfg.sizes) or _widths(node)]
    for duration in durations:
        for size in sizes:
            label = ",".join(f"{key}={value}" for key, value in size.items())
            config = DictConfig({key: cfg[key] for key in cfg if key in known})
            folder = Path(cfg.out) / f"{label}_{duration.replace(' ', '')}".replace("/", "-")
            with open_dict(config):
                for key, value in size.items():
                    OmegaConf.update(config, f"{where}.{key}", value)
                config.duration, config.out, config.name = duration, str(folder), f"{cfg.name} {label}"
                config.trainer.enable_progress_bar = False
            yield Cell(label, duration, folder, OmegaConf.to_container(config))  # type: ignore[arg-type]


def _network(cfg: DictConfig) -> tuple[str, DictConfig]:
    """The part of the method that grows, and where it is."""
    where = cfg.network or next((f"method.{name}" for name in _PARTS if name in cfg.method), "method")
    node = OmegaConf.select(cfg, where)
    if not isinstance(node, DictConfig):
        raise UserError(f"network={where}: there is no such part; give the path of a network, such as method.encoder")
    return where, node


def _widths(node: DictConfig) -> list[int]:
    if not isinstance(node.get("dim"), int):
        raise UserError("this network has no dim to vary: name the part that has one (network=), or write sizes=")
    return sorted({max(8, 8 * round(node.dim * share / 8)) for share in _WIDTHS})


def _lengths(duration: str) -> list[str]:
    amount, unit = parse_duration(duration)
    return [f"{amount * share:g}{unit}" if unit == "epochs" else f"{amount * share:.0f}{unit}" for share in _LENGTHS]


def _size(size: Any, node: DictConfig) -> dict[str, Any]:
    """A width -> also the depth and the heads that keep the shape of the network; a mapping stays as it is."""
    if isinstance(size, dict):
        return size
    if not isinstance(size, int) or size < 8 or size % 2:
        raise UserError(f"sizes=[{size}]: give even widths of at least 8, or [{{dim: 64, depth: 2, num_heads: 2}}]")
    found = {"dim": size}
    if isinstance(node.get("depth"), int):
        found["depth"] = max(1, round(node.depth * size / node.dim))
    if isinstance(node.get("num_heads"), int):
        head = node.dim / node.num_heads
        fits = [h for h in range(1, size // 2 + 1) if size % h == 0 and size // h % 2 == 0]
        found["num_heads"] = min(fits, key=lambda h: abs(math.log(size / h / head)))
    return found


def _finished(cell: Cell) -> bool:
    """Whether it need not run again.

    Raises:
        UserError: its folder holds another run.
    """
    if not (cell.out / "cell.json").is_file():
        return False
    require_same(cell.out, cell.config, file="cell.yaml")  # config.yaml has what the data decided, too
    return yaml.safe_load((cell.out / "cell.yaml").read_text()) == cell.config  # else it is evaluated again


def _train(cell: Cell, signals: Signals) -> str | None:
    """Run a cell in a process of its own; gives what went wrong.

    Raises:
        Interrupted: a signal came; it was handed on, and the cell has saved.
    """
    cell.out.mkdir(parents=True, exist_ok=True)
    plan, log = cell.out / "cell.yaml", cell.out / "log.txt"
    write_text(plan, yaml.safe_dump(cell.config, sort_keys=False))
    signals.deferred = True
    with log.open("a") as file:
        child = subprocess.Popen(
            [*COMMAND, str(plan)],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a signal to the terminal's group reaches it once, through us
        )
        told = False
        while child.poll() is None:
            if signals.received is not None and not told:
                child.send_signal(signals.received)
                told = True
            time.sleep(0.1)
    signals.deferred = False
    if signals.received is not None:
        raise Interrupted(signals.received)
    if child.returncode == 0 and (cell.out / "cell.json").is_file():
        return None
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"exit code {child.returncode}, {lines[-1] if lines else 'nothing was said'} (see {log})"


def _measured(cell: Cell, cfg: DictConfig) -> Measured:
    facts = json.loads((cell.out / "cell.json").read_text())
    text = facts["tokens"] != facts["samples"]
    return Measured(
        facts[cfg.count],
        facts["tokens"],
        _loss(cell.out, cfg.loss),
        size=cell.size,
        duration=cell.duration,
        unit="tokens" if text else "samples",
        flops=facts["flops"] * facts["samples"],
        epochs=facts["epochs"],
    )


def _loss(out: Path, wanted: str) -> float:
    names = latest(read(out / "metrics.json"))
    if wanted == "auto":
        wanted = "perplexity/nats" if "perplexity/nats" in names else "train"
    if wanted in names:
        return names[wanted]
    if wanted != "train":
        raise UserError(f"loss={wanted} is measured by no evaluator of these runs; there are train, {', '.join(names)}")
    with (out / "metrics.csv").open(newline="") as file:
        steps = [(int(r["step"]), float(r["train/loss"])) for r in csv.DictReader(file) if r.get("train/loss")]
    last = [value for step, value in steps if step > (1 - _LAST) * steps[-1][0]]
    return sum(last) / len(last)
