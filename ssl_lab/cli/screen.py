"""What is printed: text as it is, and none of it worth a run."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, cast

from rich.console import Console


def screen(*, quiet: bool = False) -> Console:
    """A console for words of the user's own: [brackets] and :colons: of a path are no markup."""
    return Console(quiet=quiet, highlight=False, markup=False, emoji=False)


@contextlib.contextmanager
def unbroken() -> Iterator[None]:
    """Standard output that nobody reads any more (`| head -1`, a closed terminal) ends nothing that runs within."""
    with contextlib.redirect_stdout(cast(Any, _Unbroken(sys.stdout))):
        yield


class _Unbroken:
    """A text file that is thrown away from its first error on."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, text: str) -> int:
        with self._forgiving():
            self._file.write(text)
        return len(text)

    def flush(self) -> None:
        with self._forgiving():
            self._file.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    @contextlib.contextmanager
    def _forgiving(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._file.fileno())  # also for what is left in buffers at the end of the process
            os.close(nowhere)
