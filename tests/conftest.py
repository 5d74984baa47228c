"""The table of faults: which of them the tests put to a run, and how many it came through.

A test with the mark `faults("C1", "what happened")` counts for the row of that name. `make faults` runs all of them,
slow ones too, and writes the table between two lines of docs/reliability.md; `--faults-table=-` shows that of any run.
"""

import re
from collections import defaultdict
from pathlib import Path

import pytest

BEGIN, END = "<!-- table of faults -->", "<!-- end of the table -->"


def pytest_addoption(parser):
    parser.addoption("--faults-table", metavar="FILE", help="write the table of faults into FILE; - shows it")


def pytest_collection_modifyitems(items):
    for item in items:
        if mark := item.get_closest_marker("faults"):
            item.user_properties.append(("fault", list(mark.args)))


@pytest.fixture
def figure(request):
    """Keeps a number of a fault beside its row: `figure("steps repeated", 3)`; the largest of all is shown."""

    def keep(name: str, value: float) -> None:
        request.node.user_properties.append(("figure", [name, value]))

    return keep


def table(reports) -> list[str]:
    """Lines of Markdown from the reports of a session, controller or not."""
    came, put, figures = defaultdict(int), defaultdict(int), defaultdict(dict)
    for report in reports:
        for fault in (tuple(value) for name, value in report.user_properties if name == "fault"):
            put[fault] += 1
            came[fault] += report.passed
            for name, (what, value) in report.user_properties:
                if name == "figure":
                    figures[fault][what] = max(value, figures[fault].get(what, value))
    lines = ["| | what happens | came through | at most |", "|---|---|--:|---|"]
    for case, what in sorted(put, key=lambda fault: (int(re.sub(r"\D", "", fault[0])), fault)):
        seen = ", ".join(f"{name} {value:.3g}" for name, value in figures[case, what].items())
        lines.append(f"| {case} | {what} | {came[case, what]} of {put[case, what]} | {seen} |")
    return lines


def pytest_terminal_summary(terminalreporter, config):
    if not (file := config.getoption("--faults-table")):
        return
    stats = terminalreporter.stats
    reports = [r for kind in ("passed", "failed") for r in stats.get(kind, []) if r.when == "call"]
    lines = table(reports)
    if file == "-":
        terminalreporter.write_line("\n".join(lines))
    else:
        before, _, rest = Path(file).read_text().partition(BEGIN)
        after = rest.partition(END)[2]
        Path(file).write_text("\n".join([before + BEGIN, *lines, END + after]))
