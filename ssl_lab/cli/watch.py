"""What a person sees while features are extracted: a line that moves, or lines where there is no terminal."""

import time
from collections.abc import Mapping

from rich.console import Console
from rich.status import Status
from rich.text import Text

from ssl_lab.evals.base import Split, Watch

_REFRESH, _LINE = 0.5, 30.0  # seconds between updates of the line, and between lines where there is no terminal


class Extraction(Watch):
    """A context in which the work of a round is shown.

    Args:
        console: where.
        lengths: rows of each split.
    """

    def __init__(self, console: Console, lengths: Mapping[str, int]) -> None:
        self._console, self._lengths, self._status = console, lengths, Status("", console=console)
        self._split, self._first, self._done = "", 0, 0  # where counting began, and where it is
        self._begun, self._shown = 0.0, 0.0
        self.subject = ""

    def __enter__(self) -> "Extraction":
        if self._console.is_terminal:
            self._status.start()
        self._shown = time.monotonic()
        return self

    def __exit__(self, *reason: object) -> None:
        self._status.stop()

    def say(self, doing: str) -> None:
        """Shown on a terminal until something else is, not at all elsewhere."""
        self._status.update(Text(doing))  # a path may have [brackets]

    def begin(self, evaluator: str) -> None:
        """An evaluator starts: most take seconds."""
        self.say(f"{self.subject}: {evaluator}")

    def rows(self, split: Split, done: int, limit: int | None) -> None:
        """Shown every now and then, with the speed."""
        now = time.monotonic()
        if split != self._split or done < self._done:
            self._split, self._first, self._begun, self._shown = split, done, now, now
        self._done = done
        if now - self._shown < (_REFRESH if self._console.is_terminal else _LINE):
            return
        self._shown = now
        total = self._lengths.get(split, done)
        total = total if limit is None else min(total, limit)
        rate = (done - self._first) / max(now - self._begun, 1e-9)
        text = f"{self.subject}: features of {split}, {done:,} of {total:,}, {rate:,.0f} a second"
        if self._console.is_terminal:
            self.say(text)
        else:
            self._console.print(text, highlight=False, soft_wrap=True)
