"""Test accuracy of a method that has a classifier of its own."""

from dataclasses import dataclass
from typing import Any, ClassVar, cast

from ssl_lab.evals.base import Common, Round, accuracy, require_head
from ssl_lab.types import Classifies


@dataclass(frozen=True)
class Accuracy(Common):
    """Share of test images that the method's own classifier gets right."""

    needs: ClassVar[type] = Classifies

    @property
    def protocol(self) -> dict[str, Any]:
        """Settings that the values depend on."""
        return {"head": "the method's own", "limit": self.limit}

    def run(self, round: Round) -> dict[str, float]:
        """Percent of labelled test rows: top1, and top5 where there are more than 5 classes."""
        scored = round.extract(cast(Classifies, round.method).classify, "test", self.limit)
        test = round.only_labelled(scored, "test")
        require_head(test.x, round.data.classes)
        return accuracy(test.x, test.y)
