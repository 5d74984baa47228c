"""`ssl-lab generate`: text from a run, from transformers' weights or from a GGUF file, as it comes."""

import logging
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from ssl_lab.backbones.decoder import Decoder
from ssl_lab.backbones.encoder_decoder import EncoderDecoder
from ssl_lab.backbones.speech_transformer import SpeechTransformer
from ssl_lab.cli.saved import load_config, run_folder
from ssl_lab.cli.starting import start_of
from ssl_lab.cli.tuned import fill, newest, rebuild
from ssl_lab.data import tokenizer as tokenizers
from ssl_lab.data.tokenizer import Tokenizer
from ssl_lab.errors import UserError
from ssl_lab.generation.batch import room_of
from ssl_lab.generation.beam import Beam, beam_search
from ssl_lab.generation.generate import stream
from ssl_lab.generation.processors import Below
from ssl_lab.generation.prompts import chat
from ssl_lab.generation.sampling import Sampling
from ssl_lab.generation.words import Words
from ssl_lab.nn.lora import fuse_
from ssl_lab.weights import gguf, text
from ssl_lab.weights.sources import hf_config

DEFAULT_NEW = 100
SPARE = 512  # rows that an embedding may have beyond its tokenizer: many are rounded up
PRECISIONS = {"32-true": torch.float32, "bf16-true": torch.bfloat16, "64-true": torch.float64}


@dataclass(frozen=True)
class Speaker:
    """A model with its tokenizer.

    Attributes:
        model: decoder, or encoder and decoder.
        tokenizer: of both sides.
        start: what a target begins with.
        framed: the tokenizer's own special tokens stand around a text, as its authors trained.
    """

    model: Decoder | EncoderDecoder
    tokenizer: Tokenizer
    start: int = 0
    framed: bool = False


def run(cfg: DictConfig) -> None:
    """Write text to the terminal as it comes, and tokens a second to stderr.

    Raises:
        UserError: no such weights, no language model, no tokenizer or another one, or a prompt that does not fit.
    """
    if cfg.precision not in PRECISIONS:
        raise UserError(f"precision={cfg.precision}: choose one of {', '.join(PRECISIONS)}")
    device = device_named(str(cfg.device))
    speaker = _speaker(cfg)
    known = Below(speaker.tokenizer.vocab_size)
    sampling = Sampling(
        temperature=0.0 if cfg.num_beams > 1 else cfg.temperature,
        top_k=cfg.top_k,
        top_p=cfg.top_p,
        repetition_penalty=cfg.repetition_penalty,
        min_new_tokens=cfg.min_new_tokens,
        seed=cfg.seed,
        extra=() if speaker.model.vocab_size == speaker.tokenizer.vocab_size else (known,),
    )
    ids, shown = _prompt(cfg, speaker)
    speaker.model.to(device, PRECISIONS[cfg.precision]).eval()
    begin = time.perf_counter()
    tokens = _tokens(cfg, speaker, ids, sampling)
    print(shown, end="", flush=True)
    words, count = Words(speaker.tokenizer, ids if isinstance(speaker.model, Decoder) else ()), 0
    for token in tokens:
        print(words.push(token), end="", flush=True)
        count += 1
    seconds = time.perf_counter() - begin
    print(words.rest(), flush=True)
    print(f"{count} tokens, {count / seconds:,.1f} tokens/s", file=sys.stderr)


def _tokens(cfg: DictConfig, speaker: Speaker, ids: list[int], sampling: Sampling) -> Iterator[int]:
    """New tokens up to the end, which does not belong to the text; mistakes are told at the call."""
    model, end = speaker.model, _end(speaker.tokenizer)
    common: dict[str, Any] = {
        "max_new_tokens": cfg.max_new_tokens,
        "sampling": sampling,
        "eos": () if end is None else (end,),
        "start": speaker.start,
    }
    if cfg.max_new_tokens is None and isinstance(model, Decoder):
        common["max_new_tokens"] = max(1, min(DEFAULT_NEW, room_of(model) - len(ids)))
    if cfg.num_beams > 1:
        found = beam_search(model, [ids], beam=Beam(cfg.num_beams, cfg.length_penalty), **common)
        return _until(iter(found.tokens[0, 0]), end)
    return _until((token[0] for token in stream(model, [ids], **common)), end)


def _until(tokens: Iterator[Tensor], end: int | None) -> Iterator[int]:
    for token in tokens:
        if int(token) == end:
            return
        yield int(token)


