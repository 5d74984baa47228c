"""Steps of ours and of peers, each contender in a process of its own, in turn: as a user of each would have them.

    python apart.py HARNESS.py conformer bf16 ours=ssl_lab.bench.harness:make "transformers(relpos)" > apart.jsonl

HARNESS.py is the harness that holds the peers. Ours keeps freed memory, as `ssl-lab` asks of glibc for its own process
alone; in one process with the peers that would change theirs. A line is a process: median and least of its steps.
"""

import gc
import importlib
import importlib.util
import json
import statistics
import subprocess
import sys
import time
import types

PASSES, ROUNDS, WARM_UP, THREADS = 5, 7, 3, 2


def contender(harness: str, family: str, precision: str, name: str) -> None:
    """Time the steps of one contender in this process."""
    ours = "=" in name
    if ours:
        from ssl_lab.cli.allocator import keep_memory

        keep_memory()
    import torch

    torch.set_num_threads(THREADS)
    spec = importlib.util.spec_from_file_location("harness", harness)
    peers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(peers)
    cfg = peers.config(family, types.SimpleNamespace(device="cpu", batch=0, threads=THREADS), precision, "plain")
    inputs = peers.make_inputs(family, cfg)
    if ours:
        module, function = name.partition("=")[2].split(":")
        step = getattr(importlib.import_module(module), function)(family, cfg, inputs)
    else:
        step = peers.build(family, name, peers.PEERS[family][name], cfg, inputs)
    for _ in range(WARM_UP):
        step()
    gc.collect()
    gc.disable()
    took = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        step()
        took.append(1e3 * (time.perf_counter() - start))
    row = {"family": family, "precision": precision, "name": name.partition("=")[0]}
    print(json.dumps(row | {"median_ms": round(statistics.median(took), 1), "min_ms": round(min(took), 1)}))


def main(harness: str, family: str, precision: str, *names: str) -> None:
    """All contenders in turn, `PASSES` times; then the ratios of their medians to the first's."""
    medians: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(PASSES):
        for name in names:
            words = [sys.executable, __file__, "--one", harness, family, precision, name]
            line = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip().splitlines()[-1]
            print(line, flush=True)
            medians[name].append(json.loads(line)["median_ms"])
    first = statistics.median(medians[names[0]])
    ratios = {name.partition("=")[0]: round(statistics.median(took) / first, 2) for name, took in medians.items()}
    print(json.dumps({"family": family, "precision": precision, "times_ours": ratios, "ours_ms": first}))


if __name__ == "__main__":
    contender(*sys.argv[2:]) if sys.argv[1] == "--one" else main(*sys.argv[1:])
