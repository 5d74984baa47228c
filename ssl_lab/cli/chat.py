"""`ssl-lab chat`: questions about pictures, answered by a run of a vision-language model as the words come."""

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from ssl_lab.backbones.vlm import VisionLanguage
from ssl_lab.cli.compose import build
from ssl_lab.cli.generate import PRECISIONS, device_named
from ssl_lab.cli.saved import load_config, run_folder
from ssl_lab.cli.tuned import fill, newest, rebuild
from ssl_lab.data import tokenizer as tokenizers
from ssl_lab.data.conversation_text import ConversationEncoder, Message
from ssl_lab.data.decode import Unreadable, decode
from ssl_lab.errors import UserError
from ssl_lab.generation.sampling import Sampling
from ssl_lab.generation.seeing import stream_seen
from ssl_lab.generation.words import Words
from ssl_lab.nn.lora import fuse_

_ASK, _CHANGE = "> ", "/image "


@dataclass
class Partner:
    """A model that sees and speaks, with all that a conversation needs.

    Attributes:
        model: in evaluation mode, on its device.
        encode: lays out conversations as in training.
        look: pixels as in training: pictures (3, Hi, Wi) uint8 -> (N, 3, H, W).
    """

    model: VisionLanguage
    encode: ConversationEncoder
    look: Any

    def see(self, files: Sequence[str]) -> Tensor | None:
        """(N, Q, D) of some pictures, encoded once; None of none.

        Raises:
            UserError: a file that is no picture.
        """
        if not files:
            return None
        weight = next(self.model.parameters())
        pixels = self.look([_picture(Path(file).expanduser()) for file in files], torch.zeros(len(files)).long(), 0)
        with torch.inference_mode():
            return self.model.see(pixels["image"].to(weight.device, weight.dtype))

    def answer(
        self, messages: Sequence[Message], visual: Tensor | None, *, max_new_tokens: int, sampling: Sampling
    ) -> Iterator[str]:
        """The answer to the last message, piece by piece.

        Raises:
            UserError: other numbers of markers than pictures, or more than the context holds.
        """
        ids, end = self.encode.prompt(messages), self.encode.end
        words = Words(self.encode.tokenizer, [])
        limits: dict[str, Any] = {"max_new_tokens": max_new_tokens, "sampling": sampling, "eos": end}
        for token in stream_seen(self.model, [ids], visual, **limits):
            if int(token[0]) == end:
                break
            yield words.push(int(token[0]))
        yield words.rest()


def run(cfg: DictConfig) -> None:
    """Write answers to the terminal as they come; with a prompt one, else one to each line that is typed.

    Raises:
        UserError: no such run, one that does not see and speak, a picture that cannot be read, or a prompt without its
            picture.
    """
    if cfg.precision not in PRECISIONS:
        raise UserError(f"precision={cfg.precision}: choose one of {', '.join(PRECISIONS)}")
    device = device_named(str(cfg.device))
    partner = _partner(str(cfg.ckpt), list(cfg.trust), cfg.system)
    partner.model.to(device, PRECISIONS[cfg.precision]).eval()
    sampling = Sampling(
        temperature=cfg.temperature,
        top_k=cfg.top_k,
        top_p=cfg.top_p,
        repetition_penalty=cfg.repetition_penalty,
        seed=cfg.seed,
    )
    files = [str(file) for file in cfg.image]
    visual = partner.see(files)
    marker, messages = partner.encode.marker, list[Message]()
    for asked in [str(cfg.prompt)] if cfg.prompt is not None else _lines():
        if asked.startswith(_CHANGE):
            files, messages = [asked.removeprefix(_CHANGE).strip()], []
            visual = partner.see(files)
            continue
        if not messages and marker not in asked:
            asked = f"{marker}\n" * len(files) + asked
        _require(asked, marker, 0 if messages else len(files))
        messages.append({"role": "user", "content": asked})
        said, begin, count = "", time.perf_counter(), 0
        for piece in partner.answer(messages, visual, max_new_tokens=cfg.max_new_tokens, sampling=sampling):
            print(piece, end="", flush=True)
            said, count = said + piece, count + 1
        print(flush=True)
        seconds = time.perf_counter() - begin
        print(f"{count - 1} tokens, {(count - 1) / seconds:,.1f} tokens/s", file=sys.stderr)
        messages.append({"role": "assistant", "content": said.strip()})


def _lines() -> Iterator[str]:
    """What is typed, until an empty line or the end."""
    print(f"ask about the picture; {_CHANGE}FILE shows another one, an empty line ends", file=sys.stderr)
    while True:
        try:
            line = input(_ASK if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if not line:
            return
        yield line


def _require(asked: str, marker: str, pictures: int) -> None:
    if (count := asked.count(marker)) != pictures:
        raise UserError(
            f"the prompt mentions {count} pictures ({marker}), and there are {pictures}: give image=<file> for each, "
            f"or leave {marker} out"
        )


def _picture(file: Path) -> Tensor:
    if not file.is_file():
        raise UserError(f"image={file} does not exist: give a picture")
    try:
        return decode(file.read_bytes())
    except Unreadable as reason:
        raise UserError(f"image={file} cannot be read: {reason}") from None


def _partner(spec: str, trust: list[str], system: str | None) -> Partner:
    """Of a run folder or a checkpoint in one. The averaged weights count where there are such."""
    path = Path(spec).expanduser()
    folder = run_folder(path) if path.exists() else None
    if folder is None:
        raise UserError(f"ckpt={spec} is no run folder, and no checkpoint in one: give a run with method=llava")
    config = load_config(folder, trust)
    encode = OmegaConf.select(OmegaConf.create(config), "data.train.encode")
    if encode is None or OmegaConf.select(OmegaConf.create(config), "method.model.vision") is None:
        raise UserError(f"ckpt={spec} is a run that sees no pictures in a text: give one with method=llava")
    method, base = rebuild(config)
    fill(method, base, newest(path, f"ckpt={spec}"))
    encoder = ConversationEncoder(
        tokenizers.load(folder),
        max_length=int(encode.max_length),
        template=encode.template,
        system=encode.system if system is None else system,
    )
    network: Any = method.model
    return Partner(fuse_(network), encoder, build(OmegaConf.create(config["data"]["eval_views"]["image"])))
