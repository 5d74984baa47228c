"""`ssl-lab bench suite=...`: every method, each in a process of its own, and every attention kernel, in one table."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from ssl_lab.bench import machine
from ssl_lab.bench.kernels import kernel_times
from ssl_lab.bench.step import compute_dtype
from ssl_lab.bench.suite import Measured, SuiteTable
from ssl_lab.bench.timing import matmul_peak
from ssl_lab.cli.generate import device_named
from ssl_lab.cli.screen import screen
from ssl_lab.errors import UserError

ATTENTION = "attention"  # how the rows of kernels begin


def run(cfg: DictConfig) -> None:
    """Measure row by row, write `out`/table.json and table.md, and show them; what failed stands in its row.

    Raises:
        UserError: no such suite, no row of that name, or an earlier table that cannot be compared with.
        SystemExit: 1 where a row failed.
    """
    if cfg.name not in cfg.suites:
        raise UserError(f"suite={cfg.name}: choose one of {', '.join(cfg.suites)}")
    suite, out = cfg.suites[cfg.name], Path(str(cfg.out))
    if cfg.rounds < 1:
        raise UserError(f"rounds={cfg.rounds}: time at least one round")
    if cfg.threads is not None and cfg.threads < 1:
        raise UserError(f"threads={cfg.threads}: give 1 or more, or null for torch's choice")
    before = None if cfg.before is None else _earlier(Path(str(cfg.before)), out, str(cfg.name))
    names = [name for name in suite.rows if _wanted(name, cfg.only)]
    if not names and not _wanted(ATTENTION, cfg.only):
        raise UserError(f"only={list(cfg.only)} leaves no row: there are {', '.join([*suite.rows, ATTENTION])}")
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    device, console = device_named("auto"), screen()
    dtype = compute_dtype(cfg.precision)
    peaks = {
        str(kind).removeprefix("torch."): matmul_peak(device, kind) for kind in dict.fromkeys((torch.float32, dtype))
    }
    table = SuiteTable(str(cfg.name), str(cfg.precision), machine.facts(device), peaks)
    for name in names:
        row = suite.rows[name]
        table.rows.append(_method(cfg, name, f"{row.words} {suite.kinds[row.kind]}".split()))
        table.write(out, before)  # nothing measured is lost
        console.print(f"{name}: {table.rows[-1].note or f'{(table.rows[-1].median_s or 0) * 1e3:.1f} ms'}")
    if _wanted(ATTENTION, cfg.only):
        table.rows += _kernels(suite.attention, dtype, device, cfg.rounds, peaks)
    table.write(out, before)
    table.show(console, before)
    for line in [] if before is None else table.lost(before, cfg.slower):
        console.print(line)
    console.print(f"{out / 'table.md'}, {out / 'table.json'}", soft_wrap=True)
    if any(row.median_s is None and not row.name.startswith(ATTENTION) for row in table.rows):
        raise SystemExit(1)


def _earlier(file: Path, out: Path, name: str) -> SuiteTable:
    """A table to compare with, which must be of the same suite and not the one that is to be written."""
    table = SuiteTable.read(file)
    if table.suite != name:
        raise UserError(
            f"before={file} is of suite={table.suite}, whose rows have other sizes: give one of suite={name}"
        )
    if file.resolve() == (out / "table.json").resolve():
        raise UserError(f"before={file} would be written over: give another out=")
    return table


def _wanted(name: str, only: Any) -> bool:
    return not only or any(name.startswith(str(start)) for start in only)


def _method(cfg: DictConfig, name: str, words: list[str]) -> Measured:
    """One `ssl-lab bench` in a process of its own, so that nothing of another row is in memory or warm."""
    with tempfile.TemporaryDirectory(prefix="ssl-lab-suite-") as folder:
        file = Path(folder) / "report.json"
        more = [f"trainer.precision={cfg.precision}", f"rounds={cfg.rounds}", f"memory={str(cfg.memory).lower()}"]
        threads = [] if cfg.threads is None else [f"threads={cfg.threads}"]
        command = [sys.executable, "-m", "ssl_lab", "bench", *words, *more, *threads, "loop=false", f"out={file}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            return Measured(name, note=said[-1].removeprefix("ssl-lab: "))
        row = json.loads(file.read_text())["rows"][0]
    return Measured(
        name,
        median_s=row["median_s"],
        samples_per_s=row["images_per_s"],
        share_of_peak=row["share_of_peak"],
        params=row["params"],
        peak_bytes=row["peak_bytes"],
    )


def _kernels(
    node: DictConfig, dtype: torch.dtype, device: torch.device, rounds: int, peaks: dict[str, float]
) -> Iterator[Measured]:
    """The one that `attention=auto` takes is marked; a kernel that cannot serve says why, once."""
    peak, told = peaks[str(dtype).removeprefix("torch.")], set[tuple[str, str]]()
    sizes = {"batch": node.batch, "heads": node.heads, "head_dim": node.head_dim}
    for length in node.lengths:
        for found in kernel_times(**sizes, length=length, dtype=dtype, device=device, rounds=rounds):
            name = f"{ATTENTION} {found.kernel}"
            if found.median_s is not None:
                yield Measured(
                    f"{name}, {found.mask}, {length}",
                    median_s=found.median_s,
                    samples_per_s=node.batch / found.median_s,
                    share_of_peak=found.flops / found.median_s / peak,
                    note="auto" if found.chosen else "",
                )
            elif (found.kernel, found.reason or "") not in told:
                told.add((found.kernel, found.reason or ""))
                yield Measured(name, note=found.reason or "")
