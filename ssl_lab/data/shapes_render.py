"""Draws scenes of the shapes world, many at once."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_lab.data.shapes_layout import BACKGROUNDS, NUM_OBJECTS, SHAPES, TEXTURES, Layout

_SUPERSAMPLE = 3  # points per pixel and axis that decide how much of the pixel a shape covers


def render(scene: Layout) -> Tensor:
    """N scenes -> (N, 3, S, S) uint8; S is the side of `scene.noise`."""
    size = scene.noise.shape[-1]
    image = _ground(scene, size)
    cover = _cover(scene, size)
    for i in reversed(range(NUM_OBJECTS)):  # the main object last, on top
        u, v = _axes(scene.center[:, i], scene.angle[:, i], size)
        pattern = _pattern(scene.texture[:, i], u, v, scene.period[:, i], scene.phase[:, i])[:, None]
        rgb, tone = scene.rgb[:, i, :, None, None], scene.tone[:, i, :, None, None]
        image = torch.lerp(image, torch.lerp(rgb, tone, pattern), cover[:, i, None])
    angle, strength, brightness = (x[:, None, None] for x in scene.light.unbind(1))
    x, _ = _axes(torch.full((len(image), 2), 0.5), angle[:, 0, 0], size)
    image = image * (brightness * (1 + strength * x))[:, None] + scene.noise
    return (image * 255).round_().clamp_(0, 255).to(torch.uint8)


def _axes(center: Tensor, angle: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """(N, 2) centres, (N,) angles -> the turned coordinates of the pixels, each (N, S, S), in image sides; v is up."""
    p = (torch.arange(size) + 0.5) / size
    x, y = p - center[:, :1], center[:, 1:] - p  # (N, S) each; rows run down
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    u = (cos * x)[:, None, :] + (sin * y)[:, :, None]
    v = (cos * y)[:, :, None] - (sin * x)[:, None, :]
    return u, v


def _cover(scene: Layout, size: int) -> Tensor:
    """(N, O, S, S): the share of each pixel that lies inside each object."""
    n = len(scene.shape)
    cover = torch.zeros(n * NUM_OBJECTS, size, size)
    shape, present = scene.shape.flatten(), scene.present.flatten()
    center, angle, radius = scene.center.flatten(0, 1), scene.angle.flatten(), scene.radius.flatten()
    for number in set(shape[present].tolist()):
        here = ((shape == number) & present).nonzero()[:, 0]
        u, v = _axes(center[here], angle[here], size * _SUPERSAMPLE)
        r = radius[here, None, None]
        cover[here] = F.avg_pool2d(_inside(SHAPES[number], u.div_(r), v.div_(r)).float(), _SUPERSAMPLE)
    return cover.reshape(n, NUM_OBJECTS, size, size)


def _inside(shape: str, u: Tensor, v: Tensor) -> Tensor:
    """Whether points lie in the shape of about unit radius around the origin."""
    if shape == "circle":
        return u * u + v * v < 0.9
    if shape == "ring":
        square = u * u + v * v
        return (square < 1) & (square > 0.3)
    if shape == "moon":
        return (u * u + v * v < 1) & ((u - 0.5) ** 2 + v * v > 0.6)
    if shape == "square":
        return torch.maximum(u.abs(), v.abs()) < 0.8
    if shape == "cross":
        a, b = u.abs(), v.abs()
        return (torch.minimum(a, b) < 0.3) & (torch.maximum(a, b) < 1)
    if shape == "triangle":
        return (v > -0.55) & (3**0.5 * u.abs() + v < 1.1)
    if shape == "heart":
        x, y = 1.2 * u, 1.2 * v + 0.1
        return (x * x + y * y - 1) ** 3 < x * x * y**3
    # A point is in a five-pointed star if it is on the inner side of at least four of the five lines that bound it.
    turns = torch.arange(5) * (2 * torch.pi / 5) - torch.pi / 2
    sides = sum((u * c + v * s < 0.37).to(torch.int8) for c, s in zip(turns.cos(), turns.sin(), strict=True))
    return torch.as_tensor(sides >= 4)


def _pattern(texture: Tensor, u: Tensor, v: Tensor, period: Tensor, phase: Tensor) -> Tensor:
    """(N,) texture numbers and (N, S, S) coordinates -> (N, S, S) in 0..1: how much of the second colour."""
    k, phase = (2 * torch.pi / period)[:, None, None], phase[:, None, None]
    a, b = torch.sin(k * u + phase), torch.sin(k * v + phase)
    kind = texture[:, None, None]
    wave = torch.where(kind == TEXTURES.index("striped"), a, a * b)
    wave = torch.where(kind == TEXTURES.index("dotted"), 2 * (a * b) - 0.7, wave)
    return (wave * 2 + 0.5).clamp_(0, 1) * (kind != TEXTURES.index("plain"))


def _ground(scene: Layout, size: int) -> Tensor:
    """(N, 3, S, S) backgrounds."""
    angle, stripes, phase = scene.ground_wave.unbind(1)
    u, _ = _axes(torch.full((len(angle), 2), 0.5), angle, size)
    wave = torch.sin(2 * torch.pi * stripes[:, None, None] * u + phase[:, None, None])
    field = F.interpolate(scene.field[:, None], size=(size, size), mode="bicubic", align_corners=False)[:, 0]
    kind = scene.ground[:, None, None]
    mix = torch.where(kind == BACKGROUNDS.index("gradient"), u + 0.5, wave * 1.5 + 0.5)
    mix = torch.where(kind == BACKGROUNDS.index("noisy"), field * 2 - 0.5, mix).clamp_(0, 1)
    first, second = scene.ground_rgb[:, :, :, None, None].unbind(1)
    return torch.lerp(first, second, mix[:, None])
