"""Small real runs of the command line in processes of their own, which may be killed wherever a test likes."""

import csv
import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path

TINY = [
    "method=mae",
    "backbone=vit",
    "data=shapes",
    "method.encoder.dim=32",
    "method.encoder.depth=2",
    "method.encoder.num_heads=2",
    "method.encoder.patch_size=8",
    "method.decoder.dim=32",
    "method.decoder.depth=1",
    "method.decoder.num_heads=2",
    "data.train.length=40",
    "data.test.length=16",
    "data.batch_size=8",
    "duration=12steps",
    "save_steps=2",
    "trainer.log_every_n_steps=1",
    "trainer.accelerator=cpu",
]

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["ssl_lab.cli.train"])


def start(words: list[str], fault: tuple[str, int] | None = None, log: Path | None = None):
    """Run a command line; with `fault` the process kills itself: ("backward" | "save" | "rename" | "log", count)."""
    os.environ["OMP_NUM_THREADS"] = "1"
    process = _processes.Process(target=_main, args=(words, fault, None if log is None else str(log)))
    process.start()
    return process


def run(words: list[str], fault: tuple[str, int] | None = None, log: Path | None = None) -> int:
    """Exit code of a command line; negative = the signal that ended it."""
    process = start(words, fault, log)
    process.join(300)
    if process.is_alive():
        process.kill()
        raise AssertionError(f"still running: {words}")
    return process.exitcode


def _main(words: list[str], fault: tuple[str, int] | None, log: str | None) -> None:
    os.setpgrp()
    if log is not None:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
    import torch

    from ssl_lab.cli.main import main

    torch.set_num_threads(1)
    if fault is not None:
        _arm(*fault)
    sys.argv = ["ssl-lab", *words]
    sys.exit(main())


def _arm(place: str, count: int) -> None:
    """Kill this process when it comes to `place` for the `count`-th time."""
    from ssl_lab import files
    from ssl_lab.methods.base import Method
    from ssl_lab.train import checkpoint, loggers

    owner, name = {
        "backward": (Method, "optimizer_step"),
        "save": (checkpoint._Hashed, "write"),
        "rename": (files.os, "replace"),
        "verify": (checkpoint, "_require_plain"),
        "log": (loggers.CSVLogger, "log_metrics"),
    }[place]
    original, seen = getattr(owner, name), [0]

    def wrapped(*args, **kwargs):
        seen[0] += 1
        if seen[0] == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


def rows(out: Path) -> list[dict[str, str]]:
    """metrics.csv without what depends on the clock."""
    with open(out / "metrics.csv", newline="") as file:
        kept = [
            {k: v for k, v in row.items() if not k.startswith(("time/", "memory/"))} for row in csv.DictReader(file)
        ]
    return kept


def results(out: Path) -> list[tuple]:
    """metrics.json without what depends on the clock."""
    found = json.loads((out / "metrics.json").read_text()) if (out / "metrics.json").exists() else []
    return [(r["subject"], r["step"], r["evaluator"], r["name"], r["value"]) for r in found]


def same_end(a: Path, b: Path) -> None:
    """Two runs ended in the same weights, optimizer state, numbers and results, to the last bit."""
    import torch

    from ssl_lab.train import checkpoint

    first, second = (checkpoint.read(checkpoint.find(out)) for out in (a, b))
    for key in ("state_dict", "optimizer_states", "current_model_state"):
        left, right = _tensors(first.get(key)), _tensors(second.get(key))
        assert left.keys() == right.keys()
        differing = [name for name in left if not torch.equal(left[name], right[name])]
        assert not differing, f"{key}: {differing[:3]}"
    assert first["global_step"] == second["global_step"]
    assert rows(a) == rows(b)
    assert results(a) == results(b)


def _tensors(node, key="") -> dict:
    import torch

    if isinstance(node, torch.Tensor):
        return {key: node}
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return {name: t for k, v in items for name, t in _tensors(v, f"{key}.{k}").items()}
