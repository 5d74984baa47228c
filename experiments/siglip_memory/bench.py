"""What SigLIP's loss and its gradient add to the tensors that a rank holds, by ranks and by batch.

python bench.py > results.jsonl
"""

import itertools
import json
import multiprocessing
import sys
import tempfile
from collections.abc import Callable

E = 256  # width of an embedding
CHUNK = 1024
LOCAL = 1024  # samples of a rank, where there are several


def allocated(work: Callable[[], None]) -> float:
    """The most MiB of tensors that `work` holds at a time, beyond those that were there before."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    events = sorted(found.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return max(itertools.accumulate(changes)) / 2**20


def measure(rank: int, ranks: int, store: str, B: int, chunk: int | None) -> None:
    """Print, on the first rank, what the loss adds to the embeddings and their gradients."""
    import torch

    from ssl_lab.losses.pairs import sigmoid_loss

    torch.set_num_threads(1)
    if ranks > 1:
        torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    torch.manual_seed(rank)
    scale, bias = torch.tensor(10.0, requires_grad=True), torch.tensor(-10.0, requires_grad=True)
    small = [torch.randn(8, E, requires_grad=True) for _ in range(2)]
    sigmoid_loss(small, scale, bias, chunk=chunk).backward()  # libraries are loaded and started
    embeddings = [torch.randn(B, E, requires_grad=True) for _ in range(2)]
    for each in embeddings:
        each.grad = torch.zeros_like(each)
    added = allocated(lambda: sigmoid_loss(embeddings, scale, bias, chunk=chunk).backward())
    if rank == 0:
        facts = {"ranks": ranks, "batch_of_a_rank": B, "global_batch": B * ranks, "chunk": chunk}
        print(json.dumps({**facts, "added_mib": round(added, 1)}), flush=True)
    if ranks > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    cases = [(ranks, LOCAL) for ranks in (1, 2, 4, 8)] + [(1, B) for B in (2048, 4096, 8192, 16384)]
    for chunk in (CHUNK, None):
        for ranks, B in cases:
            with tempfile.TemporaryDirectory() as folder:
                given = [(rank, ranks, f"{folder}/store", B, chunk) for rank in range(ranks)]
                started = [context.Process(target=measure, args=each) for each in given]
                for process in started:
                    process.start()
                for process in started:
                    process.join()
                if any(process.exitcode for process in started):
                    sys.exit(f"{ranks} ranks, batch {B}, chunk {chunk}: failed")
