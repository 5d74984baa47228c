"""The losses of wav2vec 2.0 (Baevski et al., 2020, arXiv:2006.11477): tell the true code from others, use all codes.

M is the number of masked frames of a batch, in the order of `mask.nonzero()`.
"""

import torch
from torch import Tensor

from ssl_lab import dist
from ssl_lab.nn.norm import l2_normalize


def sample_negatives(rows: Tensor, count: int) -> Tensor:
    """(M, count) int64 among the M frames: others of the same utterance, each as likely (section 3.2 of the paper).

    Args:
        rows: (M,) int64, the utterance of each masked frame, in ascending order: `mask.nonzero()[:, 0]`.
        count: how many for each frame, with repetition; the paper has 100.

    A frame that is the only one of its utterance gets itself, which `contrastive` then leaves out.
    """
    own = torch.arange(len(rows), device=rows.device)
    _, where, size = torch.unique_consecutive(rows, return_inverse=True, return_counts=True)
    first = (size.cumsum(0) - size)[where]
    others = (size[where] - 1)[:, None]
    drawn = (torch.rand(len(rows), count, device=rows.device) * others).long().clamp(max=(others - 1).clamp(min=0))
    return first[:, None] + drawn + ((drawn >= (own - first)[:, None]) & (others > 0))


def contrastive(
    predicted: Tensor, targets: Tensor, codes: Tensor, negatives: Tensor, *, temperature: float = 0.1
) -> tuple[Tensor, Tensor]:
    """Nats (M,), float32 at least, to find each frame's target among its negatives by cosine (equation 3).

    And whether it is found, (M,) bool: no other is as similar.

    Args:
        predicted: (M, E) of the context network.
        targets: (M, E) quantised.
        codes: (M, G) int64 that `targets` were made of: a negative with the codes of the target is left out.
        negatives: (M, K) int64, see `sample_negatives`.
        temperature: divisor of the cosines.
    """
    with torch.autocast(predicted.device.type, enabled=False):  # a cosine in bf16 is wrong by 0.004, times ten here
        similar = l2_normalize(predicted) @ l2_normalize(targets).t() / temperature
    others = similar.gather(1, negatives)
    others = others.masked_fill((codes[negatives] == codes[:, None]).all(-1), float("-inf"))
    own = similar.diagonal()
    return torch.cat([own[:, None], others], 1).logsumexp(1) - own, own.detach() > others.detach().amax(1)


def diversity(probabilities: Tensor) -> Tensor:
    """(G V - the sum of the codebooks' perplexities) / (G V), from (M, G, V) over the frames of all ranks: 0 is best.

    The form of fairseq and transformers of the paper's equation 4.
    """
    groups, entries = probabilities.shape[1:]
    return 1 - perplexity(probabilities).sum() / (groups * entries)


def perplexity(probabilities: Tensor) -> Tensor:
    """(G,) exponential of the entropy of the mean of (M, G, V) over the frames of all ranks, float32 at least."""
    exact = probabilities.to(torch.promote_types(probabilities.dtype, torch.float32))
    count = dist.all_reduce_sum(exact.new_tensor(float(len(exact)))).clamp(min=1)
    mean = dist.all_reduce_sum(exact.sum(0)) / count
    return (-torch.xlogy(mean, mean).sum(-1)).exp()


def mean_over_frames(nll: Tensor) -> Tensor:
    """Mean of `nll` (M,) over the frames of all ranks, which hold different numbers; 0 where there are none.

    Accumulated micro-batches divide each by its own number.
    """
    count = dist.all_reduce_mean(nll.new_tensor(float(len(nll))))
    return nll.sum() / count.where(count > 0, 1.0)
