"""Contrastive losses: find your own other view among those of the whole (global) batch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_lab import dist
from ssl_lab.nn.norm import l2_normalize


def nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """NT-Xent of SimCLR (arXiv:2002.05709, eq. 1): projections (B, E) of two views -> scalar, float32 at least.

    Each of the 2B anchors is to pick its other view out of the 2B - 1 others, all ranks' taken together; gradients
    flow to every rank. The result is the mean over the anchors of this rank.
    """
    local = l2_normalize(torch.cat([z1, z2]))
    z1, z2 = local.chunk(2)
    world = torch.cat([dist.gather(z1), dist.gather(z2)])
    B, total = len(z1), len(world) // 2
    with torch.autocast(local.device.type, enabled=False):
        logits = local @ world.T / temperature
    own = torch.arange(B, device=local.device) + B * dist.rank()
    itself = torch.cat([own, own + total])
    logits = logits.scatter(1, itself[:, None], float("-inf"))
    return F.cross_entropy(logits, torch.cat([own + total, own]))


def info_nce(q: Tensor, k: Tensor, temperature: float) -> Tensor:
    """Queries (B, E) find their keys (B, E) among the keys of all ranks; keys get no gradient -> scalar.

    Cross-entropy of q k^T / temperature, rows L2-normalised (MoCo v3, arXiv:2104.02057, eq. 1).
    """
    q, keys = l2_normalize(q), dist.gather(l2_normalize(k), grad=False)
    with torch.autocast(q.device.type, enabled=False):
        logits = q @ keys.T / temperature
    return F.cross_entropy(logits, torch.arange(len(q), device=q.device) + len(q) * dist.rank())
