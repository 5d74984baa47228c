"""A run of a model that sees and speaks, with all that a conversation with it needs: `chat`, `demo` and `export`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from ssl_lab.analysis.looked import looked
from ssl_lab.backbones.vlm import VisionLanguage
from ssl_lab.cli.compose import build
from ssl_lab.cli.generate import PRECISIONS, device_named
from ssl_lab.cli.saved import load_config, run_folder
from ssl_lab.cli.tuned import fill, newest, rebuild
from ssl_lab.data import tokenizer as tokenizers
from ssl_lab.data.audio_decode import decode_audio
from ssl_lab.data.conversation_sound import SoundViews
from ssl_lab.data.conversation_text import ConversationEncoder, Message
from ssl_lab.data.decode import Unreadable, decode
from ssl_lab.errors import UserError
from ssl_lab.generation.sampling import Sampling
from ssl_lab.generation.seeing import stream_seen
from ssl_lab.generation.words import Words
from ssl_lab.nn.lora import fuse_


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

    def see(self, pictures: Sequence[Tensor]) -> Tensor | None:
        """(N, Q, D) of some pictures (3, Hi, Wi) uint8, encoded once; None of none."""
        if not pictures:
            return None
        weight = next(self.model.parameters())
        pixels = self.look(list(pictures), torch.zeros(len(pictures)).long(), 0)
        with torch.inference_mode():
            return self.model.see(pixels["image"].to(weight.device, weight.dtype))


@dataclass
class Conversation:
    """Questions and answers about some pictures.

    Attributes:
        partner: who answers.
        sampling: how its words are chosen.
        max_new_tokens: of an answer.
        pictures: (3, Hi, Wi) uint8 each; or clips (Si,) float32, of a model that listens.
        visual: what the model sees of them, (N, Q, D).
        messages: what was said so far.
    """

    partner: Partner
    sampling: Sampling
    max_new_tokens: int
    pictures: list[Tensor] = field(default_factory=list)
    visual: Tensor | None = None
    messages: list[Message] = field(default_factory=list)
    _said: tuple[list[int], list[int]] | None = None  # ids of the last prompt and answer

    def show(self, files: Sequence[str]) -> None:
        """Begin anew with other pictures.

        Raises:
            UserError: a file that is no picture, or no sound.
        """
        self.pictures = [_open(Path(file).expanduser(), self.partner.look) for file in files]
        self.visual, self.messages, self._said = self.partner.see(self.pictures), [], None

    def ask(self, asked: str) -> Iterator[str]:
        """The answer, piece by piece; markers that the first question lacks are put before it, and may be all of it.

        Raises:
            UserError: other numbers of markers than pictures, or more than the context holds.
        """
        encode = self.partner.encode
        if not self.messages and encode.marker not in asked:
            asked = "\n".join([encode.marker] * len(self.pictures) + [asked] * bool(asked))  # as the data have it
        _require(asked, encode.marker, 0 if self.messages else len(self.pictures))
        messages: list[Message] = [*self.messages, {"role": "user", "content": asked}]
        ids, words, answer = encode.prompt(messages), Words(encode.tokenizer, []), list[int]()
        self._said, said = (ids, answer), ""
        limits: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "sampling": self.sampling, "eos": encode.end}
        for token in stream_seen(self.partner.model, [ids], self.visual, **limits):
            answer.append(int(token[0]))
            if answer[-1] == encode.end:
                break
            yield (piece := words.push(answer[-1]))
            said += piece
        yield (rest := words.rest())
        self.messages = [*messages, {"role": "assistant", "content": (said + rest).strip()}]

    def looked(self) -> Tensor:
        """Where the last answer looked: (N, rows, columns) of the pictures, see `ssl_lab.analysis.looked`.

        Raises:
            UserError: no picture, nothing said yet, or a model that has no such map.
        """
        if self.visual is None or self._said is None:
            raise UserError("nothing was asked about a picture yet")
        prompt, answer = self._said
        tokens = torch.tensor([prompt + answer], device=self.visual.device)
        return looked(self.partner.model, tokens, self.visual, len(prompt))


def conversation(cfg: DictConfig) -> Conversation:
    """With the run that `ckpt` names, and what `precision`, `device` and the settings of the sampling ask for.

    Raises:
        UserError: an unknown precision, no such run, or one that does not see and speak.
    """
    if cfg.precision not in PRECISIONS:
        raise UserError(f"precision={cfg.precision}: choose one of {', '.join(PRECISIONS)}")
    device = device_named(str(cfg.device))
    found = _partner(str(cfg.ckpt), list(cfg.trust), cfg.system)
    found.model.to(device, PRECISIONS[cfg.precision]).eval()
    sampling = Sampling(
        temperature=cfg.temperature,
        top_k=cfg.top_k,
        top_p=cfg.top_p,
        repetition_penalty=cfg.repetition_penalty,
        seed=cfg.seed,
    )
    return Conversation(found, sampling, int(cfg.max_new_tokens))


def talk(config: dict[str, Any], folder: Path, system: str | None = None) -> tuple[ConversationEncoder, Any]:
    """How a run lays out conversations and sees pictures; `system` instead of what was said beforehand in training.

    Raises:
        UserError: it sees no pictures in a text.
    """
    encode = OmegaConf.select(OmegaConf.create(config), "data.train.encode")
    if encode is None or OmegaConf.select(OmegaConf.create(config), "method.model.vision") is None:
        raise UserError(f"ckpt={folder} is a run that sees no pictures in a text: give one with method=llava")
    encoder = ConversationEncoder(
        tokenizers.load(folder),
        max_length=int(encode.max_length),
        template=encode.template,
        system=encode.system if system is None else system,
    )
    return encoder, build(OmegaConf.create(config["data"]["eval_views"]["image"]))


def require_marker(model: Any, encode: ConversationEncoder, folder: Path) -> None:
    """Refuse a tokenizer that came into the run folder later: its ids are not those that the model knows."""
    if model.image_token != encode.image:
        raise UserError(
            f"{folder}/tokenizer.json has {encode.marker} as token {encode.image}, the model was trained with "
            f"{model.image_token}: put back the tokenizer of the run"
        )


def _require(asked: str, marker: str, pictures: int) -> None:
    if (count := asked.count(marker)) != pictures:
        raise UserError(
            f"the prompt mentions {count} pictures ({marker}), and there are {pictures}: give image=<file> for each, "
            f"or leave {marker} out"
        )


def _open(file: Path, look: Any) -> Tensor:
    """A picture (3, H, W) uint8, or for a model that listens a clip (S,) float32."""
    hears = isinstance(look, SoundViews)
    if not file.is_file():
        raise UserError(f"image={file} does not exist: give a {'recording' if hears else 'picture'}")
    try:
        return decode_audio(file, look.whole.sampling_rate) if hears else decode(file.read_bytes())
    except Unreadable as reason:
        raise UserError(f"image={file} cannot be read: {reason}") from None


def _partner(spec: str, trust: list[str], system: str | None) -> Partner:
    """Of a run folder or a checkpoint in one. The averaged weights count where there are such."""
    path = Path(spec).expanduser()
    folder = run_folder(path) if path.exists() else None
    if folder is None:
        raise UserError(f"ckpt={spec} is no run folder, and no checkpoint in one: give a run with method=llava")
    config = load_config(folder, trust)
    encode, look = talk(config, folder, system)
    method, base = rebuild(config)
    fill(method, base, newest(path, f"ckpt={spec}"))
    network: Any = method.model
    require_marker(network, encode, folder)
    return Partner(fuse_(network), encode, look)
