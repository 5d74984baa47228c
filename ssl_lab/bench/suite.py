"""The table of a suite: one row for each method and kernel, as JSON and Markdown, beside an earlier table."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.table import Column, Table

from ssl_lab.errors import UserError
from ssl_lab.files import write_text

_COLUMNS = ("row", "ms", "samples/s", "of peak", "M parameters", "MB")


@dataclass(frozen=True)
class Measured:
    """A row: median seconds of a step, samples per second, share of the peak of matrix products; or what went wrong."""

    name: str
    median_s: float | None = None
    samples_per_s: float | None = None
    share_of_peak: float | None = None
    params: int | None = None
    peak_bytes: int | None = None
    note: str = ""


@dataclass
class SuiteTable:
    """All rows of a suite, the machine they were measured on, and its peaks.

    Attributes:
        suite: its name.
        precision: as `trainer.precision`.
        machine: device, threads, versions.
        peaks: dtype -> FLOP/s of the best matrix product.
        rows: in the order they were timed.
    """

    suite: str
    precision: str
    machine: dict[str, str | int]
    peaks: dict[str, float]
    rows: list[Measured] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Self:
        """An earlier table.

        Raises:
            UserError: no such file, or another one.
        """
        try:
            found: dict[str, Any] = json.loads(path.read_text())
            return cls(**{**found, "rows": [Measured(**row) for row in found["rows"]]})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"before={path} is no table of a suite ({error}): give the table.json of one") from None

    def write(self, folder: Path, before: Self | None = None) -> None:
        """`table.json` and `table.md` into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "table.json", json.dumps(asdict(self), indent=1) + "\n")
        write_text(folder / "table.md", "\n".join(self.markdown(before)) + "\n")

    def markdown(self, before: Self | None = None) -> Iterator[str]:
        """Lines: the machine, its peaks, the rows, and beside an earlier table how much faster each became."""
        yield from (line for text in self.heading() for line in (text, ""))
        header, *rows = self.cells(before)
        yield f"| {' | '.join(header)} |"
        yield f"|---|{'--:|' * (len(header) - 2)}---|"
        yield from (f"| {' | '.join(cells)} |" for cells in rows)

    def show(self, console: Console, before: Self | None = None) -> None:
        """The same in a terminal."""
        for text in self.heading():
            console.print(text)
        header, *rows = self.cells(before)
        table = Table(
            *(
                Column(name, justify="right" if 0 < i < len(header) - 1 else "left", no_wrap=i == 0)
                for i, name in enumerate(header)
            )
        )
        for cells in rows:
            table.add_row(*cells)
        console.print(table)

    def heading(self) -> Iterator[str]:
        """Which suite, on what machine, and how fast its matrix products are."""
        machine = ", ".join(f"{key} {value}" for key, value in self.machine.items())
        yield f"Suite {self.suite}, {self.precision}. {machine}."
        peaks = ", ".join(f"{dtype} {peak / 1e9:,.0f} GFLOP/s" for dtype, peak in self.peaks.items())
        yield f"Matrix products alone: {peaks}."

    def cells(self, before: Self | None = None) -> Iterator[list[str]]:
        """Names of the columns, then a list for each row.

        Times of two days are not alike on a machine that others use too; shares of the peak, which is measured in the
        same process, are nearer to it. Beside an earlier table both stand there as ratios, above 1 = better now.
        """
        former: Mapping[str, Measured] = {} if before is None else {row.name: row for row in before.rows}
        yield [*_COLUMNS, *(() if before is None else ("faster by", "share by")), ""]
        for row in self.rows:
            cells = [
                row.name,
                _told(row.median_s, 1e3, ".1f"),
                _told(row.samples_per_s, 1, ",.1f"),
                _told(row.share_of_peak, 1, ".0%"),
                _told(row.params, 1e-6, ".1f"),
                _told(row.peak_bytes, 2**-20, ",.0f"),
            ]
            if before is not None:
                then = former.get(row.name, Measured(row.name))
                cells += [_ratio(then.median_s, row.median_s), _ratio(row.share_of_peak, then.share_of_peak)]
            yield [*cells, row.note]

    def lost(self, before: Self, share: float) -> list[str]:
        """What became slower, a line each: rows whose share of the peak fell by more than `share`, or that failed."""
        former = {row.name: row for row in before.rows}
        found = []
        for row in self.rows:
            then = former.get(row.name)
            if then is None or then.share_of_peak is None:
                continue
            if row.share_of_peak is None:
                found.append(f"{row.name} ran before and does not now: {row.note}")
            elif row.share_of_peak < (1 - share) * then.share_of_peak:
                found.append(f"{row.name} fell from {then.share_of_peak:.1%} of the peak to {row.share_of_peak:.1%}")
        return found


def _told(value: float | None, scale: float, form: str) -> str:
    return "" if value is None else format(value * scale, form)


def _ratio(over: float | None, under: float | None) -> str:
    return f"{over / under:.2f}" if over and under else ""
