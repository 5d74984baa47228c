"""Images and captions in one space, as pictures: the best images for a caption, and how alike all of some pairs are."""

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ssl_lab.analysis.neighbours import OTHER, SAME, framed

_SIDE, _GAP, _MARGIN = 112, 4, 6  # pixels of a small image, between images, around text
_COLUMN, _TEXT, _LINES = 260, 14, 5  # width of a column of captions, size of its letters, lines of a caption
_LIGHT, _DARK = (255, 255, 255), (16, 78, 139)  # of the least and the most alike


def caption_grid(captions: Sequence[str], images: Tensor, own: Tensor) -> Tensor:
    """One row per caption with its best images beside it; green frames: the image it was written for, red: others.

    Args:
        captions: M texts.
        images: (M, k, 3, H, W) uint8, best first.
        own: (M, k) bool.

    Returns:
        A picture (3, H', W') uint8.
    """
    cell = _SIDE + 2 * _GAP
    sheet = Image.new("RGB", (_COLUMN + images.shape[1] * cell, len(captions) * cell), "white")
    for i, (caption, row, right) in enumerate(zip(captions, images, own.tolist(), strict=True)):
        _write(sheet, caption, (0, i * cell, _COLUMN, (i + 1) * cell))
        for j, (image, is_own) in enumerate(zip(row, right, strict=True)):
            shown = framed(_small(image, _SIDE - 6), SAME if is_own else OTHER, 3)
            sheet.paste(_picture(shown), (_COLUMN + j * cell + _GAP, i * cell + _GAP))
    return _tensor(sheet)


def similarity_matrix(similarity: Tensor, images: Tensor, captions: Sequence[str]) -> Tensor:
    """Captions down, images across, a cell for each two with their cosine; a frame where they belong together.

    Args:
        similarity: (N, N) float, of caption i and image j.
        images: (N, 3, H, W) uint8.
        captions: N texts.

    Returns:
        A picture (3, H', W') uint8.
    """
    count, side, values = len(captions), _SIDE - 2 * _GAP, similarity.float().cpu()
    sheet = Image.new("RGB", (_COLUMN + count * _SIDE, (count + 1) * _SIDE), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_TEXT)
    low, high = float(values.min()), float(values.max())
    for j, image in enumerate(images):
        sheet.paste(_picture(_small(image, side)), (_COLUMN + j * _SIDE + _GAP, _GAP))
    for i, caption in enumerate(captions):
        top = (i + 1) * _SIDE
        _write(sheet, caption, (0, top, _COLUMN, top + _SIDE))
        for j in range(count):
            left, value = _COLUMN + j * _SIDE, float(values[i, j])
            share = (value - low) / max(high - low, 1e-12)
            colour = tuple(round(a + (b - a) * share) for a, b in zip(_LIGHT, _DARK, strict=True))
            box = (left + 1, top + 1, left + _SIDE - 2, top + _SIDE - 2)
            draw.rectangle(box, fill=colour, outline=SAME if i == j else (225, 225, 225), width=4 if i == j else 1)
            ink = "white" if share > 0.5 else "black"
            draw.text((left + _SIDE / 2, top + _SIDE / 2), f"{value:.2f}", fill=ink, font=font, anchor="mm")
    return _tensor(sheet)


def _write(sheet: Image.Image, text: str, box: tuple[int, int, int, int]) -> None:
    """The text into a box, at its middle height, in lines of words that fit; what does not fit is cut off by dots."""
    font, left, top, right, bottom = ImageFont.load_default(_TEXT), *box
    room = right - left - 2 * _MARGIN
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= room or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    lines = [_clipped(line, room, font) for line in lines]
    if len(lines) > _LINES:
        lines = [*lines[: _LINES - 1], _clipped(lines[_LINES - 1] + " " * 3 + "...", room, font)]
    place = (left + _MARGIN, (top + bottom) / 2)
    ImageDraw.Draw(sheet).multiline_text(place, "\n".join(lines), fill="black", font=font, anchor="lm", spacing=3)


def _clipped(line: str, room: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    if font.getlength(line) <= room:
        return line
    while line and font.getlength(line + "...") > room:
        line = line[:-1]
    return line.rstrip() + "..."


def _small(image: Tensor, side: int) -> Tensor:
    """(3, H, W) uint8 -> (3, side, side)."""
    method = Image.Resampling.NEAREST if image.shape[-1] < side else Image.Resampling.BICUBIC
    return _tensor(_picture(image).resize((side, side), method))


def _picture(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())


def _tensor(sheet: Image.Image) -> Tensor:
    pixels = torch.frombuffer(bytearray(sheet.tobytes()), dtype=torch.uint8)
    return pixels.view(sheet.height, sheet.width, 3).permute(2, 0, 1)
