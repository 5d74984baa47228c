"""Sound files of every kind at any rate, and what is said about those that are none."""

import sys

import numpy as np
import pytest
import torch
from sounds import encoded, pitch, sine

from ssl_lab.data import audio_decode
from ssl_lab.data.audio_decode import decode_audio, seconds_of
from ssl_lab.data.decode import Unreadable
from ssl_lab.errors import UserError

pytest.importorskip("soundfile", reason="soundfile is not installed")
soxr = pytest.importorskip("soxr", reason="soxr is not installed")

FORMATS = [("WAV", None), ("WAV", "PCM_24"), ("WAV", "FLOAT"), ("FLAC", None), ("OGG", None), ("MP3", None)]


@pytest.mark.parametrize(("kind", "subtype"), FORMATS)
@pytest.mark.parametrize("rate", [8000, 16000, 22050])
def test_every_format_is_read_at_any_rate(kind, subtype, rate, tmp_path):
    data = encoded(sine(2, 0.5, 16000), 16000, kind, subtype)
    clip = decode_audio(data, rate)
    assert clip.dtype == torch.float32 and clip.dim() == 1
    assert abs(len(clip) - rate // 2) <= 1
    middle = clip[rate // 8 : -rate // 8]
    assert abs(pitch(middle, rate) - 500) < 2
    assert abs(float(middle.square().mean().sqrt()) - 0.5 / 2**0.5) < (0.04 if kind == "MP3" else 0.01)
    (tmp_path / "clip.bin").write_bytes(data)  # the suffix is never asked
    assert torch.equal(decode_audio(tmp_path / "clip.bin", rate), clip)
    assert seconds_of(data) == pytest.approx(0.5, abs=0.1)


def test_channels_are_averaged():
    left, right = sine(1, 0.2), sine(1, 0.2, level=0.1)
    clip = decode_audio(encoded(np.stack([left, right], 1), subtype="FLOAT"), 8000)
    assert torch.allclose(clip, torch.from_numpy((left + right) / 2))


def test_resampling_is_soxrs_and_band_limited():
    both = sine(2, 0.5, 16000) + 0.5 * np.sin(2 * np.pi * 6000 * np.arange(8000) / 16000).astype("f4")
    half = decode_audio(encoded(both, 16000, subtype="FLOAT"), 8000)
    assert torch.equal(half, torch.from_numpy(soxr.resample(both, 16000, 8000, quality="HQ")))
    middle = half[500:-500].numpy()
    assert np.abs(np.fft.rfft(middle * np.hanning(len(middle))))[1000:].max() < 1  # 6 kHz would be folded to 2 kHz
    assert abs(pitch(middle) - 500) < 2


def test_silence_and_the_shortest_clips_are_sound():
    assert not decode_audio(encoded(np.zeros(4000, "f4")), 16000).any()
    assert len(decode_audio(encoded(sine(0, 0.05)), 8000)) == 400
    assert len(decode_audio(encoded(sine(0, 1 / 8000)), 8000)) == 1


def long_wav():
    """The header of a file of eight hours and one second of it."""
    data = bytearray(encoded(sine(0, 1.0)))
    data[40:44] = (2 * 8000 * 8 * 3600).to_bytes(4, "little")
    return bytes(data)


def changed(samples, place, value):
    samples[place] = value
    return encoded(samples, subtype="FLOAT")


BROKEN = {
    "empty": (lambda: b"", "empty"),
    "text": (lambda: b"this is no sound at all" * 9, "no sound file"),
    "zeros": (lambda: b"\0" * 500, "no sound file"),
    "no_samples": (lambda: encoded(sine(0, 0)), "no samples"),
    "nan": (lambda: changed(sine(0), 7, np.nan), "no numbers"),
    "infinite": (lambda: changed(sine(0), 7, np.inf), "no numbers"),
    "cut_wav": (lambda: encoded(sine(0, 1))[:9000], "cut off"),
    "cut_header": (lambda: encoded(sine(0))[:20], "cut off"),
    "cut_flac": (lambda: encoded(sine(0, 1), kind="FLAC")[:2000], "broken"),
    "cut_ogg": (lambda: encoded(sine(0, 1), kind="OGG")[:2000], "broken"),
    "cut_mp3": (lambda: encoded(sine(0, 4), kind="MP3")[:3000], "cut off|broken"),
    "too_short": (lambda: encoded(sine(0, 1 / 44100, 44100), 44100), "too short"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files_give_a_reason(kind):
    make, reason = BROKEN[kind]
    with pytest.raises(Unreadable, match=reason) as error:
        decode_audio(make(), 8000)
    assert str(error.value) and "\n" not in str(error.value) and "BytesIO" not in str(error.value)


def test_what_is_no_file_gives_a_reason(tmp_path):
    for path, reason in ((tmp_path / "none.wav", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(Unreadable, match=reason):
            decode_audio(path, 8000)
    with pytest.raises(Unreadable, match="no sound file"):
        seconds_of(b"nothing" * 20)


def test_a_header_that_claims_too_much_and_a_file_that_is_too_long(monkeypatch):
    assert len(decode_audio(long_wav(), 8000)) == 8000  # what is there is read
    monkeypatch.setattr(audio_decode, "MAX_SECONDS", 1)
    monkeypatch.setattr(audio_decode, "_BLOCK", 1000)
    assert len(decode_audio(encoded(sine(0, 0.9)), 8000)) == 7200  # in several blocks
    with pytest.raises(Unreadable, match="longer than the limit"):
        decode_audio(encoded(sine(0, 1.1)), 8000)


@pytest.mark.parametrize("library", ["soundfile", "soxr"])
def test_a_missing_library_is_named(library, monkeypatch):
    data = encoded(sine(0))
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=rf"needs {library}: pip install 'ssl-lab\[audio\]'"):
        decode_audio(data, 16000)
