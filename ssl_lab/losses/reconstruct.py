"""Losses on pixels."""

import torch
import torch.nn.functional as F
from torch import Tensor


def patch_statistics(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (B, N, 1) of each patch vector; unbiased variance plus 1e-6, as MAE defines it."""
    variance, mean = torch.var_mean(pixels, dim=-1, keepdim=True)
    return mean, (variance + 1e-6).sqrt()


def standardize(pixels: Tensor) -> Tensor:
    """(B, N, P) patch vectors with their `patch_statistics` taken out.

    A layer norm does it in one pass. It divides by the biased variance, so epsilon and result are scaled to match.
    """
    size = pixels.shape[-1]
    biased = (size - 1) / size
    return F.layer_norm(pixels, (size,), pixels.new_full((size,), biased**0.5), eps=1e-6 * biased)


def masked_mse(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean over hidden patches of the mean squared error, in the target's precision (MAE, section 3)."""
    return F.mse_loss(predicted.to(target.dtype), target)
