"""Checkpoint files that survive a kill, a full disk and a flipped bit.

A file is written beside its final name, forced to disk, read back under `weights_only=True`, and only then renamed. A
sidecar `step=N.json`, in place before the rename, holds its size and SHA-256: a checkpoint counts while both agree.
"""

import errno
import functools
import hashlib
import json
import logging
import os
import pickle
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import lightning
import torch
from lightning.pytorch.plugins.io import CheckpointIO

from ssl_lab import dist
from ssl_lab.errors import UserError
from ssl_lab.files import replacing, write_text
from ssl_lab.train.background import Background
from ssl_lab.train.base import Base
from ssl_lab.train.state import copied, num_bytes

log = logging.getLogger(__name__)

LAST = "last.ckpt"
_NAME = re.compile(r"step=(\d+)\.ckpt")
_FULL = (errno.ENOSPC, errno.EDQUOT)
_UNREADABLE = (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, TypeError)


class CheckpointFiles(CheckpointIO):
    """Lightning's door to checkpoint files: keeps the newest `keep` of a folder and the pointer `last.ckpt`.

    When the disk is full the oldest go first; with one left, training goes on without the new file and says so.
    With a `base`, what belongs to it is not stored. In the `background`, saving returns once the state is copied to the
    CPU's memory; `wait` and the next save wait for the file and raise what went wrong with it.
    """

    def __init__(self, keep: int = 2, base: Base | None = None, *, background: bool = False) -> None:
        if keep < 2:
            raise UserError(f"keep_checkpoints={keep} could lose the only one while it is replaced; give 2 or more")
        self.keep, self.base = keep, base
        self._background = Background() if background else None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.wait()
        if self.base is not None:
            checkpoint = self.base.left_out(checkpoint)
        if self._background is None:
            self._save(checkpoint, Path(path))
        else:
            self._background.start(functools.partial(self._save, copied(checkpoint), Path(path)))

    def wait(self) -> None:
        """Until what was saved is in its file."""
        if self._background is not None:
            self._background.wait()

    def _save(self, checkpoint: dict[str, Any], path: Path) -> None:
        while True:
            try:
                write(checkpoint, path)
                break
            except OSError as error:
                if error.errno not in _FULL:
                    raise UserError(f"cannot write {path}: {error.strerror or error}; mend it and repeat") from error
                old = stored(path.parent)
                if len(old) < 2:
                    kept = f"the last checkpoint is {old[0]}" if old else "there is no checkpoint yet"
                    log.warning("disk full: %s is not saved, training goes on; %s", path.name, kept)
                    return
                log.warning("disk full: %s is removed to make room", old[0].name)
                self.remove_checkpoint(old[0])
        _point(path)
        for surplus in stored(path.parent)[: -self.keep]:
            self.remove_checkpoint(surplus)

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = True, **_: Any
    ) -> dict[str, Any]:
        return read(path) if self.base is None else self.base.put_back(read(path), path)

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)
        _sidecar(Path(path)).unlink(missing_ok=True)


def write(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Write `checkpoint` to `path` with its sidecar; the file appears whole or not at all.

    Raises:
        OSError: the disk is full (before anything is written, where that can be known) or fails.
        UserError: it holds something that would not load under `weights_only=True`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    size = num_bytes(checkpoint)
    if shutil.disk_usage(path.parent).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    with replacing(path) as temporary:
        with open(temporary, "wb") as file:
            stream = _Hashed(file)
            try:
                torch.save(checkpoint, stream)  # type: ignore[arg-type]
            except RuntimeError:
                if stream.error is not None:  # torch hides the cause
                    raise stream.error from None
                raise
        _require_plain(temporary)
        facts = {
            "step": int(checkpoint.get("global_step", 0)),
            "sha256": stream.digest.hexdigest(),
            "size": temporary.stat().st_size,
            "world_size": dist.world_size(),
            "samples_per_step": checkpoint.get("samples_per_step"),
            "versions": {"torch": str(torch.__version__), "lightning": lightning.__version__},
        }
        write_text(_sidecar(path), json.dumps(facts, indent=1) + "\n")


def read(path: str | Path, *, lazy: bool = False) -> dict[str, Any]:
    """The contents of a checkpoint, tensors on the CPU; nothing in it is run. `lazy` leaves tensors in the file.

    Raises:
        UserError: no file, a damaged file, one that could run code, or not a checkpoint of a training run.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}; give a file such as runs/NAME/SEED/checkpoints/{LAST}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=lazy)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is refused: it is no checkpoint or holds objects that could run code") from error
    except _UNREADABLE as error:
        raise UserError(f"{path} cannot be read as a checkpoint ({_first_line(error)}); use another one") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise UserError(f"{path} is not a checkpoint of a training run: it has no state_dict")
    return checkpoint


def facts(path: str | Path) -> dict[str, Any]:
    """What was known when a checkpoint was written: step, size, sha256, world_size, samples_per_step, versions."""
    sidecar = _sidecar(Path(path))
    try:
        return dict(json.loads(sidecar.read_text()))
    except (OSError, ValueError):
        return {}


def damage(path: Path) -> str | None:
    """Why a checkpoint is not what was written, None = it is."""
    known = facts(path)
    if not known:
        return "its sidecar is missing or unreadable"
    try:
        if path.stat().st_size != known.get("size"):
            return f"{path.stat().st_size} bytes, not {known.get('size')}"
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return error.strerror or str(error)
    return None if digest == known.get("sha256") else "its SHA-256 differs"


def find(out: str | Path) -> Path | None:
    """Newest undamaged checkpoint of a run folder (or of its checkpoints folder), None when there are none.

    A file is given back as it is, unless its sidecar says that it is damaged.

    Raises:
        UserError: there are checkpoints, and every one is damaged: to start afresh then must be said, not guessed.
    """
    folder = Path(out)
    if folder.is_file():
        if facts(folder) and (problem := damage(folder)):
            raise UserError(f"checkpoint {folder} is damaged ({problem}); use an older one")
        return folder
    if (folder / "checkpoints").is_dir():
        folder = folder / "checkpoints"
    found = stored(folder)
    for path in reversed(found):
        if (problem := damage(path)) is None:
            return path
        log.warning("checkpoint %s is damaged (%s): looking for an older one", path, problem)
    if found:
        raise UserError(f"every checkpoint in {folder} is damaged; remove it to start afresh, or give another out=")
    return None


def stored(folder: Path) -> list[Path]:
    """Checkpoints `step=N.ckpt` of a folder, oldest first."""
    if not folder.is_dir():
        return []
    steps = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(steps)]


class _Hashed:
    """A file that hashes what is written to it and remembers why writing failed."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            self.digest.update(data)
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _require_plain(path: Path) -> None:
    """Load a fresh file the way every reader will; memory-mapped, so that only the structure is read."""
    try:
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"this run cannot be saved safely ({_first_line(error)}); "
            "states may hold tensors, numbers, text, lists and dicts only"
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _sidecar(path: Path) -> Path:
    return path.resolve().with_suffix(".json")


def _point(path: Path) -> None:
    """Make `last.ckpt` a link to `path`, replacing the old one in one step; left out where links do not exist."""
    temporary = path.with_name(f".{LAST}.{os.getpid()}.tmp")
    try:
        temporary.symlink_to(path.name)
        os.replace(temporary, path.with_name(LAST))
    except OSError as error:
        log.warning("%s is not updated: %s", LAST, error.strerror)
