"""Work of two gloo processes on the CPU, and what each of them found."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from training import _processes

WORLD = 2


def part(rank: int, size: int) -> slice:
    """The rows of a batch that a rank sees."""
    return slice(rank * size // WORLD, (rank + 1) * size // WORLD)


def _rank(work: Callable[[int], Any], rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD)
    (folder / f"rank{rank}").write_bytes(pickle.dumps(work(rank)))
    torch.distributed.barrier()


def on_ranks(work: Callable[[int], Any], folder: Path) -> list[Any]:
    """What `work(rank)` returns on every rank; `work` is a function of a module, `folder` is empty."""
    started = [_processes.Process(target=_rank, args=(work, rank, folder)) for rank in range(WORLD)]
    for process in started:
        process.start()
    for process in started:
        process.join(300)
        assert process.exitcode == 0
    return [pickle.loads((folder / f"rank{rank}").read_bytes()) for rank in range(WORLD)]
