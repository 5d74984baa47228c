"""One round of evaluation: features once, every evaluator on them, one row per value."""

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from datetime import UTC, datetime

import torch
from torch import nn

from ssl_lab import dist
from ssl_lab.evals.base import Data, Evaluator, Precision, Round, Skip, require
from ssl_lab.evals.results import Row
from ssl_lab.nn.mode import evaluating


def run_all(
    evaluators: Mapping[str, Evaluator],
    method: nn.Module,
    data: Data,
    *,
    step: int = 0,
    subject: str = "trained",
    precision: Precision = nullcontext,
    say: Callable[[str], None] = print,
    keep: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:
    """Run `evaluators` (by name) on `method`, in training or offline; the same code serves both.

    Modes of modules and the global random generator of the CPU are afterwards as they were before. Every rank must
    call it, since features are gathered; every rank gets all rows.

    Args:
        evaluators: as built from `eval:` of a configuration.
        method: on the device where it is to run.
        data: set up.
        step: optimizer steps that the weights have seen.
        subject: whose features these are: "trained", "random encoder", "raw pixels", ...
        precision: autocast context of the forward passes, e.g. `trainer.precision_plugin.forward_context`.
        say: gets a line for every evaluator that was skipped or left something out, on rank 0.
        keep: gets the rows of each evaluator as soon as it is done.

    Raises:
        UserError: the method lacks a capability, a split is empty, or features are not finite.
    """
    round = Round(method, data, precision)
    return run_round(evaluators, round, step=step, subject=subject, say=say, keep=keep)


def run_round(
    evaluators: Mapping[str, Evaluator],
    round: Round,
    *,
    step: int = 0,
    subject: str = "trained",
    say: Callable[[str], None] = print,
    keep: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:
    """The same in a round that the caller made, whose features are then at hand for more."""
    require(evaluators, round.method)
    rows = list[Row]()
    with evaluating(round.method), torch.random.fork_rng(devices=[]):
        for name, evaluator in evaluators.items():
            round.samples, round.notes = {}, []
            round.watch.begin(name)
            start = time.perf_counter()
            try:
                values = evaluator.run(round)
            except Skip as reason:
                if dist.rank() == 0:
                    say(f"evaluator {name} skipped: {reason}")
                continue
            for note in round.notes if dist.rank() == 0 else ():
                say(f"evaluator {name}: {note}")
            seconds = round_to(time.perf_counter() - start)
            now = datetime.now(UTC).isoformat(timespec="seconds")
            found = [
                Row(subject, step, name, key, float(value), round.samples, evaluator.protocol, seconds, now)
                for key, value in values.items()
            ]
            keep(found)
            rows += found
    return rows


def round_to(seconds: float) -> float:
    """To milliseconds."""
    return float(f"{seconds:.3f}")


def logged(rows: list[Row]) -> dict[str, float]:
    """Rows as a logger takes them: {"eval/knn/top1": 71.2}."""
    return {f"eval/{row.evaluator}/{row.name}": row.value for row in rows}
