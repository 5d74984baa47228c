"""Results as rows in a run's metrics.json, each with the protocol that it was measured by, and as a table."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from ssl_lab.errors import UserError
from ssl_lab.files import write_text


@dataclass(frozen=True, slots=True)
class Row:
    """One value.

    Args:
        subject: whose features: "trained", "random encoder", "raw pixels", the name of imported weights.
        step: optimizer steps that the weights have seen.
        evaluator: its name under `eval:`.
        name: of the value, e.g. "top1" (percent); with a slash it is a detail.
        value: the number.
        samples: rows used per split.
        protocol: the evaluator's settings.
        seconds: that the evaluator took, with the features where it was the first to ask for them.
        time: when, UTC, ISO 8601.
    """

    subject: str
    step: int
    evaluator: str
    name: str
    value: float
    samples: dict[str, int]
    protocol: dict[str, Any]
    seconds: float
    time: str

    @property
    def key(self) -> str:
        """Two rows with one key measure the same thing: the later one replaces the earlier one."""
        return json.dumps(
            [self.subject, self.step, self.evaluator, self.name, self.samples, self.protocol], sort_keys=True
        )


def read(path: Path) -> list[Row]:
    """Rows of a metrics.json, none if there is no such file.

    Raises:
        UserError: the file is not such a list.
    """
    if not path.exists():
        return []
    try:
        return [Row(**row) for row in json.loads(path.read_text())]
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is not a list of results ({error}): move it away and evaluate again") from None


def write(path: Path, rows: Iterable[Row]) -> None:
    """Add `rows` to a metrics.json; a row with the same key is replaced in its place.

    The file is replaced as a whole, so it is complete at any moment. One writer at a time: call it on rank 0.
    """
    merged = {row.key: row for row in [*read(path), *rows]}
    lines = ",\n".join(json.dumps(asdict(row)) for row in merged.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, f"[\n{lines}\n]\n" if lines else "[]\n")


def table(rows: Iterable[Row]) -> Table:
    """One line per subject and step, one column per value; details (names with a slash) are left out.

    A second value for the same place, measured by another protocol, goes on a line of its own.
    """
    lines: list[tuple[tuple[str, int], dict[str, float]]] = []
    columns: dict[str, None] = {}
    for row in rows:
        if "/" in row.name:
            continue
        column, place = f"{row.evaluator}\n{row.name}", (row.subject, row.step)
        columns[column] = None
        cells = next((cells for at, cells in lines if at == place and column not in cells), None)
        if cells is None:
            lines.append((place, cells := {}))
        cells[column] = row.value
    out = Table("features", "step", box=SIMPLE, pad_edge=False, collapse_padding=True)
    for column in columns:
        out.add_column(column, justify="right")
    for (subject, step), cells in lines:
        out.add_row(subject, str(step), *(f"{cells[c]:.4g}" if c in cells else "" for c in columns))
    return out
