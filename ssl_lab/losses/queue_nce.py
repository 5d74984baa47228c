"""A contrastive loss whose negatives wait in a queue."""

import torch
from torch import Tensor

from ssl_lab.nn.norm import l2_normalize


def queue_nce(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """InfoNCE of MoCo (arXiv:1911.05722, eq. 1): query and key (B, E), unit rows of a queue (S, E) -> two scalars.

    Each query is to pick its own key out of that key and the whole queue, by cosine / temperature; the keys of other
    samples of the batch play no part. Gives the mean cross-entropy, float32 at least, and the share of queries that
    pick right. Only the query gets a gradient.
    """
    query, key = l2_normalize(query), l2_normalize(key.detach())
    with torch.autocast(query.device.type, enabled=False):
        positive = (query * key).sum(1) / temperature
        negative = query @ queue.detach().to(query.dtype).T / temperature
        loss = (torch.logaddexp(positive, negative.logsumexp(1)) - positive).mean()
    return loss, (positive.detach() > negative.detach().amax(1)).float().mean()
