"""The picture of a sweep: loss over tokens for every size, and loss over FLOPs with the frontier of the law."""

import colorsys
import math
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ssl_lab.bench.scaling_report import Measured, Result

_INK, _FAINT, _BEST = (30, 30, 30), (222, 222, 222), (178, 24, 43)
_WIDE, _HIGH, _LEFT, _TOP, _BELOW = 620, 460, 84, 40, 58  # of a panel and its margins, in pixels of the result
_FINE = 2  # drawn larger and scaled down, for smooth lines
_STEPS = 60  # points of a curve

Colour = tuple[int, int, int]


class _Panel:
    """One pair of logarithmic axes on a sheet."""

    def __init__(self, sheet: Image.Image, left: int, xs: Sequence[float], ys: Sequence[float]) -> None:
        self.draw, self.font = ImageDraw.Draw(sheet), ImageFont.load_default(13 * _FINE)
        self.x0, self.x1 = (left + _LEFT) * _FINE, (left + _WIDE - 16) * _FINE
        self.y0, self.y1 = (_HIGH - _BELOW) * _FINE, _TOP * _FINE
        self.xs, self.ys = _widened(xs), _widened(ys)

    def frame(self, title: str, below: str) -> None:
        for value in _ticks(*self.xs):
            x, _ = self.at(value, self.ys[0])
            self.draw.line((x, self.y0, x, self.y1), fill=_FAINT, width=_FINE)
            self.draw.text((x, self.y0 + 6 * _FINE), _word(value), fill=_INK, font=self.font, anchor="mt")
        for value in _ticks(*self.ys):
            _, y = self.at(self.xs[0], value)
            self.draw.line((self.x0, y, self.x1, y), fill=_FAINT, width=_FINE)
            self.draw.text((self.x0 - 6 * _FINE, y), _word(value), fill=_INK, font=self.font, anchor="rm")
        self.draw.rectangle((self.x0, self.y1, self.x1, self.y0), outline=_INK, width=_FINE)
        middle = (self.x0 + self.x1) / 2
        self.draw.text((middle, self.y1 - 12 * _FINE), title, fill=_INK, font=self.font, anchor="mb")
        self.draw.text((middle, self.y0 + 34 * _FINE), below, fill=_INK, font=self.font, anchor="mt")

    def at(self, x: float, y: float) -> tuple[float, float]:
        (a, b), (c, d) = self.xs, self.ys
        return (
            self.x0 + (self.x1 - self.x0) * math.log(x / a) / math.log(b / a),
            self.y0 + (self.y1 - self.y0) * math.log(y / c) / math.log(d / c),
        )

    def curve(self, points: Sequence[tuple[float, float]], colour: Colour, width: int = 2) -> None:
        inside = [self.at(x, y) for x, y in points if self.ys[0] <= y <= self.ys[1]]
        if len(inside) > 1:
            self.draw.line(inside, fill=colour, width=width * _FINE, joint="curve")

    def dot(self, x: float, y: float, colour: Colour) -> None:
        u, v = self.at(x, y)
        r = 4 * _FINE
        self.draw.ellipse((u - r, v - r, u + r, v + r), fill=colour)

    def say(self, x: float, y: float, text: str, colour: Colour) -> None:
        u, v = self.at(x, y)
        self.draw.text((u - 6 * _FINE, v + 8 * _FINE), text, fill=colour, font=self.font, anchor="rt")


def draw(result: Result) -> Tensor:
    """(3, H, W) uint8. Dots are runs, lines are Chinchilla's law where it could be fitted, else they join the dots."""
    measured = sorted(result.measured, key=lambda m: (m.parameters, m.tokens))
    sizes = sorted({m.parameters for m in measured})
    colours = dict(zip(sizes, _colours(len(sizes)), strict=True))
    fit = next((fit for fit in result.laws.values() if fit.note is None), None)
    best = [b for b in result.best if fit is not None and b.law == next(iter(result.laws))]
    sheet = Image.new("RGB", (2 * _WIDE * _FINE, _HIGH * _FINE), "white")
    losses = [m.loss for m in measured]
    left = _Panel(sheet, 0, [m.tokens for m in measured], losses)
    right = _Panel(sheet, _WIDE, [m.flops for m in measured] + [b.flops for b in best], losses + [b.loss for b in best])
    left.frame(f"{result.name}: loss, one colour for each N", f"D, {result.unit}")
    right.frame("the same runs; red: lowest loss for a budget, and its N", "FLOPs")
    for m in measured:
        left.dot(m.tokens, m.loss, colours[m.parameters])
        right.dot(m.flops, m.loss, colours[m.parameters])
    for n in sizes:
        mine = [m for m in measured if m.parameters == n]
        joined = [(m.tokens, m.loss) for m in mine]
        if fit is not None:
            joined = [(d, fit.law.loss(n, d)) for d in _spaced(*left.xs)]
        left.curve(joined, colours[n])
        _label(left, n, mine, colours[n])
    if fit is not None and best:
        law, work = fit.law, result.work
        frontier = [(c, law.best_parameters(c, work)) for c in _spaced(*right.xs)]
        right.curve([(c, law.loss(n, c / (work * n))) for c, n in frontier], _BEST, 3)
        for b in best:
            right.dot(b.flops, b.loss, _BEST)
            right.say(b.flops, b.loss, _word(b.parameters), _BEST)
    small = sheet.resize((2 * _WIDE, _HIGH), Image.Resampling.LANCZOS)
    pixels = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8)
    return pixels.view(_HIGH, 2 * _WIDE, 3).permute(2, 0, 1)


def _label(panel: _Panel, n: float, runs: Sequence[Measured], colour: Colour) -> None:
    panel.say(runs[-1].tokens, runs[-1].loss, _word(n), colour)


def _colours(count: int) -> list[Colour]:
    """From blue to orange, dark enough for white paper."""
    hues = [0.6 - 0.52 * i / max(1, count - 1) for i in range(count)]
    rows = (colorsys.hls_to_rgb(hue, 0.42, 0.75) for hue in hues)
    return [(round(255 * r), round(255 * g), round(255 * b)) for r, g, b in rows]


def _widened(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = max((high / low) ** 0.08, 1.03)
    return low / room, high * room


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers between the ends: powers of ten and, where those are few, what lies between."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found: list[float] = []
    for marks in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7), tuple(1 + i / 10 for i in range(90))):
        found = [mark * 10.0**e for e in exponents for mark in marks if low <= mark * 10.0**e <= high]
        if len(found) >= 3:
            return found if len(found) <= 8 else found[:: -(-len(found) // 8)]
    return found


def _spaced(low: float, high: float) -> list[float]:
    return [low * (high / low) ** (i / _STEPS) for i in range(_STEPS + 1)]


def _word(value: float) -> str:
    if value < 1000:
        return f"{value:.3g}"
    for sign, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if size <= value < 1000 * size:
            return f"{value / size:.3g}{sign}"
    return f"{value:.0e}"
