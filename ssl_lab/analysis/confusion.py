"""Which classes are taken for which, as a picture."""

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_LIGHT, _RIGHT, _WRONG = (255, 255, 255), (0, 109, 80), (178, 24, 43)  # of none, of all in a row: right, wrong
_INK, _FAINT = (30, 30, 30), (215, 215, 215)
_SHEET, _MOST, _LEAST = 760, 64, 10  # pixels of the matrix at most, of a cell
_SHOWN = 22  # a cell of so many pixels has room for its number
_NAME = 24  # letters of a class that are written


def confusion_counts(predicted: Tensor, target: Tensor, classes: int) -> Tensor:
    """Classes (N,) int64 that were predicted and that were right -> (C, C) int64: row = right one, column = predicted.

    Rows without a class (-1) are left out.
    """
    known = target >= 0
    pairs = target[known] * classes + predicted[known]
    return pairs.bincount(minlength=classes * classes).view(classes, classes)


def confusion_matrix(counts: Tensor, classes: Sequence[str]) -> Tensor:
    """Counts (C, C), row = right class, column = what was said -> a picture (3, H, W) uint8.

    Shades are shares of a row, green on the diagonal and red beside it; numbers are counts where there is room.
    """
    C = len(classes)
    cell = max(_LEAST, min(_MOST, _SHEET // max(1, C)))
    letters = max(9, min(15, cell - 4))
    font = ImageFont.load_default(letters)
    names = [name if len(name) <= _NAME else f"{name[: _NAME - 3]}..." for name in map(str, classes)]
    widest = max((round(font.getlength(name)) for name in names), default=0) + 12
    head, side, label = widest, widest, 26
    sheet = Image.new("RGB", (label + side + C * cell + 12, label + head + C * cell + 12), "white")
    draw, plain = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    left, top = label + side, label + head
    draw.text((left + C * cell / 2, label / 2), "heard as", fill=_INK, font=plain, anchor="mm")
    _turned(sheet, "said", (0, top + C * cell // 2), plain, middle=True)
    rows = counts.double().cpu()
    shares = rows / rows.sum(1, keepdim=True).clamp(min=1)
    for i in range(C):
        y = top + i * cell
        draw.text((left - 6, y + cell / 2), names[i], fill=_INK, font=font, anchor="rm")
        _turned(sheet, names[i], (left + i * cell + (cell - letters) // 2, top - 6), font)
        for j in range(C):
            share, x = float(shares[i, j]), left + j * cell
            full = _RIGHT if i == j else _WRONG
            shade = share if i == j else share**0.5  # a few mistakes are to be seen
            colour = tuple(round(a + (b - a) * shade) for a, b in zip(_LIGHT, full, strict=True))
            draw.rectangle((x, y, x + cell - 1, y + cell - 1), fill=colour, outline=_FAINT)
            if cell >= _SHOWN and rows[i, j]:
                ink = "white" if shade > 0.5 else _INK
                draw.text((x + cell / 2, y + cell / 2), f"{int(rows[i, j])}", fill=ink, font=font, anchor="mm")
    pixels = torch.frombuffer(bytearray(sheet.tobytes()), dtype=torch.uint8)
    return pixels.view(sheet.height, sheet.width, 3).permute(2, 0, 1)


def most_confused(counts: Tensor, classes: Sequence[str], most: int = 3) -> list[str]:
    """The pairs that are confused most often, in words: "five as nine (4)"."""
    wrong = counts.clone().fill_diagonal_(0).flatten()
    found = wrong.argsort(descending=True, stable=True)[:most].tolist()
    C = len(classes)
    return [f"{classes[k // C]} as {classes[k % C]} ({int(wrong[k])})" for k in found if wrong[k] > 0]


def _turned(
    sheet: Image.Image,
    text: str,
    place: tuple[int, int],
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    *,
    middle: bool = False,
) -> None:
    """The text read from below, `place` being its left edge and its lower end, or its middle."""
    box = font.getbbox(text or " ")
    strip = Image.new("RGB", (round(box[2]) + 2, round(box[3]) + 2), "white")
    ImageDraw.Draw(strip).text((0, 0), text, fill=_INK, font=font)
    strip = strip.rotate(90, expand=True)
    x, y = place
    sheet.paste(strip, (x, y - (strip.height // 2 if middle else strip.height)))
