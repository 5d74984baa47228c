"""The shapes world with captions, and combinations of shape and colour that training never shows."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import fields
from functools import cached_property, lru_cache
from typing import Literal

import torch
from torch import Tensor

from ssl_lab.data.pairs_text import Captioned, CaptionEncoder
from ssl_lab.data.shapes_layout import COLORS, SHAPES, Layout, layout
from ssl_lab.data.shapes_render import render
from ssl_lab.data.shapes_words import Scene, describe
from ssl_lab.data.source import Samples
from ssl_lab.data.tokenizer import Tokenizer
from ssl_lab.errors import UserError
from ssl_lab.rng import fold

log = logging.getLogger(__name__)

_CHUNK = 128  # scenes rendered at once
_NAMES = [f"{color} {shape}" for shape in SHAPES for color in COLORS]
HELD_OUT = [s * len(COLORS) + c for s in range(len(SHAPES)) for c in range(len(COLORS)) if (s + c) % 4 == 0]

Target = Literal["combination", "shape", "color"]


class ShapesPairs:
    """Generated scenes with three to six captions each; a class is what the large object is.

    16 of the 64 combinations of shape and colour are held out, two of each shape and two of each colour: no object of a
    training scene, large or small, is of such a kind, so that no training caption names one. Test scenes have all 64.

    Args:
        split: train or test.
        length: scenes; a longer set begins with the shorter one.
        tokenizer: of the captions, or its path; None = images only.
        image_size: side in pixels.
        seed: of the world.
        target: the class: combination ("red star", 64 of them), shape or color (8 each).
        context_length: tokens of a caption, begin and end included; longer ones are cut.
        fixed: pad to `context_length`, not to the longest of a batch.
    """

    unit = "images"
    templates = ("a large {}", "there is a big {} in the picture")  # as the captions speak

    def __init__(
        self,
        split: Literal["train", "test"],
        length: int,
        tokenizer: Tokenizer | str | None = None,
        *,
        image_size: int = 32,
        seed: int = 0,
        target: Target = "combination",
        context_length: int = 32,
        fixed: bool = True,
    ):
        if split not in ("train", "test"):
            raise UserError(f"shapes has no split {split!r}: take train or test")
        if length < 1:
            raise UserError(f"{length} scenes are no data set: set length to at least 1")
        names = {"combination": _NAMES, "shape": SHAPES, "color": list(COLORS)}
        if target not in names:
            raise UserError(f"target={target}: take one of {', '.join(names)}")
        self.classes, self.target = list(names[target]), target
        self.held_out = list(HELD_OUT) if target == "combination" else []
        self.length, self.image_size, self._split = length, image_size, split
        self._seed = _world(seed, split)
        self.encode = None if tokenizer is None else CaptionEncoder(tokenizer, context_length, fixed=fixed)
        if self.encode is not None:
            some = captions(self._seed, _scenes(self._seed, split, min(length, 500)))
            self.encode.report([x for one in some for x in one], length if length > 500 else 0, "shapes_captions")

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Of the captions."""
        return None if self.encode is None else self.encode.tokenizer

    def __len__(self) -> int:
        return self.length

    def read(self, rows: Sequence[int]) -> Samples:
        """Images (B, 3, S, S) uint8 with all their captions, rendered on first use and kept in memory."""
        index = torch.tensor(rows)
        images, targets = self._all
        data = images[index]
        return Samples(
            data if self.encode is None else Captioned(data, self.captions(rows), self.encode), targets[index], index
        )

    def captions(self, rows: Sequence[int]) -> list[list[str]]:
        """All captions of each of these rows."""
        return [self._captions[row] for row in rows]

    def questions(self, rows: Sequence[int]) -> list[list[tuple[str, str]]]:
        """All questions about each of these scenes, with their answers."""
        index = _scenes(self._seed, self._split, self.length)[list(rows)]
        return [scene.questions for scene in _described(self._seed, index)]

    @cached_property
    def _captions(self) -> list[list[str]]:
        return captions(self._seed, _scenes(self._seed, self._split, self.length))

    @cached_property
    def _all(self) -> tuple[Tensor, Tensor]:
        images = torch.empty(self.length, 3, self.image_size, self.image_size, dtype=torch.uint8)
        targets = torch.empty(self.length, dtype=torch.int64)
        log.info("rendering %s scenes of %d x %d", f"{self.length:,}", self.image_size, self.image_size)
        start = 0
        for index in _scenes(self._seed, self._split, self.length).split(_CHUNK):
            parts, to = layout(self._seed, index, self.image_size), slice(start, start + len(index))
            shape, color = parts.shape[:, 0], parts.color[:, 0]
            kinds = {"combination": shape * len(COLORS) + color, "shape": shape, "color": color}
            images[to], targets[to] = render(parts), kinds[self.target]
            start += len(index)
        if self.encode is not None:
            _ = self._captions  # made here, before workers begin
        return images, targets


def train_captions(length: int, seed: int = 0) -> list[str]:
    """All captions of the first `length` training scenes, to train a tokenizer on."""
    world = _world(seed, "train")
    return [text for one in captions(world, _scenes(world, "train", length)) for text in one]


def captions(seed: int, index: Tensor) -> list[list[str]]:
    """Captions of the scenes `index` (N,) int64 of a world."""
    return [scene.captions for scene in _described(seed, index)]


def _described(seed: int, index: Tensor) -> Iterator[Scene]:
    for part in index.split(_CHUNK):
        scenes = layout(seed, part, 1)  # pictures of one pixel: only their words are used
        columns = {f.name: getattr(scenes, f.name) for f in fields(Layout)}
        for i in range(len(part)):
            one = Layout(**{name: values[i : i + 1] for name, values in columns.items()})
            yield describe(one.noise[0], one)


def _world(seed: int, split: str) -> int:
    return fold(seed, 0xCA975, split == "test")


@lru_cache(maxsize=4)
def _scenes(seed: int, split: str, length: int) -> Tensor:
    """(length,) int64: the scenes of a split, in training those without a held-out object."""
    if split == "test":
        return torch.arange(length)
    never = torch.zeros(len(_NAMES), dtype=torch.bool)
    never[HELD_OUT] = True
    found: list[Tensor] = []
    start = 0
    while sum(map(len, found)) < length:
        index = torch.arange(start, start + 1024)
        scenes = layout(seed, index, 1)
        bad = never[scenes.shape * len(COLORS) + scenes.color] & scenes.present
        found.append(index[~bad.any(1)])
        start += 1024
    return torch.cat(found)[:length]
