"""A map of the embedding: all features in two dimensions, as coloured points and as small images."""

import colorsys
import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ssl_lab.errors import UserError

Projection = Literal["pca", "umap"]

_SIDE, _MARGIN = 760, 24  # pixels of a map, and left free at its edges
_LISTED = 20  # classes that fit into a legend
_FINE = 2  # drawn so much larger, then reduced: smooth edges
_COLOURS = (
    "#0072b2",
    "#e69f00",
    "#009e73",
    "#d55e00",
    "#cc79a7",
    "#56b4e9",
    "#8c564b",
    "#b8a800",
    "#7f4fc9",
    "#444444",
)


def projected(x: Tensor, how: Projection = "pca", seed: int = 0) -> tuple[Tensor, str]:
    """Features (N, D) -> places (N, 2) float64 on the CPU, and a phrase that says what the axes are.

    Rows are brought to unit length first, as kNN sees them. The signs of principal components make the largest entry of
    their direction positive, so the same features always give the same map.

    Raises:
        UserError: UMAP is asked for and not installed.
    """
    x = F.normalize(x.double().cpu(), dim=1)
    if how == "umap":
        return torch.as_tensor(_umap(x, seed), dtype=torch.float64), "UMAP, cosine distance"
    x = x - x.mean(0)
    values, directions = torch.linalg.eigh(x.T @ x)
    top = directions.flip(1)[:, :2]
    points = x @ (top * top.gather(0, top.abs().argmax(0, keepdim=True)).sign())
    if points.shape[1] < 2:
        points = F.pad(points, (0, 2 - points.shape[1]))
    shares = 100 * values.flip(0)[:2] / values.sum().clamp(min=1e-300)
    return points, f"first two principal components, {' % and '.join(f'{s:.0f}' for s in shares)} % of the variance"


def require_projection(name: str) -> None:
    """Check before any work that a projection can be had.

    Raises:
        UserError: there is none of that name, or its package is not installed.
    """
    if name not in get_args(Projection):
        raise UserError(f"projection={name} does not exist; there are {', '.join(get_args(Projection))}")
    if name == "umap" and importlib.util.find_spec("umap") is None:
        raise UserError("projection=umap needs umap-learn: pip install umap-learn, or take projection=pca")


def scatter(points: Tensor, y: Tensor, classes: Sequence[str]) -> Tensor:
    """Places (N, 2), classes (N,) int64 (-1 = unknown, grey) -> a picture (3, H, W) uint8 of points by colour.

    `classes` names them; a legend stands beside the map where there are at most 20.
    """
    legend = [str(name)[:18] for name in classes] if 0 < len(classes) <= _LISTED else []
    sheet = Image.new("RGB", ((_SIDE + (170 if legend else 0)) * _FINE, _SIDE * _FINE), "white")
    draw = ImageDraw.Draw(sheet)
    radius = _FINE * (4.5 if len(points) <= 600 else 3)
    order = torch.randperm(len(points), generator=torch.Generator().manual_seed(0)).tolist()  # no class on top
    places = (_placed(points) * _FINE).tolist()
    for i in order:
        a, b = places[i]
        box = (a - radius, b - radius, a + radius, b + radius)
        draw.ellipse(box, fill=colour(int(y[i])), outline="white", width=_FINE // 2)
    font = ImageFont.load_default(15 * _FINE)
    for i, name in enumerate(legend):
        top = (_MARGIN + 24 * i) * _FINE
        left = (_SIDE + 6) * _FINE
        draw.ellipse((left, top, left + 12 * _FINE, top + 12 * _FINE), fill=colour(i))
        draw.text((left + 20 * _FINE, top + 6 * _FINE), name, fill="black", font=font, anchor="lm")
    return _pixels(_bordered(sheet.reduce(_FINE)))


def thumbnails(points: Tensor, images: Tensor, side: int = 44) -> Tensor:
    """Places (N, 2), images (N, 3, H, W) uint8 -> a picture (3, 760, 760) uint8 with small images at their places.

    An image that would cover one drawn before is left out, so early rows come first.
    """
    sheet = Image.new("RGB", (_SIDE, _SIDE), "white")
    taken: list[tuple[float, float]] = []
    for (a, b), image in zip(_placed(points, _MARGIN + side / 2).tolist(), images, strict=True):
        if any(abs(a - c) < side and abs(b - d) < side for c, d in taken):
            continue
        taken.append((a, b))
        small = Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())
        sheet.paste(small.resize((side, side), Image.Resampling.BICUBIC), (round(a - side / 2), round(b - side / 2)))
    return _pixels(_bordered(sheet))


def colour(c: int) -> str:
    """Colour of a class: ten well apart, then hues by the golden angle; grey for -1."""
    if c < 0:
        return "#b0b0b0"
    if c < len(_COLOURS):
        return _COLOURS[c]
    rgb = colorsys.hsv_to_rgb(c * 0.618034 % 1, 0.55 + 0.4 * (c % 2), 0.6 + 0.35 * (c % 3) / 2)
    return "#" + "".join(f"{round(255 * v):02x}" for v in rgb)


def _placed(points: Tensor, margin: float = _MARGIN) -> Tensor:
    """Places (N, 2) -> pixels (x to the right, y down); outliers beyond the 0.1th percentile move to the edge."""
    points = points.double()
    low, high = (torch.quantile(points, q, dim=0) for q in (0.001, 0.999))
    spread = high - low
    share = torch.where(spread > 0, (points - low) / torch.where(spread > 0, spread, 1.0), 0.5).clamp(0, 1)
    share[:, 1] = 1 - share[:, 1]
    return margin + share * (_SIDE - 2 * margin)


def _umap(x: Tensor, seed: int) -> Any:
    require_projection("umap")
    umap: Any = importlib.import_module("umap")
    model = umap.UMAP(n_components=2, metric="cosine", random_state=seed, n_neighbors=min(15, max(2, len(x) - 1)))
    return model.fit_transform(x.float().numpy())


def _bordered(sheet: Image.Image) -> Image.Image:
    ImageDraw.Draw(sheet).rectangle((0, 0, _SIDE - 1, _SIDE - 1), outline="#d0d0d0")
    return sheet


def _pixels(sheet: Image.Image) -> Tensor:
    pixels = torch.frombuffer(bytearray(sheet.tobytes()), dtype=torch.uint8)
    return pixels.view(sheet.height, sheet.width, 3).permute(2, 0, 1)
