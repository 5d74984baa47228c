"""Weighted k-nearest-neighbour classification on frozen features."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_lab.errors import UserError
from ssl_lab.evals.base import Common, Round, accuracy
from ssl_lab.evals.features import num_classes
from ssl_lab.types import Embeds

_CELLS = 1 << 25  # similarities held at a time: 128 MiB


@dataclass(frozen=True)
class KNN(Common):
    """Cosine neighbours in the training split vote with weight exp(similarity / temperature).

    Wu et al., 2018 (arXiv:1805.01978), with the settings of DINO (arXiv:2104.14294).

    Args:
        k: neighbours that vote; all of them if the bank is smaller.
        temperature: of the vote.
    """

    k: int = 20
    temperature: float = 0.07
    needs: ClassVar[type] = Embeds

    def __post_init__(self) -> None:
        require_vote("knn", self.k, self.temperature)

    @property
    def protocol(self) -> dict[str, Any]:
        """Settings that the values depend on."""
        return {"similarity": "cosine", "k": self.k, "temperature": self.temperature, "limit": self.limit}

    def run(self, round: Round) -> dict[str, float]:
        """Percent of test rows: top1, top5."""
        bank, test = round.labelled("train", self.limit), round.labelled("test", self.limit)
        votes = knn_votes(bank.x, bank.y, test.x, num_classes(bank, test), self.k, self.temperature)
        return accuracy(votes, test.y)


def require_vote(name: str, k: int, temperature: float) -> None:
    """Raise a `UserError` that names evaluator `name` where nobody votes, or votes have no weight."""
    if k < 1:
        raise UserError(f"{name}.k={k}: at least 1 neighbour votes")
    if not temperature > 0:
        raise UserError(f"{name}.temperature={temperature:g}: give a number above 0, such as 0.07")


def knn_votes(bank: Tensor, y: Tensor, queries: Tensor, classes: int, k: int, temperature: float) -> Tensor:
    """Bank (N, D) with classes (N,), queries (M, D) -> votes (M, classes)."""
    bank, queries = F.normalize(bank, dim=1).T.contiguous(), F.normalize(queries, dim=1)
    k = min(k, len(y))
    votes = []
    for part in torch.split(queries, max(1, _CELLS // len(y))):
        similarity, row = (part @ bank).topk(k)
        weight = ((similarity - 1) / temperature).exp()  # -1 scales all votes alike and keeps exp() in range
        votes.append(torch.zeros(len(part), classes, device=part.device).scatter_add_(1, y[row], weight))
    return torch.cat(votes)
