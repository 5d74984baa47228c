"""How much of their space the features fill: measures that need no labels."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_lab.evals.base import Round, Split
from ssl_lab.types import Embeds


@dataclass(frozen=True)
class Collapse:
    """Spread and effective rank of the features.

    Args:
        split: whose features.
        max_rows: at most so many, evenly spaced, enter the measures.
        limit: use so many rows of the split, evenly spread; None = all.
        every: training steps between two runs, 0 = only at the end.
    """

    split: Split = "test"
    max_rows: int = 8192
    limit: int | None = None
    every: int = 0
    needs: ClassVar[type] = Embeds

    @property
    def protocol(self) -> dict[str, Any]:
        """Settings that the values depend on."""
        return {"split": self.split, "max_rows": self.max_rows, "limit": self.limit}

    def run(self, round: Round) -> dict[str, float]:
        """`std`: 0 = collapsed, 1 = isotropic. `rankme`: between 1 and D."""
        x = round.features(self.split, self.limit).x.to(round.device)
        if len(x) > self.max_rows:
            x = x[torch.arange(self.max_rows, device=x.device) * len(x) // self.max_rows]
        return {"std": feature_std(x), "rankme": rankme(x)}


def feature_std(x: Tensor) -> float:
    """(N, D) -> mean over dimensions of the standard deviation of unit-norm features, times sqrt(D)."""
    return float(F.normalize(x.double(), dim=1).std(0, correction=0).mean() * x.shape[1] ** 0.5)


def rankme(x: Tensor) -> float:
    """(N, D) -> exp of the entropy of the normalised singular values (Garrido et al., 2023, arXiv:2210.02885).

    They are roots of the eigenvalues of the smaller Gram matrix: many times faster than decomposing wide features,
    and in float64 the error lies below the 1e-7 that the measure itself adds to every share.
    """
    x = x.double()
    gram = x.T @ x if len(x) > x.shape[1] else x @ x.T
    values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    p = values / values.sum().clamp(min=1e-300) + 1e-7
    return float(torch.exp(-(p * p.log()).sum()))
