"""The method of a run, with the architecture of the weights that it starts from, and the name of its beginning."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf, open_dict

from ssl_lab.cli.compose import build
from ssl_lab.cli.saved import run_folder
from ssl_lab.cli.tuned import starts
from ssl_lab.data import tokenizer
from ssl_lab.data.conversation_tokenizer import marker_of, spoken
from ssl_lab.data.module import DataModule
from ssl_lab.errors import UserError
from ssl_lab.methods.base import Method
from ssl_lab.weights import io


def build_method(node: DictConfig, seed: int, say: Callable[[str], None]) -> Method:
    """The method with random weights of `seed`; what its encoder's `weights` decide is entered into `node`.

    Raises:
        UserError: weights that no ViT of ours can take, or a method that cannot take such an encoder.
    """
    for _ in range(3):  # each of two towers may have weights of its own
        torch.manual_seed(seed)
        try:
            return build(node)
        except InstantiationException as error:
            other = _cause(error)
            told = None if other is None else _adopt_towers(node, other) or _adopt(node, other)
            if told is None:
                raise
            say(told)
    torch.manual_seed(seed)
    return build(node)


def decided_by_data(node: Any, data: DataModule) -> None:
    """Fill in place what a method's configuration leaves to the data.

    `num_classes: 0`, `vocab_size: 0` anywhere, `start_token: -1`, padding where there is such a token, as in T5, and
    `end_token: -1`, none where there is none.

    Raises:
        UserError: a vocabulary is asked for, but the data are no text.
    """
    if node.get("num_classes") == 0:
        node["num_classes"] = len(data.classes)
    for part in _nodes(node):
        if part.get("vocab_size") != 0:
            continue
        size = getattr(data.views, "vocab_size", None) if data.tokenizer is None else spoken(data.tokenizer)
        if size is None:
            raise UserError("this method reads text, and the data are none: choose e.g. data=captions or data=text")
        part["vocab_size"] = size
    for part in _nodes(node):
        if part.get("image_token") == -1:
            if data.tokenizer is None:
                raise UserError("this method reads images in a text: choose e.g. data=shapes_questions")
            part["image_token"] = marker_of(data.tokenizer)
    if node.get("start_token") == -1 and data.tokenizer is not None:
        node["start_token"] = start_of(data.tokenizer)
    if node.get("end_token") == -1:
        node["end_token"] = None if data.tokenizer is None else data.tokenizer.eos


def start_of(words: tokenizer.Tokenizer) -> int:
    """What a decoder beside an encoder reads first, where nobody says it."""
    return next((x for x in (words.pad, words.bos, words.eos) if x is not None), 0)


def require_tokenizer(node: Any, data: DataModule) -> None:
    """Weights that begin something that reads text come with a tokenizer, and the data must have the same.

    Two vocabularies of one size would pass unnoticed: every word would mean another.

    Raises:
        UserError: the data's tokenizer is another one.
    """
    if data.tokenizer is None:
        return
    for part in _nodes(node):
        reads_text = any("vocab_size" in below for below in _nodes(part))
        weights = part.get("weights")
        if not reads_text or not isinstance(weights, str) or (folder := _tokenizer_beside(weights)) is None:
            continue
        if _words(tokenizer.load(folder)) != _words(data.tokenizer):
            raise UserError(
                f"{weights} knows the words of its own tokenizer, and data.tokenizer is another: set "
                f"data.tokenizer={folder}"
            )


def require_same_words(run: Path, data: DataModule) -> None:
    """The data must still give the tokenizer that the run in a folder was trained with.

    Raises:
        UserError: they give another one.
    """
    if data.tokenizer is None or not (run / "tokenizer.json").is_file():
        return
    if _words(tokenizer.load(run)) != _words(data.tokenizer):
        raise UserError(
            f"{run} was trained with another tokenizer than these data give: every token would mean another word; put "
            f"the text back as it was, or go on in another out= with ckpt={run} data.tokenizer={run}"
        )


def _words(known: tokenizer.Tokenizer) -> dict[str, int]:
    """The vocabulary but for a marker of images, which may be added to any."""
    marker = known.config.get("image_token")
    return {name: i for name, i in known.backend.get_vocab().items() if name != marker}


def _tokenizer_beside(weights: str) -> Path | None:
    path = Path(weights.removeprefix("hf:").removeprefix("open_clip:")).expanduser()
    folders = (path, run_folder(path) if path.exists() else None)
    return next((x for x in folders if x is not None and (x / "tokenizer.json").is_file()), None)


def _nodes(node: Any) -> Iterator[Any]:
    """A node and all nodes below it."""
    yield node
    for value in node.values():
        if hasattr(value, "values"):
            yield from _nodes(value)


def beginning(node: DictConfig) -> str:
    """What a method that has not been trained yet is called: the weights that it starts from, or `random encoder`."""
    return ", ".join(dict.fromkeys(starts(node))) or "random encoder"


def _cause(error: BaseException | None) -> io.OtherArchitecture | None:
    while error is not None and not isinstance(error, io.OtherArchitecture):
        error = error.__cause__
    return error


def _adopt(node: DictConfig, other: io.OtherArchitecture) -> str | None:
    """Enter what the weights of a backbone decide where they are asked for, and tell it.

    None where there is no such place, or the data decide (channels).
    """
    arguments = other.arguments
    block = arguments.get("block", {})
    for place, part in _parts(node):
        if not str(other).startswith(f"{part.get('weights')} does not fit"):
            continue
        if "in_chans" in arguments:
            return None
        whole = "_target_" in block  # a language model's recipe; of a ViT's, what differs
        if block and not whole and not isinstance(part.get("block"), DictConfig):
            return None
        with open_dict(node):
            for name, value in arguments.items():
                if name != "block":
                    part[name] = value
            if whole:
                part.block = block
            else:
                for name, value in block.items():
                    part.block[name] = value
        facts = arguments if whole else io.flat(arguments)
        told = (_told(name.removeprefix("block."), value) for name, value in facts.items())
        return f"{place}: {', '.join(told)}, as in {part.weights}"
    return None


def _parts(node: DictConfig, place: str = "") -> Iterator[tuple[str, DictConfig]]:
    """Every part of a method that begins from weights, and where it is."""
    for name, value in node.items():
        if isinstance(value, DictConfig):
            below = ".".join(filter(None, (place, str(name))))
            if isinstance(value.get("weights"), str):
                yield below, value
            yield from _parts(value, below)


def _adopt_towers(node: DictConfig, other: io.OtherArchitecture) -> str | None:
    """The same for the weights of several towers."""
    places = [f"{name}.backbone" for name in other.arguments]
    if not places or any(OmegaConf.select(node, place) is None for place in places):
        return None
    with open_dict(node):
        node.merge_with(other.arguments)
    return f"towers: as in {node.weights}"


def _told(name: str, value: Any) -> str:
    if name == "layer_scale" and value is not None:
        return name  # how much, the weights say
    if isinstance(value, dict) and "_target_" in value:
        value = value["_target_"].rpartition(".")[2]
    if isinstance(value, float):
        value = f"{value:.3g}"
    word = "yes" if isinstance(value, dict) or value is True else "no" if value in (None, False) else str(value)
    return f"{name} {word}"
