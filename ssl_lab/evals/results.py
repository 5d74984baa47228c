"""Results as rows in a run's metrics.json, each with the protocol that it was measured by, and as a table."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from ssl_lab.errors import UserError
from ssl_lab.files import write_text

_BESIDE = 6  # values that fit beside each other on 80 columns


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
        data: what was measured on; empty = the data of the run.
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
    data: str = ""

    @property
    def key(self) -> str:
        """Two rows with one key measure the same thing: the later one replaces the earlier one."""
        what = [self.subject, self.step, self.evaluator, self.name, self.samples, self.protocol, self.data]
        return json.dumps(what, sort_keys=True)


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


def own(rows: Iterable[Row]) -> list[Row]:
    """Those of a run's trained weights on its own data."""
    return [row for row in rows if row.subject == "trained" and not row.data]


def latest(rows: Iterable[Row]) -> dict[str, float]:
    """Of a run's `own` rows those of the last step: evaluator/value -> number."""
    found = own(rows)
    last = max((row.step for row in found), default=0)
    return {f"{row.evaluator}/{row.name}": row.value for row in found if row.step == last}


def write(path: Path, rows: Iterable[Row]) -> None:
    """Add `rows` to a metrics.json; a row with the same key is replaced in its place.

    The file is replaced as a whole, so it is complete at any moment. One writer at a time: call it on rank 0.
    """
    merged = {row.key: row for row in [*read(path), *rows]}
    lines = ",\n".join(json.dumps(asdict(row)) for row in merged.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, f"[\n{lines}\n]\n" if lines else "[]\n")


def matrix(rows: Iterable[Row]) -> list[list[str]]:
    """The values as text, heads first; details (names with a slash) are left out.

    Up to 6 values per subject: a line per subject and step. More would not fit beside each other: a line per value and
    a column per subject. A second value for the same place, measured by another protocol, gets a line (column) of its
    own.
    """
    lines: list[tuple[tuple[str, int], dict[tuple[str, str], float]]] = []
    columns: dict[tuple[str, str], None] = {}
    for row in rows:
        if "/" in row.name:
            continue
        subject = f"{row.subject} on {row.data}" if row.data else row.subject
        column, place = (row.evaluator, row.name), (subject, row.step)
        columns[column] = None
        cells = next((cells for at, cells in lines if at == place and column not in cells), None)
        if cells is None:
            lines.append((place, cells := {}))
        cells[column] = row.value
    beside = len(columns) <= _BESIDE
    style = ".4g" if beside else "#.4g"  # below each other, the same number of digits
    values = [[format(cells[c], style) if c in cells else "" for c in columns] for _, cells in lines]
    if beside:
        heads = ["features", "step", *("\n".join(column) for column in columns)]
        return [
            heads,
            *([subject, str(step), *cells] for ((subject, step), _), cells in zip(lines, values, strict=True)),
        ]
    heads = ["evaluator", "value", *(f"{subject}\nstep {step}" if step else subject for (subject, step), _ in lines)]
    out, before = [heads], ""
    for (evaluator, name), *texts in zip(columns, *values, strict=True):
        out.append([evaluator if evaluator != before else "", name, *texts])
        before = evaluator
    return out


def table(rows: Iterable[Row]) -> Table:
    """`matrix` for the screen."""
    heads, *lines = matrix(rows)
    out = Table(box=SIMPLE, pad_edge=False, collapse_padding=True)
    for i, head in enumerate(heads):
        out.add_column(head, justify="left" if i == 0 or head == "value" else "right", overflow="fold")
    for line in lines:
        out.add_row(*line)
    return out


def markdown(rows: Sequence[Row]) -> str:
    """`matrix` as a Markdown table, and below it how each evaluator measured, from its last row."""
    heads, *lines = ([cell.replace("\n", " ").replace("|", "\\|") for cell in line] for line in matrix(rows))
    marks = ["---" if i == 0 or head == "value" else "---:" for i, head in enumerate(heads)]
    text = [f"| {' | '.join(line)} |" for line in (heads, marks, *lines)]
    protocols = {row.evaluator: {"rows": row.samples} | row.protocol for row in rows}
    text += ["", *(f"- {name}: {_words(protocol)}" for name, protocol in protocols.items())]
    return "\n".join(text) + "\n"


def _words(value: Any) -> str:
    """A protocol in one line."""
    if isinstance(value, dict):
        return ", ".join(f"{k.replace('_', ' ')} {_words(v)}" for k, v in value.items() if v is not None)
    if isinstance(value, list | tuple):
        return "(" + ", ".join(_words(v) for v in value) + ")"
    return str(value)
