"""`ssl-lab transcribe`: what is said in sound files, by a run of speech recognition."""

import sys
import time
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from ssl_lab.backbones.decoder import Decoder
from ssl_lab.cli.generate import PRECISIONS, device_named
from ssl_lab.cli.saved import load_config, run_folder
from ssl_lab.cli.tuned import fill, newest, rebuild
from ssl_lab.data import tokenizer as tokenizers
from ssl_lab.data.audio_decode import decode_audio
from ssl_lab.data.decode import Unreadable
from ssl_lab.data.medium import AUDIO
from ssl_lab.data.tokenizer import Tokenizer
from ssl_lab.errors import UserError
from ssl_lab.generation.ctc import CTCBeam, Score
from ssl_lab.generation.listen import Recogniser
from ssl_lab.generation.ngram import DecoderScore, WordScore, read_arpa
from ssl_lab.nn.lora import fuse_
from ssl_lab.types import Transcribes

_LEAST = 0.5  # seconds of overlap: less would cut into what a frame sees


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
    recogniser = _recogniser(cfg, device)
    recogniser.text(torch.linspace(-1, 1, recogniser.sampling_rate))  # what is made once is no time of a file's
    heard = spent = 0.0
    for file in files:
        begin, prefix = time.perf_counter(), f"{file}\t" if len(files) > 1 else ""
        try:
            audio = decode_audio(file, recogniser.sampling_rate)
        except Unreadable as reason:
            if len(files) == 1:
                raise UserError(f"{file} cannot be read: {reason}") from None
            print(f"{file}: left out, {reason}", file=sys.stderr)
            continue
        if cfg.words:
            found = recogniser.words(audio)
            lines = [f"{word.start:.2f}\t{word.end:.2f}\t{word.text}" for word in found]
        else:
            lines = [recogniser.text(audio)]
        heard, spent = heard + len(audio) / recogniser.sampling_rate, spent + time.perf_counter() - begin
        for line in lines:
            print(f"{prefix}{line}", flush=True)
        if not any(lines):
            print(f"{file}: no words in it", file=sys.stderr)
    if not heard:
        raise UserError(f"none of the {len(files)} files in {cfg.audio} can be read")
    print(f"{heard:,.1f} s of sound in {spent:,.2f} s, real-time factor {spent / heard:.4f}", file=sys.stderr)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"audio={path} does not exist: give a sound file or a folder of them")
    found = sorted(file for file in path.rglob("*") if file.suffix.lower() in AUDIO.suffixes and file.is_file())
    if not found:
        raise UserError(f"audio={path} holds no sound file ({', '.join(AUDIO.suffixes)})")
    return found


def _recogniser(cfg: DictConfig, device: torch.device) -> Recogniser:
    """On its device, with the language model where one is asked for."""
    method, tokenizer, rate = _trained(str(cfg.ckpt), list(cfg.trust))
    name = type(method).__name__
    timed = hasattr(method, "emissions")
    if timed and not hasattr(method.encoder, "seconds"):
        raise UserError(f"ckpt={cfg.ckpt} hears by {type(method.encoder).__name__}, which gives no frames in order")
    if cfg.words and not timed:
        raise UserError(f"words=true: {name} does not know when a word was said; take a run of ctc, or words=false")
    score = None
    if cfg.lm is not None:
        if not timed or hasattr(method, "decode"):
            raise UserError(f"lm={cfg.lm} helps a search over frames of ctc, and this is a run of {name}: leave it out")
        if cfg.num_beams < 2:
            raise UserError(f"lm={cfg.lm} needs a search: set num_beams, such as num_beams=16")
        score = _language_model(str(cfg.lm), tokenizer, list(cfg.trust), device)
    method.to(device, PRECISIONS[cfg.precision]).eval()
    return Recogniser(
        method,
        tokenizer,
        rate,
        chunk=cfg.chunk,
        overlap=cfg.overlap,
        beam=CTCBeam(cfg.num_beams, lm_weight=cfg.lm_weight, reward=cfg.lm_reward),
        score=score,
    )


def _language_model(spec: str, tokenizer: Tokenizer, trust: list[str], device: torch.device) -> Score:
    """Of an ARPA file, or of a run of `causal_lm` with the tokens of the recogniser.

    Raises:
        UserError: neither of them, or a run with other tokens.
    """
    path = Path(spec).expanduser()
    if path.is_file() and path.suffix != ".ckpt":
        return WordScore(read_arpa(path), tokenizer, tokenizer.vocab_size)
    method, own, _ = _loaded(spec, trust, "lm")
    decoder = getattr(method, "decoder", None)
    if not isinstance(decoder, Decoder):
        raise UserError(f"lm={spec} is a {type(method).__name__}: give a run of causal_lm, or an ARPA file")
    if own is None or own.backend.get_vocab() != tokenizer.backend.get_vocab():
        raise UserError(f"lm={spec} has other tokens than the recogniser: train it with data.tokenizer=<that run>")
    begin = [x for x in (own.bos if own.bos is not None else own.eos,) if x is not None]
    return DecoderScore(decoder.to(device), begin)


def _trained(spec: str, trust: list[str]) -> tuple[Any, Tokenizer, int]:
    """A method that writes down speech, its tokenizer, and its sampling rate in Hz."""
    method, tokenizer, rate = _loaded(spec, trust, "ckpt")
    hears = hasattr(method, "emissions") or (isinstance(method, Transcribes) and rate is not None)
    if not hears or rate is None or tokenizer is None:
        raise UserError(f"ckpt={spec} is a {type(method).__name__}, which writes down no speech: give a run of ctc")
    if not all(p.isfinite().all() for p in method.parameters()):
        raise UserError(f"ckpt={spec} has weights that are no numbers, it has diverged: take an earlier checkpoint")
    return method, tokenizer, int(rate)


def _loaded(spec: str, trust: list[str], key: str) -> tuple[Any, Tokenizer | None, Any]:
    """The method, tokenizer and sampling rate of a run folder or of a checkpoint in one.

    The averaged weights count where there are such.
    """
    path = Path(spec).expanduser()
    if not path.exists():
        raise UserError(f"{key}={spec} does not exist; give the folder of a run, or a .ckpt in one")
    folder = run_folder(path)
    if folder is None:
        raise UserError(f"{key}={spec}: no config.yaml beside it, so no run wrote it")
    config = load_config(folder, trust)
    method, base = rebuild(config)
    rate = (config.get("data") or {}).get("sampling_rate")
    fill(method, base, newest(path, f"{key}={spec}"))
    tokenizer = tokenizers.load(folder) if (folder / "tokenizer.json").is_file() else None
    return fuse_(method), tokenizer, rate
