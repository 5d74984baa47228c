"""Sound files to mono samples at one rate, whatever the file is, or a reason why not. Reading is soundfile's."""

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssl_lab.data.decode import Unreadable
from ssl_lab.errors import UserError

MAX_SECONDS = 4 * 3600  # a file can claim far more than it holds
_BLOCK = 1 << 20  # frames that are read at once, so that many channels never fill the memory
_UNKNOWN = 0x7FFF0000  # RIFF sizes from here on are those of a writer that did not know the size
_SLACK = 0.9  # share of the frames claimed by a header that must be there; that of an mp3 is an estimate


def decode_audio(source: bytes | str | Path, sampling_rate: int) -> Tensor:
    """Bytes or the path of a wav, flac, ogg, opus, aiff or mp3 file -> (S,) float32 at `sampling_rate` Hz, S >= 1.

    Channels are averaged, other rates resampled by soxr (high quality, band-limited). Full scale is 1. Silence is
    sound; what is to be done with it is for those who normalise.

    Raises:
        Unreadable: no such file or none of these formats, cut off, without samples, with values that are no numbers, or
            longer than `MAX_SECONDS`.
        UserError: soundfile or soxr is not installed.
    """
    library, data = _library("soundfile"), _bytes(source)
    if len(data) >= 12 and data[:4] == b"RIFF":
        (claimed,) = struct.unpack("<I", data[4:8])
        if claimed < _UNKNOWN and claimed > len(data):
            raise Unreadable(f"it is cut off: {len(data):,} of {claimed + 8:,} bytes")
    try:
        with library.SoundFile(io.BytesIO(data)) as file:
            rate, frames = file.samplerate, file.frames
            blocks: list[np.ndarray] = []
            read = 0
            while len(block := file.read(_BLOCK, dtype="float32", always_2d=True)):
                blocks.append(block[:, 0] if block.shape[1] == 1 else block.mean(1, dtype=np.float32))
                read += len(block)
                if read > MAX_SECONDS * rate:
                    raise Unreadable(f"it is longer than the limit of {MAX_SECONDS // 3600} hours")
    except Unreadable:
        raise
    except Exception as error:  # decoders raise whatever a broken file drives them to
        raise Unreadable(_reason(error)) from error
    if not read:
        raise Unreadable("it holds no samples")
    if frames < 1 << 40 and read < _SLACK * frames:
        raise Unreadable(f"it is cut off: {read:,} of {frames:,} samples")
    samples = np.concatenate(blocks) if len(blocks) > 1 else blocks[0]
    if not np.isfinite(samples).all():
        raise Unreadable("it holds values that are no numbers (NaN or infinite)")
    if rate != sampling_rate:
        samples = _library("soxr").resample(samples, rate, sampling_rate, quality="HQ")
        if not len(samples):
            raise Unreadable(f"its {read} samples are too short for {sampling_rate} Hz")
    return torch.from_numpy(np.ascontiguousarray(samples, dtype=np.float32))


def seconds_of(source: bytes | str | Path) -> float:
    """Length in seconds by the header alone.

    Raises:
        Unreadable: there is no header.
        UserError: soundfile is not installed.
    """
    library, data = _library("soundfile"), _bytes(source)
    try:
        found = library.info(io.BytesIO(data))
        return float(found.frames / found.samplerate)
    except Exception as error:
        raise Unreadable(_reason(error)) from error


def _bytes(source: bytes | str | Path) -> bytes:
    if not isinstance(source, bytes):
        try:
            source = Path(source).expanduser().read_bytes()
        except OSError as error:
            raise Unreadable(error.strerror or str(error)) from error
    if not source:
        raise Unreadable("it is empty or cannot be opened")
    return source


def _library(name: str) -> Any:
    try:
        if name == "soxr":
            import soxr

            return soxr
        import soundfile

        return soundfile
    except (ImportError, OSError) as error:  # OSError: there is no libsndfile for this machine
        raise UserError(f"reading sound needs {name}: pip install 'ssl-lab[audio]'") from error


def _reason(error: Exception) -> str:
    text = str(getattr(error, "error_string", "") or error).strip().splitlines() or [type(error).__name__]
    if "not recognised" in text[0] or "unimplemented format" in text[0]:
        return "it is no sound file that can be read here (wav, flac, ogg, mp3): convert it"
    return f"it is broken: {text[0].rstrip('.')}"
