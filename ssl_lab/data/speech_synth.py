"""Voices that say texts, offline: eSpeak NG, and tones that stand in for it."""

import importlib
import importlib.util
import json
import struct
import subprocess
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ssl_lab.data.audio import check_rate
from ssl_lab.errors import UserError

_WORKER = Path(__file__).with_name("speech_synth_worker.py")
_SILENT = 0.1  # seconds of silence for a text that has no sound


class Voice(Protocol):
    """Says texts, always in the same way: the same list gives the same samples."""

    def say(self, texts: Sequence[str], sampling_rate: int) -> list[list[Tensor]]:
        """For each text (S,) int16 from each of the voices."""
        ...


class Espeak:
    """eSpeak NG (GPL-3.0), of the package espeakng-loader; it runs as a program of its own.

    Args:
        voices: names, such as en-us, en-gb-scotland, de, with a variant after a plus: en-us+f3.
        speed: words in a minute.
        pitch: 0 to 100.
        seed: of its noise.

    Raises:
        UserError: no voice, or numbers out of range.
    """

    def __init__(self, voices: Sequence[str] = ("en-us",), *, speed: int = 175, pitch: int = 50, seed: int = 0) -> None:
        if not voices:
            raise UserError("voices=[] leaves nobody to speak: name one, such as en-us")
        if not 80 <= speed <= 450 or not 0 <= pitch <= 100:
            raise UserError(f"speed={speed}, pitch={pitch}: words in a minute from 80 to 450, and 0 to 100")
        self.voices, self.speed, self.pitch, self.seed = list(voices), speed, pitch, seed

    def say(self, texts: Sequence[str], sampling_rate: int) -> list[list[Tensor]]:
        """For each text (S,) int16 from each of the voices.

        Raises:
            UserError: a package is not installed, or the program fails.
        """
        library, resampler = _package("espeakng_loader"), _package("soxr")
        asked = {
            "library": str(library.get_library_path()),
            "data": str(library.get_data_path()),
            "seed": self.seed,
            "speed": self.speed,
            "pitch": self.pitch,
            "say": [[voice, text] for voice in self.voices for text in texts if _speakable(text)],
        }
        done = subprocess.run(
            [sys.executable, "-I", str(_WORKER)], input=json.dumps(asked).encode(), capture_output=True
        )
        if done.returncode:
            lines = done.stderr.decode(errors="replace").strip().splitlines() or [f"it ended with {done.returncode}"]
            raise UserError(f"speech cannot be made: {lines[-1]}")
        (rate,), at = struct.unpack_from("<i", done.stdout), 4
        clips = []
        for text in [*texts] * len(self.voices):
            if not _speakable(text):
                clips.append(_never_empty(torch.zeros(0, dtype=torch.int16), sampling_rate))
                continue
            (count,) = struct.unpack_from("<i", done.stdout, at)
            samples = np.frombuffer(done.stdout, dtype="<i2", count=count, offset=at + 4)
            at += 4 + 2 * count
            real = samples.astype(np.float32)  # to whole numbers soxr dithers, each time otherwise
            found = resampler.resample(real, rate, sampling_rate, quality="HQ") if count else real
            whole = found.round().clip(-32768, 32767).astype(np.int16)
            clips.append(_never_empty(torch.from_numpy(whole), sampling_rate))
        return [clips[i :: len(texts)] for i in range(len(texts))]


class ToneVoice:
    """A stand-in without any package: every word is a chord of its own, followed by silence of a fifth of its length.

    Args:
        voices: how many, each a fifth of an octave above the one before.
        speed: words in a minute.

    Raises:
        UserError: no voice, or no such speed.
    """

    def __init__(self, voices: int = 1, *, speed: int = 500) -> None:
        if voices < 1 or not 60 <= speed <= 1000:
            raise UserError(f"voices={voices}, speed={speed}: at least 1, and words in a minute from 60 to 1000")
        self.voices, self.seconds = voices, 60 / speed

    def say(self, texts: Sequence[str], sampling_rate: int) -> list[list[Tensor]]:
        """For each text (S,) int16 from each of the voices."""
        return [[self._text(text, 2 ** (k / 5), sampling_rate) for k in range(self.voices)] for text in texts]

    def _text(self, text: str, factor: float, rate: int) -> Tensor:
        time = np.arange(round(self.seconds * rate * 5 / 6)) / rate
        parts = [np.zeros(0)]
        for word in text.lower().split():
            bits = zlib.crc32(word.encode())
            pitches = [200 * 2 ** ((bits >> shift & 31) / 16) for shift in (0, 5, 10)]
            wave = sum(np.sin(2 * np.pi * factor * pitch * time) for pitch in pitches)
            parts += [wave * np.sin(np.pi * time / time[-1]), np.zeros(round(self.seconds * rate / 6))]
        return _never_empty(torch.from_numpy((8000 * np.concatenate(parts)).astype("<i2")), rate)


def _speakable(text: str) -> bool:
    """Of a text without letters and digits eSpeak NG says a few milliseconds of noise."""
    return any(letter.isalnum() for letter in text)


def _never_empty(clip: Tensor, rate: int) -> Tensor:
    return clip if len(clip) else torch.zeros(round(_SILENT * check_rate(rate)), dtype=torch.int16)


def _package(name: str) -> Any:
    if importlib.util.find_spec(name) is None:
        shown = name.replace("_", "-")
        raise UserError(f"speech is made by eSpeak NG, which needs {shown}: pip install 'ssl-lab[speech]'")
    return importlib.import_module(name)
