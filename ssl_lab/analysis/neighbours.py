"""The nearest neighbours of some images in the space of features, as a picture."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_lab.pictures import grid

SAME, OTHER, UNKNOWN = (0, 158, 90), (213, 70, 20), (150, 150, 150)  # frames: green, red, grey


def nearest(bank: Tensor, queries: Tensor, k: int) -> Tensor:
    """Bank (N, D), queries (M, D) -> (M, min(k, N)) int64 rows of the bank by cosine similarity, best first."""
    similarity = F.normalize(queries, dim=1) @ F.normalize(bank, dim=1).T
    return similarity.topk(min(k, len(bank)), 1).indices


def neighbour_grid(queries: Tensor, neighbours: Tensor, query_y: Tensor, neighbour_y: Tensor) -> Tensor:
    """One row per query with its neighbours beside it, each framed: green = the query's class, red = another one.

    Args:
        queries: images (M, 3, H, W) uint8.
        neighbours: images (M, k, 3, H, W) uint8, best first.
        query_y: classes (M,) int64, -1 = unknown.
        neighbour_y: classes (M, k) int64, -1 = unknown; where either is, the frame is grey.

    Returns:
        A picture (3, H', W') uint8.
    """
    k = neighbours.shape[1]
    width = max(1, round(queries.shape[-1] / 24))
    images = []
    for image, y, others, classes in zip(queries, query_y.tolist(), neighbours, neighbour_y.tolist(), strict=True):
        images.append(framed(image, (255, 255, 255), width))
        for other, c in zip(others, classes, strict=True):
            colour = UNKNOWN if min(y, c) < 0 else SAME if y == c else OTHER
            images.append(framed(other, colour, width))
    return grid(images, k + 1, labels=["query", *(str(i) for i in range(1, k + 1))])


def framed(image: Tensor, colour: tuple[int, int, int], width: int) -> Tensor:
    """(3, H, W) uint8 -> (3, H + 2 width, W + 2 width) with a frame around it."""
    _, H, W = image.shape
    out = torch.tensor(colour, dtype=torch.uint8)[:, None, None].repeat(1, H + 2 * width, W + 2 * width)
    out[:, width : width + H, width : width + W] = image.cpu()
    return out
