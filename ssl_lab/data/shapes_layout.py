"""What is drawn in a scene of the shapes world: every choice comes from (seed, index) and from nothing else."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ssl_lab.rng import fold, uniform

SHAPES = ["circle", "square", "triangle", "star", "cross", "ring", "heart", "moon"]
COLORS = {
    "red": (0.85, 0.12, 0.12),
    "green": (0.12, 0.62, 0.18),
    "blue": (0.12, 0.25, 0.85),
    "yellow": (0.95, 0.85, 0.12),
    "purple": (0.50, 0.15, 0.68),
    "orange": (0.95, 0.52, 0.08),
    "cyan": (0.15, 0.78, 0.82),
    "pink": (0.96, 0.52, 0.72),
}
TEXTURES = ["plain", "striped", "dotted", "checkered"]
BACKGROUNDS = ["gradient", "noisy", "striped"]
NUM_OBJECTS = 4  # object 0 is the main one, the others are distractors
GRID = 6  # side of the coarse random field of a noisy background
_PLACES = 8  # places that are drawn for a distractor; the freest is taken


@dataclass(slots=True)
class Layout:
    """N scenes of O = 4 objects. Lengths are fractions of the image side, colours 0..1, angles radians.

    `shape`, `color`, `texture` (N, O) int64 number SHAPES, COLORS, TEXTURES; `present` (N, O) bool; `center`
    (N, O, 2) x, y; `radius`, `angle`, `period`, `phase` (N, O); `rgb`, `tone` (N, O, 3) the two colours of a texture.
    `ground` (N,) int64 numbers BACKGROUNDS; `ground_rgb` (N, 2, 3); `ground_wave` (N, 3) angle, stripes, phase;
    `field` (N, GRID, GRID); `light` (N, 3) angle, strength, brightness; `noise` (N, 3, S, S).
    """

    shape: Tensor
    color: Tensor
    texture: Tensor
    present: Tensor
    center: Tensor
    radius: Tensor
    angle: Tensor
    period: Tensor
    phase: Tensor
    rgb: Tensor
    tone: Tensor
    ground: Tensor
    ground_rgb: Tensor
    ground_wave: Tensor
    field: Tensor
    light: Tensor
    noise: Tensor


class _Draws:
    """Hands out columns of (N, D) uniform draws, left to right."""

    def __init__(self, u: Tensor):
        self.u, self.used = u, 0

    def __call__(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        count = torch.Size(shape).numel()
        part = self.u[:, self.used : self.used + count].reshape(-1, *shape)
        self.used += count
        return part * (high - low) + low

    def choice(self, options: int, *shape: int) -> Tensor:
        return (self(*shape) * options).long().clamp_(max=options - 1)  # a draw may round up to one


def layout(seed: int, index: Tensor, image_size: int) -> Layout:
    """(N,) int64 indices -> the scenes' contents. The shape is independent of everything else."""
    draw = _Draws(uniform(seed, index, 256).float())
    n, others, palette = len(index), NUM_OBJECTS - 1, torch.tensor(list(COLORS.values()))

    shape, texture = draw.choice(len(SHAPES), NUM_OBJECTS), draw.choice(len(TEXTURES), NUM_OBJECTS)
    radius = torch.cat([draw(1, low=0.25, high=0.38), draw(others, low=0.07, high=0.1)], 1)
    angle = draw(NUM_OBJECTS, low=-0.35, high=0.35)  # upright enough for a heart to be one
    period, phase = draw(NUM_OBJECTS, low=0.13, high=0.2), draw(NUM_OBJECTS, high=2 * torch.pi)
    center, present = _place(draw, radius)

    # Backgrounds and distractors keep away from the colours that they must be told from.
    main = draw.choice(len(COLORS), 1)
    grounds = draw(4, 3)
    order = (grounds - palette[main]).norm(dim=2).argsort(1, descending=True)
    grounds = grounds.gather(1, order[:, :2, None].expand(-1, -1, 3))
    ground_rgb = torch.stack([grounds[:, 0], (grounds[:, 0] + grounds[:, 1]) / 2], 1)
    offered = draw.choice(len(COLORS), others, 3)
    far = (palette[offered] - ground_rgb.mean(1)[:, None, None]).norm(dim=3).argmax(2, keepdim=True)
    color = torch.cat([main, offered.gather(2, far)[:, :, 0]], 1)

    rgb = (palette[color] + draw(NUM_OBJECTS, 3, low=-0.07, high=0.07)).clamp(0, 1)
    dark = draw(NUM_OBJECTS, 1) < 0.5
    tone = torch.where(dark, rgb * 0.65, rgb * 0.6 + 0.4)
    ground = draw.choice(len(BACKGROUNDS), 1)[:, 0]
    ground_wave = torch.cat([draw(1, high=2 * torch.pi), draw(1, low=2, high=6), draw(1, high=2 * torch.pi)], 1)
    field = draw(GRID, GRID)
    light = torch.cat([draw(1, high=2 * torch.pi), draw(1, high=1.0), draw(1, low=0.5, high=1.1)], 1)
    level = draw(1, high=0.05)[:, :, None, None]
    pixels = uniform(fold(seed, 1), index, 3 * image_size**2).float().reshape(n, 3, image_size, image_size)
    noise = pixels.mul_(2).sub_(1).mul_(level)
    return Layout(
        shape, color, texture, present, center, radius, angle, period, phase,
        rgb, tone, ground, ground_rgb, ground_wave, field, light, noise,
    )  # fmt: skip


def _place(draw: _Draws, radius: Tensor) -> tuple[Tensor, Tensor]:
    """(N, O) radii -> (N, O, 2) centres within the frame, and (N, O) bool: the object finds room and is wanted."""
    n = len(radius)
    center = radius[:, :1, None] + draw(1, 2) * (1 - 2 * radius[:, :1, None])
    present = torch.ones(n, 1, dtype=torch.bool)
    for i in range(1, NUM_OBJECTS):
        own = radius[:, i, None, None]
        places = own + draw(_PLACES, 2) * (1 - 2 * own)  # (N, K, 2)
        gap = (places[:, :, None] - center[:, None]).norm(dim=3) - radius[:, None, :i] - own
        gap = gap.masked_fill(~present[:, None], 1.0).amin(2)  # to the nearest object that is there
        best = gap.argmax(1, keepdim=True)
        room = gap.gather(1, best) > -0.01
        center = torch.cat([center, places.gather(1, best[:, :, None].expand(-1, -1, 2))], 1)
        present = torch.cat([present, room & (draw(1) < 0.5)], 1)
    return center, present
