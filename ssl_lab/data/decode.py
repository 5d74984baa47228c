"""Encoded bytes to RGB pixels, whatever the file is, or a reason why not."""

import io

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

MAX_PIXELS = 80_000_000  # a small file can claim far more and fill the memory


class Unreadable(Exception):
    """Bytes that give no image, or no sound; the message says why."""


def size_of(data: bytes) -> tuple[int, int]:
    """(height, width) of the image once it is upright, read from the header alone.

    Raises:
        Unreadable: the bytes are no image, or one of more than MAX_PIXELS.
    """
    try:
        with _open(data) as image:
            sideways = image.getexif().get(0x0112, 1) >= 5
            width, height = image.size
    except Unreadable:
        raise
    except Exception as error:
        raise Unreadable(_reason(error)) from error
    return (width, height) if sideways else (height, width)


def decode(data: bytes) -> Tensor:
    """Bytes of an image file -> (3, H, W) uint8 RGB.

    The orientation in the EXIF data is applied, transparency laid on white, 16-bit grey scaled to 8 bits, and
    so are floats in 0..1.

    Raises:
        Unreadable: the bytes are no image, a truncated one, one of more than MAX_PIXELS, or floats beyond 0..255.
    """
    try:
        with _open(data) as image:
            pixels = np.array(_rgb(ImageOps.exif_transpose(image)))
    except Unreadable:
        raise
    except Exception as error:  # decoders raise whatever a broken file drives them to
        raise Unreadable(_reason(error)) from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _open(data: bytes) -> Image.Image:
    if not data:
        raise Unreadable("it is empty or cannot be opened")
    image = Image.open(io.BytesIO(data))
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise Unreadable(f"{width} x {height} pixels are more than the limit of {MAX_PIXELS // 10**6} million")
    return image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip at 255 instead of scaling
        grey = np.asarray(image).astype(np.float64)
        scaled = grey / 257 if grey.max() > 255 or image.mode != "I" else grey
        return Image.fromarray(scaled.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        grey = np.asarray(image)
        low, high = float(grey.min()), float(grey.max())
        if not 0 <= low <= high <= 255:  # what is black and what white, nobody knows; NaN too
            raise Unreadable(f"its values lie in {low:g}..{high:g}, not in 0..1 or 0..255")
        scaled = grey * (255 if high <= 1 else 1)
        return Image.fromarray(scaled.round().astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "it is no image"
    if isinstance(error, Image.DecompressionBombError):
        return f"it claims more pixels than the limit of {MAX_PIXELS // 10**6} million"
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
