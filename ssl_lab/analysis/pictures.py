"""What the features of a backbone look like."""

import math

import torch
from torch import Tensor, nn

from ssl_lab.errors import UserError
from ssl_lab.types import Encoded


def pca_map(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """Patch tokens (B, rows * columns, D) -> colours (B, 3, rows, columns) uint8.

    Red, green and blue are the first three principal components of all patches of the batch, so like colours mean like
    features across images (the view of DINOv2, arXiv:2304.07193, without its foreground mask). Each component spans
    its 2nd to 98th percentile; its sign makes the largest entry of its direction positive. Components that the
    features lack (D < 3, or all tokens alike) are grey.
    """
    B = len(tokens)
    x = tokens.double().flatten(0, 1)
    x = x - x.mean(0)
    _, directions = torch.linalg.eigh(x.T @ x)
    top = directions.flip(1)[:, :3]
    sign = top.gather(0, top.abs().argmax(0, keepdim=True)).sign()
    scores = x @ (top * sign)
    low, high = (torch.quantile(scores, q, dim=0) for q in (0.02, 0.98))
    spread = high - low
    flat = spread <= 1e-9 * x.abs().max().clamp(min=1e-300)
    colours = ((scores - low) / torch.where(flat, 1.0, spread)).clamp(0, 1)
    colours = torch.where(flat, 0.5, colours).mul(255).round().to(torch.uint8)
    if colours.shape[1] < 3:
        colours = torch.cat([colours, colours.new_full((len(colours), 3 - colours.shape[1]), 128)], 1)
    return colours.view(B, rows, columns, 3).permute(0, 3, 1, 2)


@torch.no_grad()
def feature_maps(encoder: nn.Module, image: Tensor) -> Tensor:
    """Images (B, C, H, W), normalised -> PCA colours of their patch features (B, 3, H, W) uint8, patches as blocks.

    What a place has on average over the images is taken out first: else the components show where a patch is, not what
    it is. The encoder is run in its present mode; the caller sets eval mode and autocast.

    Raises:
        UserError: the tokens form no grid of the image's shape.
    """
    encoded: Encoded = encoder(image)
    rows, columns = grid_of(encoder, encoded.tokens.shape[1], image)
    tokens = encoded.tokens.float()
    colours = pca_map(tokens - tokens.mean(0) if len(tokens) > 1 else tokens, rows, columns)
    H, W = image.shape[-2:]
    return colours.repeat_interleave(H // rows, 2).repeat_interleave(W // columns, 3)


def grid_of(encoder: nn.Module, tokens: int, image: Tensor) -> tuple[int, int]:
    """Rows and columns of so many patches of an encoder on images (..., H, W), patches as high as wide.

    Raises:
        UserError: they form no grid of the image's shape.
    """
    H, W = image.shape[-2:]
    rows = round(math.sqrt(tokens * H / W))
    if not rows or tokens % rows or H % rows or W % (tokens // rows):
        raise UserError(f"{tokens} tokens of {type(encoder).__name__} form no grid on images of {H} x {W}")
    return rows, tokens // rows
