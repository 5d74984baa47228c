"""Work of two gloo processes on the CPU, and what each of them found; command lines that run on several ranks."""

import os
import pickle
import socket
import sys
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


def on_ranks(work: Callable[[int], Any], folder: Path, minutes: float = 5) -> list[Any]:
    """What `work(rank)` returns on every rank; `work` is a function of a module, `folder` is empty."""
    started = [_processes.Process(target=_rank, args=(work, rank, folder)) for rank in range(WORLD)]
    for process in started:
        process.start()
    for process in started:
        process.join(60 * minutes)
        assert process.exitcode == 0
    return [pickle.loads((folder / f"rank{rank}").read_bytes()) for rank in range(WORLD)]


def start_ranks(words: list[str], folder: Path, ranks: int = WORLD, **env: str) -> list[Any]:
    """Run a command line as torchrun would, a session for each rank; `folder` holds its modules and what they say."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env |= {"PYTHONPATH": str(folder)}
    if ranks > 1:
        env |= {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GROUP_RANK": "0"}
        env |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    started = []
    for rank in range(ranks):
        mine = env | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {})
        started.append(_processes.Process(target=_command, args=(words, mine, str(folder / f"log{rank}"))))
        started[-1].start()
    return started


def ended(started: list[Any], seconds: float = 240) -> list[int | None]:
    """Exit codes of processes, None of one that had to be killed after waiting for it."""
    codes = []
    for process in started:
        process.join(seconds)
        codes.append(process.exitcode)
    for process in started:
        process.kill()
    return codes


def logs(folder: Path) -> str:
    """What the ranks of the latest command said."""
    return "".join(log.read_text() for log in sorted(folder.glob("log?")))


def _command(words: list[str], env: dict[str, str], log: str) -> None:
    os.setsid()
    os.environ.update(env)
    sys.path.insert(0, env["PYTHONPATH"])
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    from lightning.fabric.utilities.rank_zero import rank_zero_only as fabrics
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    from ssl_lab.cli.main import main

    # Read from the environment when it was imported, which a server of processes did earlier.
    rank_zero_only.rank = fabrics.rank = int(env.get("RANK", 0))
    torch.set_num_threads(1)
    sys.argv = ["ssl-lab", *words]
    sys.exit(main())
