"""Direct preference optimisation (DPO, Rafailov et al., 2023, arXiv:2305.18290): which of two answers is the better."""

import torch
import torch.nn.functional as F
from torch import Tensor


def dpo(policy: Tensor, reference: Tensor, *, beta: float) -> tuple[Tensor, Tensor]:
    """Mean of -log sigmoid(r_chosen - r_rejected) over the pairs (eq. 7), and the rewards r that it compares.

    An answer's implicit reward is r = beta (log p - log p_ref), up to what both answers to a prompt share (eq. 5).

    Args:
        policy: (2, B) log-likelihood in nats of the chosen answers and of the rejected ones, summed over their tokens.
        reference: (2, B) the same under the model that stays as it was; no gradient flows into it.
        beta: how much a departure from the reference costs.

    Returns:
        Scalar loss, and rewards (2, B), of the dtype of `policy`, which carry its gradient.
    """
    rewards = beta * (policy - reference.detach())
    return -F.logsigmoid(rewards[0] - rewards[1]).mean(), rewards


@torch.no_grad()
def reward_logs(rewards: Tensor) -> dict[str, Tensor]:
    """Means over the pairs of rewards (2, B): chosen, rejected, their margin, and how often the chosen one is ahead."""
    chosen, rejected = rewards
    return {
        "rewards/chosen": chosen.mean(),
        "rewards/rejected": rejected.mean(),
        "rewards/margin": (chosen - rejected).mean(),
        "rewards/accuracy": (chosen > rejected).float().mean(),
    }
