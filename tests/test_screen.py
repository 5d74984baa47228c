"""What is printed is shown as it is, and a reader that leaves ends nothing."""

import subprocess
import sys

import pytest
from rich.table import Table

from ssl_lab.cli.screen import screen
from ssl_lab.cli.watch import Extraction

TALK = """
import sys
from ssl_lab.cli.screen import screen, unbroken
with unbroken():
    print("first", flush=True)
    sys.stdin.read(1)
    for n in range(3):
        print("lost", n)
        screen().print("lost", n)
print("after", file=sys.stderr)
"""


def test_brackets_and_colons_are_no_markup(capsys):
    table = Table("path", title="sweep: runs/[b]")
    table.add_row("eval=[knn] [/x]")
    screen().print("runs/[red]x[/y]/:fire:", table)
    out = capsys.readouterr().out
    assert "runs/[red]x[/y]/:fire:" in out and "eval=[knn] [/x]" in out and "sweep: runs/[b]" in out


def test_a_path_with_brackets_is_shown_while_it_is_read(capsys):
    with Extraction(screen(), {}) as watch:
        watch.say("reading runs/[/x]/0")


@pytest.mark.parametrize("reader", ["leaves", "was never there"])
def test_a_reader_that_leaves_ends_nothing(reader):
    talking = subprocess.Popen(
        [sys.executable, "-c", TALK], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    if reader == "leaves":
        assert talking.stdout.readline() == "first\n"
    talking.stdout.close()
    talking.stdin.write("x")
    talking.stdin.close()
    assert talking.stderr.read() == "after\n"
    assert talking.wait() == 0
