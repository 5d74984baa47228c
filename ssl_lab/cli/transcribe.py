"""`ssl-lab transcribe`: what is said in sound files, by a run of speech recognition."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from ssl_lab.cli.generate import PRECISIONS, device_named
from ssl_lab.cli.saved import load_config, run_folder
from ssl_lab.cli.tuned import rebuild, whole
from ssl_lab.data import tokenizer as tokenizers
from ssl_lab.data.audio_decode import decode_audio
from ssl_lab.data.decode import Unreadable
from ssl_lab.data.medium import AUDIO
from ssl_lab.data.tokenizer import Tokenizer
from ssl_lab.errors import UserError
from ssl_lab.generation.chunks import in_chunks
from ssl_lab.generation.ctc import CTCBeam, Word, align, beam_search, greedy, pieces, words
from ssl_lab.nn.lora import fuse_
from ssl_lab.train import checkpoint

_SHORTEST = 0.2  # seconds; what is shorter is followed by silence, as in training
_LEAST = 0.5  # seconds of overlap: less would cut into what a frame sees
_SEARCHED = 20.0  # seconds that one search covers


@dataclass(frozen=True)
class Recogniser:
    """A method that gives CTC's frame probabilities, with its tokenizer and its sampling rate in Hz."""

    method: Any
    tokenizer: Tokenizer
    sampling_rate: int


def run(cfg: DictConfig) -> None:
    """Write what is said to the terminal, one line a file; unreadable files and the real-time factor to stderr.

    Raises:
        UserError: no such run or sound, a run that does not transcribe, or nothing that can be read.
    """
    if cfg.precision not in PRECISIONS:
        raise UserError(f"precision={cfg.precision}: choose one of {', '.join(PRECISIONS)}")
    if cfg.overlap < _LEAST or cfg.chunk < 2 * cfg.overlap:
        raise UserError(
            f"chunk={cfg.chunk}, overlap={cfg.overlap}: the overlap is at least {_LEAST} s, and a chunk twice as long"
        )
    if cfg.num_beams < 1:
        raise UserError(f"num_beams={cfg.num_beams}: at least 1, the likeliest token of each frame")
    files, device = _files(Path(str(cfg.audio)).expanduser()), device_named(str(cfg.device))
    recogniser = _recogniser(str(cfg.ckpt), list(cfg.trust))
    recogniser.method.to(device, PRECISIONS[cfg.precision]).eval()
    heard = spent = 0.0
    for file in files:
        try:
            audio = decode_audio(file, recogniser.sampling_rate)
        except Unreadable as reason:
            if len(files) == 1:
                raise UserError(f"{file} cannot be read: {reason}") from None
            print(f"{file}: left out, {reason}", file=sys.stderr)
            continue
        begin = time.perf_counter()
        found = transcribed(recogniser, audio, chunk=cfg.chunk, overlap=cfg.overlap, num_beams=cfg.num_beams)
        heard, spent = heard + len(audio) / recogniser.sampling_rate, spent + time.perf_counter() - begin
        text, prefix = " ".join(word.text for word in found), f"{file}\t" if len(files) > 1 else ""
        if cfg.words:
            for word in found:
                print(f"{prefix}{word.start:.2f}\t{word.end:.2f}\t{word.text}", flush=True)
        else:
            print(f"{prefix}{text}", flush=True)
        if not found:
            print(f"{file}: no words in it", file=sys.stderr)
    if not heard:
        raise UserError(f"none of the {len(files)} files in {cfg.audio} can be read")
    print(f"{heard:,.1f} s of sound in {spent:,.2f} s, real-time factor {spent / heard:.4f}", file=sys.stderr)


def transcribed(recogniser: Recogniser, audio: Tensor, *, chunk: float, overlap: float, num_beams: int) -> list[Word]:
    """The words of a recording (S,) at the recogniser's rate.

    Args:
        recogniser: what hears.
        audio: (S,) float32.
        chunk: seconds that are heard at once.
        overlap: seconds that two chunks have in common.
        num_beams: see `CTCBeam`.

    Raises:
        UserError: the weights give values that are no numbers.
    """
    method, rate = recogniser.method, recogniser.sampling_rate
    seconds, parameter = method.encoder.seconds, next(method.parameters())
    least = round(_SHORTEST * rate)
    audio = torch.nn.functional.pad(audio, (0, max(0, least - len(audio))))

    def emit(samples: Tensor) -> Tensor:
        heard = samples[None].to(parameter.device, parameter.dtype)
        log_probs, frames = method.emissions({"audio": heard, "audio_valid": torch.ones_like(heard, dtype=torch.bool)})
        return log_probs[0, : int(frames)].cpu()

    frames = in_chunks(
        emit, audio, step=round(seconds * rate), chunk=round(chunk * rate), overlap=round(overlap * rate)
    )
    if not frames.isfinite().all():
        raise UserError("the weights give values that are no numbers: take an earlier checkpoint")
    said, spans = list[int](), list[tuple[int, int]]()
    for start, end in pieces(frames, round(_SEARCHED / seconds), method.blank):
        part = frames[start:end]
        if num_beams > 1:
            tokens = beam_search(part, CTCBeam(num_beams), blank=method.blank)[0][0]
        else:
            tokens = greedy(part, method.blank)
        said += tokens
        spans += [(start + a, start + b) for a, b in align(part, tokens, method.blank)]
    return words(said, spans, recogniser.tokenizer, seconds)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"audio={path} does not exist: give a sound file or a folder of them")
    found = sorted(file for file in path.rglob("*") if file.suffix.lower() in AUDIO.suffixes and file.is_file())
    if not found:
        raise UserError(f"audio={path} holds no sound file ({', '.join(AUDIO.suffixes)})")
    return found


def _recogniser(spec: str, trust: list[str]) -> Recogniser:
    """Of a run folder or a checkpoint in one. The averaged weights count where there are such."""
    path = Path(spec).expanduser()
    if not path.exists():
        raise UserError(f"ckpt={spec} does not exist; give the folder of a run with method=ctc, or a .ckpt in one")
    folder = run_folder(path)
    if folder is None:
        raise UserError(f"ckpt={spec}: no config.yaml beside it, so no run wrote it")
    config = load_config(folder, trust)
    method, base = rebuild(config)
    rate = (config.get("data") or {}).get("sampling_rate")
    if not hasattr(method, "emissions") or rate is None:
        raise UserError(f"ckpt={spec} is a {type(method).__name__}, which writes down no speech: give a run of ctc")
    found = path if path.is_file() else checkpoint.find(path)
    if found is None:
        raise UserError(f"ckpt={spec} has no checkpoint yet: train longer, or give another folder")
    try:
        method.load_state_dict(whole(checkpoint.read(found), base, found))
    except RuntimeError as error:
        line = str(error).splitlines()[-1].strip()
        raise UserError(f"{found} does not fit the method in {folder / 'config.yaml'}: {line}") from None
    return Recogniser(fuse_(method), tokenizers.load(folder), int(rate))
