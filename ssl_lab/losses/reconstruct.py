"""Losses on pixels."""

import torch
from torch import Tensor

from ssl_lab.nn.embed import patchify


def patch_statistics(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (B, N, 1) of each patch vector; unbiased variance plus 1e-6, as MAE defines it."""
    variance, mean = torch.var_mean(pixels, dim=-1, keepdim=True)
    return mean, (variance + 1e-6).sqrt()


def pixel_targets(image: Tensor, patch: int, *, normalize: bool) -> Tensor:
    """(B, C, H, W) -> (B, N, p * p * C), channel last inside a patch; `normalize` standardises each patch."""
    pixels = patchify(image, patch, channels_last=True)
    if not normalize:
        return pixels
    mean, std = patch_statistics(pixels)
    return (pixels - mean) / std


def masked_mse(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean over hidden patches of the mean squared error, in the target's precision (MAE, section 3)."""
    return (predicted.to(target.dtype) - target).square().mean()
