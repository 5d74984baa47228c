"""Accuracy and F1 of a method that has a classifier of its own, as tasks of GLUE are judged (arXiv:1804.07461)."""

from dataclasses import dataclass
from typing import Any, ClassVar, cast

from torchmetrics.functional.classification import binary_f1_score, multiclass_accuracy, multiclass_f1_score

from ssl_lab.evals.base import Common, Round, require_head
from ssl_lab.types import Classifies


@dataclass(frozen=True)
class TextAccuracy(Common):
    """Share of test rows that are right, and F1: of class 1 where there are two (MRPC), else the mean over classes."""

    needs: ClassVar[type] = Classifies

    @property
    def protocol(self) -> dict[str, Any]:
        """Settings that the values depend on."""
        return {"head": "the method's own", "f1": "of class 1 of two, else macro", "limit": self.limit}

    def run(self, round: Round) -> dict[str, float]:
        """`accuracy` and `f1` in percent of the labelled test rows."""
        scored = round.extract(cast(Classifies, round.method).classify, "test", self.limit)
        test = round.only_labelled(scored, "test")
        require_head(test.x, round.data.classes)
        guess, classes = test.x.argmax(1), test.x.shape[1]
        right = multiclass_accuracy(guess, test.y, classes, average="micro")
        f1 = binary_f1_score(guess, test.y) if classes == 2 else multiclass_f1_score(guess, test.y, classes)
        return {"accuracy": 100 * float(right), "f1": 100 * float(f1)}
