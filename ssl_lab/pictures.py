"""Grids of images for people to look at: plain tensors in, one (3, H, W) uint8 tensor out."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ssl_lab.files import replacing

_GAP = 2  # white pixels between images
_VISIBLE = 128  # small images are enlarged to about this side
_TEXT = 14  # size of the labels in pixels, less where columns are narrow


def unnormalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(..., 3, H, W) float, normalised by `mean` and `std` of pixels in [0, 1] -> uint8 of the same shape."""
    m, s = (torch.tensor(x, device=images.device, dtype=torch.float32).view(-1, 1, 1) for x in (mean, std))
    return ((images.float() * s + m) * 255).round().clamp(0, 255).to(torch.uint8)


def grid(images: Sequence[Tensor], columns: int, *, scale: int | None = None, labels: Sequence[str] = ()) -> Tensor:
    """Images (3, H, W) uint8 of one size, row by row -> (3, H', W') uint8 on white.

    Args:
        images: at least one; an unfinished last row stays white.
        columns: images per row.
        scale: each pixel becomes scale x scale; None enlarges small images to about 128 pixels.
        labels: one per column, written above; () = no header.

    Raises:
        ValueError: no image, images of several sizes, or labels that are not one per column.
    """
    if not images or any(image.shape != images[0].shape for image in images):
        raise ValueError(f"a grid needs images of one size, got {sorted({tuple(i.shape) for i in images})}")
    if labels and len(labels) != columns:
        raise ValueError(f"{len(labels)} labels for {columns} columns")
    _, H, W = images[0].shape
    scale = scale or max(1, round(_VISIBLE / max(H, W)))
    H, W = H * scale, W * scale
    header = torch.empty(3, 0, 0) if not labels else _header(labels, W)
    rows = math.ceil(len(images) / columns)
    top = header.shape[1]
    out = torch.full((3, top + rows * (H + _GAP) + _GAP, columns * (W + _GAP) + _GAP), 255, dtype=torch.uint8)
    if labels:
        out[:, :top, _GAP : _GAP + header.shape[2]] = header
    for i, image in enumerate(images):
        y, x = top + _GAP + i // columns * (H + _GAP), _GAP + i % columns * (W + _GAP)
        out[:, y : y + H, x : x + W] = image.cpu().repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    return out


def side_by_side(columns: dict[str, Tensor], *, scale: int | None = None) -> Tensor:
    """Named columns, each (B, 3, H, W) uint8 -> one grid of B rows with the names above."""
    rows = [image for row in zip(*columns.values(), strict=True) for image in row]
    return grid(rows, len(columns), scale=scale, labels=tuple(columns))


def save_png(path: Path, picture: Tensor) -> None:
    """Write a (3, H, W) uint8 picture; folders are made, and the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        Image.fromarray(picture.permute(1, 2, 0).contiguous().cpu().numpy()).save(temporary, format="PNG")


def _header(labels: Sequence[str], width: int) -> Tensor:
    """Labels centred above columns of `width` pixels -> (3, height, W') uint8, in the largest size that fits."""
    sizes = range(_TEXT, 6, -1)
    fits = (s for s in sizes if all(ImageFont.load_default(s).getlength(label) <= width for label in labels))
    font = ImageFont.load_default(next(fits, sizes[-1]))
    sheet = Image.new("RGB", (len(labels) * (width + _GAP), _TEXT + 6), "white")
    draw = ImageDraw.Draw(sheet)
    for i, label in enumerate(labels):
        draw.text((i * (width + _GAP) + width / 2, sheet.height / 2), label, fill="black", font=font, anchor="mm")
    pixels = torch.frombuffer(bytearray(sheet.tobytes()), dtype=torch.uint8)
    return pixels.view(sheet.height, sheet.width, 3).permute(2, 0, 1)