def _prompt(cfg: DictConfig, speaker: Speaker) -> tuple[list[int], str]:
    """Ids of the prompt, and what of it is written before the text.

    Raises:
        UserError: nothing to begin with, or no chat template.
    """
    tokenizer, prompt = speaker.tokenizer, str(cfg.prompt)
    if cfg.chat:
        told = [] if cfg.system is None else [{"role": "system", "content": str(cfg.system)}]
        return tokenizer.encode(chat([*told, {"role": "user", "content": prompt}], tokenizer.config)), ""
    ids = tokenizer.encode(prompt, special=speaker.framed)
    if isinstance(speaker.model, EncoderDecoder):
        end = _end(tokenizer)
        return ids if end is None or ids[-1:] == [end] else [*ids, end], ""
    while ids and ids[-1] in (tokenizer.eos, tokenizer.sep) and prompt:
        ids = ids[:-1]  # the text goes on
    if not ids:
        if tokenizer.bos is None:
            raise UserError("the prompt is empty and the tokenizer has no token that begins a text: write prompt=...")
        ids = [tokenizer.bos]
    return ids, prompt if cfg.echo else ""


def _end(tokenizer: Tokenizer) -> int | None:
    """What ends a text in training too, see `ssl_lab.data.text`."""
    return tokenizer.sep if tokenizer.eos is None else tokenizer.eos


def _speaker(cfg: DictConfig) -> Speaker:
    spec, given = str(cfg.ckpt), None if cfg.tokenizer is None else tokenizers.load(str(cfg.tokenizer))
    kind, colon, name = spec.partition(":")
    if colon and kind == "gguf":
        speaker = Speaker(_language(text.build(spec), spec), given or Tokenizer(*gguf.tokenizer(name)))
    elif colon and kind == "hf":
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries, when the end is one line of ours
        model, words = _language(text.build(spec), spec), given or _beside(Path(name))
        told = getattr(hf_config(name)[1], "decoder_start_token_id", None)
        speaker = Speaker(model, words, start_of(words) if told is None else told, framed=True)
    else:
        speaker = _trained(spec, given, list(cfg.trust))
    spare = speaker.model.vocab_size - speaker.tokenizer.vocab_size
    if not 0 <= spare < SPARE:
        raise UserError(
            f"{spec} knows {speaker.model.vocab_size} tokens, its tokenizer {speaker.tokenizer.vocab_size}: they do "
            "not belong together, give tokenizer=<folder of the right one>"
        )
    return speaker


def _trained(spec: str, given: Tokenizer | None, trust: list[str]) -> Speaker:
    """Of a run folder, a checkpoint in one, or weights of ours. The averaged weights count where there are such."""
    path = Path(spec)
    if not path.exists():
        raise UserError(
            f"ckpt={spec} does not exist; give a run folder, a .ckpt in one, a .safetensors, hf:<folder> or gguf:<file>"
        )
    folder = run_folder(path)
    if path.suffix == ".safetensors":
        model, tokenizer, start = _language(text.build(spec), spec), given or _beside(path.parent), None
        if folder is not None and isinstance(model, EncoderDecoder):
            start = (load_config(folder, trust).get("method") or {}).get("start_token")
        return Speaker(model, tokenizer, start_of(tokenizer) if start is None else int(start))
    if folder is None:
        raise UserError(
            f"ckpt={spec}: no config.yaml beside it, so no run wrote it; for transformers' folders hf:{spec}"
        )
    method, base = rebuild(load_config(folder, trust))
    model, tokenizer = _language(method, spec), given or _beside(folder)
    fill(method, base, newest(path, f"ckpt={spec}"))
    return Speaker(fuse_(model), tokenizer, getattr(method, "start_token", 0))


def _language(built: Any, spec: str) -> Decoder | EncoderDecoder:
    """The part that speaks."""
    parts = (built, getattr(built, "decoder", None), getattr(built, "model", None))
    if any(isinstance(part, SpeechTransformer) for part in parts):
        raise UserError(f"ckpt={spec} hears instead of reading: ssl-lab transcribe ckpt={spec} audio=<file or folder>")
    for part in parts:
        if isinstance(part, Decoder | EncoderDecoder):
            return part
    raise UserError(f"ckpt={spec} is a {type(built).__name__}, which writes no text: give a decoder such as causal_lm")


def _beside(folder: Path) -> Tokenizer:
    """The tokenizer of a folder; newer ones keep the chat template in a file of its own."""
    tokenizer = tokenizers.load(folder)
    template = folder / "chat_template.jinja"
    if "chat_template" not in tokenizer.config and template.is_file():
        return Tokenizer(tokenizer.backend, tokenizer.config | {"chat_template": template.read_text(encoding="utf-8")})
    return tokenizer


def device_named(name: str) -> torch.device:
    """The device, or the one that there is for `auto`; else a `UserError`."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={name}: {str(error).splitlines()[0]}") from None
