"""Asked before long work: whether its results can be written where they are wanted."""

import tempfile
from pathlib import Path

from ssl_lab.errors import UserError


def require_folder(out: Path) -> None:
    """Make the folder `out` and try to write there.

    Raises:
        UserError: that does not succeed.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise UserError(f"out={out}: {error.strerror}; give a folder that can be written to") from error


def require_file(out: Path) -> None:
    """Make the folder of the file `out` and try to write there.

    Raises:
        UserError: that does not succeed, or `out` is a folder.
    """
    if out.is_dir():
        raise UserError(f"out={out} is a folder: give the name of a file")
    require_folder(out.parent)
