"""The table of faults counts what it was told, failures included."""

from types import SimpleNamespace

from conftest import table


def report(passed, *properties):
    return SimpleNamespace(passed=passed, user_properties=[*properties])


def test_rows_count_cases_and_keep_the_largest_figure():
    kill, disk = ("fault", ["C1", "killed"]), ("fault", ["C14", "disk full"])
    lines = table(
        [
            report(True, disk),
            report(True, kill, ("figure", ["steps repeated", 1])),
            report(False, kill, ("figure", ["steps repeated", 3])),
            report(True),
        ]
    )
    assert lines[2:] == ["| C1 | killed | 1 of 2 | steps repeated 3 |", "| C14 | disk full | 1 of 1 |  |"]
