"""The figures of a bench, as one JSON object and as tables on the screen."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Row:
    """One contender: seconds of its step, samples per second, share of the peak, bytes, trained parameters.

    `share_of_peak` counts the FLOPs of our step for everyone: the work is the same, whoever wastes some.
    """

    name: str
    median_s: float
    quartiles_s: tuple[float, float]
    images_per_s: float
    share_of_peak: float
    params: int
    peak_bytes: int | None = None


@dataclass(frozen=True)
class Report:
    """Everything measured; rows in the order they were timed, ours first."""

    experiment: str
    precision: str
    batch_size: int
    machine: dict[str, str | int]
    flops: int
    peak_flops: float
    rounds: int
    rows: list[Row]
    data_wait: float | None = None
    loop_share: float | None = None
    notes: list[str] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """As JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")

    def show(self, console: Console) -> None:
        """As a table and a few lines."""
        console.print(self.table())
        for line in self.lines():
            console.print(line, highlight=False)

    def table(self) -> Table:
        """One line per contender."""
        ours = self.rows[0].median_s
        table = Table(title=f"{self.experiment}, {self.precision}, batch {self.batch_size}, {self.rounds} rounds")
        table.add_column("step")
        for column in ("ms", "quartiles", "samples/s", "of peak", "memory MB", "times ours"):
            table.add_column(column, justify="right")
        for row in self.rows:
            low, high = row.quartiles_s
            table.add_row(
                row.name,
                f"{row.median_s * 1e3:.1f}",
                f"{low * 1e3:.1f} - {high * 1e3:.1f}",
                f"{row.images_per_s:.1f}",
                f"{row.share_of_peak:.0%}",
                "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f}",
                f"{row.median_s / ours:.2f}",
            )
        return table

    def lines(self) -> Iterator[str]:
        """What is not per contender."""
        machine = ", ".join(f"{key} {value}" for key, value in self.machine.items())
        yield machine
        yield f"{self.flops / 1e9:.2f} GFLOP a step; matrix products alone do {self.peak_flops / 1e9:.0f} GFLOP/s here"
        if self.data_wait is not None:
            yield f"waiting for data: {self.data_wait:.1%} of the time"
        if self.loop_share is not None:
            yield f"the whole training loop does {self.loop_share:.1%} of the bare step's samples/s"
        yield from self.notes
