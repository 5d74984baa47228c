"""How much of their space a set of features fills, without labels: what evaluators report and a collapse alarm watches.

Both give a 0-dimensional float64 tensor without gradient, on the device of `x` (on the CPU where that has no float64).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def feature_std(x: Tensor) -> Tensor:
    """(N, D) -> mean over dimensions of the standard deviation of unit-norm features, times sqrt(D).

    0: all rows point the same way. 1: the rows are spread evenly over the sphere (SimSiam, arXiv:2011.10566, section
    4.1, watches it for collapse).
    """
    return F.normalize(_exact(x), dim=1).std(0, correction=0).mean() * x.shape[1] ** 0.5


@torch.no_grad()
def rankme(x: Tensor) -> Tensor:
    """(N, D) -> exp of the entropy of the normalised singular values, between 1 and D (RankMe, arXiv:2210.02885).

    They are roots of the eigenvalues of the smaller Gram matrix: many times faster than decomposing wide features,
    and in float64 the error lies below the 1e-7 that the measure itself adds to every share.
    """
    x = _exact(x)
    gram = x.T @ x if len(x) > x.shape[1] else x @ x.T
    values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    p = values / values.sum().clamp(min=1e-300) + 1e-7
    return torch.exp(-(p * p.log()).sum())


def _exact(x: Tensor) -> Tensor:
    """As float64, whatever autocast says."""
    return (x.cpu() if x.device.type == "mps" else x).double()
