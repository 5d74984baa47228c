"""How much of their space the features fill: measures that need no labels."""

from dataclasses import dataclass
from typing import Any, ClassVar

from ssl_lab.evals.base import Common, Round, Split
from ssl_lab.spread import feature_std, rankme
from ssl_lab.types import Embeds


@dataclass(frozen=True)
class Collapse(Common):
    """Spread and effective rank of the features.

    Args:
        split: whose features.
        max_rows: at most so many, evenly spaced, enter the measures.
    """

    split: Split = "test"
    max_rows: int = 8192
    needs: ClassVar[type] = Embeds

    @property
    def protocol(self) -> dict[str, Any]:
        """Settings that the values depend on."""
        return {"split": self.split, "max_rows": self.max_rows, "limit": self.limit}

    def run(self, round: Round) -> dict[str, float]:
        """`std`: 0 = collapsed, 1 = isotropic. `rankme`: between 1 and D."""
        x = round.features(self.split, self.limit).spread(self.max_rows).x.to(round.device)
        return {"std": float(feature_std(x)), "rankme": float(rankme(x))}
