"""The embedded world: scenes of shapes, generated from their index, so that everything can be tried without a download.

A scene has one large object on a background, up to three small distractors, lighting and noise. The target is the
shape of the large object; colour, texture, size, turn, place and background are independent of it, so that a linear map
of raw pixels hardly does better than chance. The same scene comes with captions and questions.
"""

import logging
from collections.abc import Sequence
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from ssl_lab.data.shapes_layout import SHAPES, layout
from ssl_lab.data.shapes_render import render
from ssl_lab.data.shapes_words import Scene, describe
from ssl_lab.data.source import Samples
from ssl_lab.errors import UserError
from ssl_lab.rng import fold

log = logging.getLogger(__name__)

_CHUNK = 128  # scenes rendered at once: their intermediate values stay in the cache of the processor


class Shapes:
    """`length` scenes of one split, rendered on first use and kept in memory (3 * image_size^2 bytes each).

    A scene depends on (seed, split, index) and `image_size` only: a longer set begins with the shorter one.
    """

    unit = "images"

    def __init__(self, split: Literal["train", "test"], length: int, image_size: int = 32, seed: int = 0):
        if split not in ("train", "test"):
            raise UserError(f"shapes has no split {split!r}: take train or test")
        if length < 1:
            raise UserError(f"{length} scenes are no data set: set length to at least 1")
        self.split, self.length, self.image_size = split, length, image_size
        self.classes = list(SHAPES)
        self._seed = fold(seed, 0x5A9E5, split == "test")

    def __len__(self) -> int:
        return self.length

    def read(self, rows: Sequence[int]) -> Samples:
        """Images (B, 3, S, S) uint8 and the shapes of their large objects."""
        index = torch.tensor(rows)
        images, targets = self._all
        return Samples(images[index], targets[index], index)

    def scene(self, index: int) -> Scene:
        """Scene `index` with its attributes, captions and questions."""
        parts = layout(self._seed, torch.tensor([index]), self.image_size)
        return describe(render(parts)[0], parts)

    @cached_property
    def _all(self) -> tuple[Tensor, Tensor]:
        images = torch.empty(self.length, 3, self.image_size, self.image_size, dtype=torch.uint8)
        targets = torch.empty(self.length, dtype=torch.int64)
        log.info("rendering %s scenes of %d x %d", f"{self.length:,}", self.image_size, self.image_size)
        for start in range(0, self.length, _CHUNK):
            index = torch.arange(start, min(start + _CHUNK, self.length))
            parts = layout(self._seed, index, self.image_size)
            images[index], targets[index] = render(parts), parts.shape[:, 0]
        return images, targets
