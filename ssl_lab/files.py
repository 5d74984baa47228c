"""Files that appear whole or not at all, whatever happens to the process or the machine meanwhile."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path`; what is written there takes the place of `path` in one step at the end.

    The contents are on disk before the name is. On an exception nothing is left behind and `path` is as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace a small text file."""
    with replacing(path) as temporary:
        temporary.write_text(text, newline="")


def sweep(folder: Path) -> None:
    """Remove what killed processes left half written in `folder`."""
    for path in folder.glob(".*.tmp") if folder.is_dir() else ():
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Force a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some network file systems refuse a folder; the rename itself stands
            raise
    finally:
        os.close(descriptor)
