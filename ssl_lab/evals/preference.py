"""Pairs of answers that were never seen: which one does a method reward more?"""

from dataclasses import dataclass
from typing import Any, ClassVar, cast

from torch import Tensor

from ssl_lab.evals.base import Common, Round, Skip
from ssl_lab.types import Batch, Prefers


@dataclass(frozen=True)
class Preference(Common):
    """Rewards of the chosen and the rejected answers of the test split."""

    needs: ClassVar[type] = Prefers

    @property
    def protocol(self) -> dict[str, Any]:
        """Settings that the values depend on."""
        return {"limit": self.limit}

    def run(self, round: Round) -> dict[str, float]:
        """`accuracy`: how often the chosen answer has the higher reward (%); `margin`, mean; `chosen`, `rejected`.

        Raises:
            Skip: the test data hold no pairs of answers.
        """
        if not getattr(getattr(round.data, "test", None), "paired", False):
            raise Skip("the test data have no worse answers: choose e.g. data=shapes_preferences")
        method = cast(Prefers, round.method)

        def rewards(batch: Batch) -> Tensor:
            return method.rewards(batch)

        chosen, rejected = round.extract(rewards, "test", self.limit).x.double().T
        margin = chosen - rejected
        return {
            "accuracy": 100 * float((margin > 0).double().mean()),
            "margin": float(margin.mean()),
            "chosen": float(chosen.mean()),
            "rejected": float(rejected.mean()),
        }
