"""`ssl-lab bench`: what a training step costs here, alone or beside other libraries on the same work."""

import functools
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from ssl_lab.bench import machine
from ssl_lab.bench.flops import DRAWS, count
from ssl_lab.bench.loop import Clock, data_wait
from ssl_lab.bench.peers import SHIPPED, STRENGTHENED, Variant, missing, peer_step
from ssl_lab.bench.report import Report, Row
from ssl_lab.bench.step import MethodStep, TrainStep, compute_dtype
from ssl_lab.bench.timing import Timing, interleave, matmul_peak
from ssl_lab.cli.rehearsal import batch_of, rehearsal
from ssl_lab.cli.screen import screen
from ssl_lab.cli.trainer import quiet
from ssl_lab.errors import UserError
from ssl_lab.train.metrics import peak_memory

OURS = "ssl_lab"
_LOOP_STEPS = 40
_STEPS_FOR_MEMORY = 3  # the second has the optimizer's state, the third what the allocator keeps


def run(cfg: DictConfig) -> None:
    """Measure, print a table, and write `out` if it is given.

    Raises:
        UserError: no rounds or threads, no such peer, or a network that the peers do not have.
    """
    if cfg.rounds < 1:
        raise UserError(f"rounds={cfg.rounds}: time at least one round")
    if cfg.threads is not None and cfg.threads < 1:
        raise UserError(f"threads={cfg.threads}: give 1 or more, or null for torch's choice")
    console = screen()
    with tempfile.TemporaryDirectory(prefix="ssl-lab-bench-") as folder, quiet():
        report = _measure(Work(cfg, Path(folder)), console)
    report.show(console)
    if cfg.out is not None:
        report.write(Path(cfg.out))
        console.print(f"figures: {cfg.out}")


class Work:
    """The experiment as `train` builds it, one of its batches held in memory, and the steps to time by name."""

    def __init__(self, cfg: DictConfig, folder: Path) -> None:
        if cfg.threads is not None:
            torch.set_num_threads(cfg.threads)
        self.cfg, self.folder, self.precision = cfg, folder, cfg.trainer.precision
        self.training = rehearsal(cfg, str(folder / "run"), _LOOP_STEPS)
        self.method, self.data = self.training.method, self.training.data
        self.device = self.training.trainer.strategy.root_device
        self.batch = batch_of(self.training)
        self.notes = [note for peer in cfg.against if (note := missing(peer, self.method)) is not None]
        self.steps: dict[str, Callable[[], TrainStep]] = {OURS: self._ours}
        for peer in cfg.against:
            for variant in (SHIPPED, *(STRENGTHENED if cfg.strengthened else ())):
                if missing(peer, self.method) is None:
                    self.steps[f"{peer}, {variant.label}"] = functools.partial(self._peer, peer, variant)

    def flops(self) -> int:
        """FLOPs of our step, counted on the network as it is before compilation."""
        step = MethodStep(self.method, self.batch, device=self.device, precision=self.precision)
        flops = count(step.forward_backward, self.method, draws=DRAWS)
        self.method.zero_grad(set_to_none=True)
        return flops

    def loop_rate(self) -> float:
        """Optimizer steps per second of a real training run with all its callbacks and loggers."""
        clock = Clock()
        self.training.trainer.callbacks.append(clock)  # type: ignore[attr-defined]
        self.training.out.mkdir()
        self.training.fit()
        return clock.steps_per_s

    def _ours(self) -> TrainStep:
        self.method.configure_model()  # compilation and checkpointing as the experiment says
        return MethodStep(self.method, self.batch, device=self.device, precision=self.precision)

    def _peer(self, peer: str, variant: Variant) -> TrainStep:
        torch.manual_seed(self.cfg.seed)
        return peer_step(peer, self.method, self.batch, variant, device=self.device, precision=self.precision)


def _measure(work: Work, console: Console) -> Report:
    cfg, batch_size, flops = work.cfg, work.data.batch_size, work.flops()
    steps = {name: make() for name, make in work.steps.items()}
    peak = matmul_peak(work.device, compute_dtype(work.precision))
    console.print(f"timing {', '.join(steps)}: {cfg.rounds} rounds")
    timings = interleave(steps, work.device, rounds=cfg.rounds)

    def row(name: str, timing: Timing) -> Row:
        return Row(
            name=name,
            median_s=timing.median,
            quartiles_s=timing.quartiles,
            images_per_s=batch_size / timing.median,
            share_of_peak=flops / timing.median / peak,
            params=steps[name].params,
            peak_bytes=_memory(work, name) if cfg.memory else None,
        )

    wait = data_wait(work.data.train_dataloader(), steps[OURS], work.device, batches=cfg.rounds)
    rows = [row(name, timing) for name, timing in timings.items()]
    loop_share = work.loop_rate() * timings[OURS].median if cfg.loop else None
    return Report(
        experiment=str(cfg.name),
        precision=str(work.precision),
        batch_size=batch_size,
        machine=machine.facts(work.device),
        flops=flops,
        peak_flops=peak,
        rounds=cfg.rounds,
        rows=rows,
        data_wait=wait,
        loop_share=loop_share,
        notes=work.notes,
    )


def _memory(work: Work, name: str) -> int | None:
    """Peak memory of a fresh process that does nothing but a few steps; None if it failed."""
    config = work.folder / "bench.yaml"
    OmegaConf.save(work.cfg, config)
    command = [sys.executable, "-m", "ssl_lab.cli.bench", str(config), name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return int(done.stdout.split()[-1]) if done.returncode == 0 else None


def _child(config: Path, name: str) -> None:
    """Build one step, run it a few times, print the peak in bytes."""
    with tempfile.TemporaryDirectory(prefix="ssl-lab-bench-") as folder, quiet():
        work = Work(DictConfig(OmegaConf.load(config)), Path(folder))
        step = work.steps[name]()
        for _ in range(_STEPS_FOR_MEMORY):
            step()
        print(peak_memory(work.device))


if __name__ == "__main__":
    _child(Path(sys.argv[1]), sys.argv[2])
