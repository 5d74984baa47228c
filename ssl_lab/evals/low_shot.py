"""Linear probe and kNN with few labels: 1 % and 10 % of the training rows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ssl_lab.errors import UserError
from ssl_lab.evals.base import Common, Round, Skip, accuracy
from ssl_lab.evals.features import num_classes
from ssl_lab.evals.knn import knn_votes, require_vote
from ssl_lab.evals.linear import Heads, fit, require_fit, scaling
from ssl_lab.subsets import balanced, per_class, ranks
from ssl_lab.types import Embeds


@dataclass(frozen=True)
class LowShot(Common):
    """The linear probe's heads on a seeded subset with equally many rows of each class, tested on the whole test split.

    A held-out tenth of so few rows says little about the rate, so the rate is chosen by cross-validation: each row of
    the subset is scored once by heads that never saw it, with as many rows of each class in every fold. Equal scores
    choose the lower rate. Then all rows of the subset train the head that is reported. Steps are counted rather than
    passes, since 20 passes over 100 rows would be 20 steps. Frozen features and 1 % of the labels are the regime of MSN
    (arXiv:2204.07141); the 1 % and 10 % of SimCLR (arXiv:2002.05709) fine-tune the encoder instead.

    Args:
        fractions: shares of the labelled training rows, each in (0, 1].
        rates: peak learning rates, each followed by a cosine to 0.
        steps: of AdamW, at least.
        folds: of the cross-validation, at most as many as there are rows of each class.
        batch_size: rows per step.
        standardize: by mean and deviation of every feature over the whole training split, which needs no labels.
        k: neighbours that vote in kNN on the same rows, at most as many as a class has.
        temperature: of that vote.
        seed: of the subset and of the order of rows.
    """

    fractions: Sequence[float] = (0.01, 0.1)
    rates: Sequence[float] = (1e-3, 3e-3, 1e-2, 3e-2)
    steps: int = 200
    folds: int = 5
    batch_size: int = 1024
    standardize: bool = True
    k: int = 20
    temperature: float = 0.07
    seed: int = 0
    needs: ClassVar[type] = Embeds

    def __post_init__(self) -> None:
        if not self.fractions or not all(0 < fraction <= 1 for fraction in self.fractions):
            raise UserError(f"low_shot.fractions={list(self.fractions)}: give shares of the training rows in (0, 1]")
        if self.folds < 2:
            raise UserError(f"low_shot.folds={self.folds}: cross-validation needs at least 2")
        if self.steps < 1:
            raise UserError(f"low_shot.steps={self.steps}: at least 1 step trains the heads")
        require_fit("low_shot", self.rates, self.batch_size)
        require_vote("low_shot", self.k, self.temperature)

    @property
    def protocol(self) -> dict[str, Any]:
        """Settings that the values depend on."""
        return {
            "optimizer": "AdamW, cosine to 0",
            "fractions": [float(fraction) for fraction in self.fractions],
            "rates": [float(rate) for rate in self.rates],
            "rate_chosen_by": f"{self.folds}-fold cross-validation in the subset",
            "steps": self.steps,
            "batch_size": self.batch_size,
            "standardize": self.standardize,
            "k": self.k,
            "temperature": self.temperature,
            "seed": self.seed,
            "limit": self.limit,
        }

    def run(self, round: Round) -> dict[str, float]:
        """Percent of test rows: `top1_1pct`, `knn_1pct`, ...; as details the rate and the number of rows.

        A fraction that leaves less than 2 rows of each class is left out with a note.

        Raises:
            Skip: every fraction does, or there are no labels.
        """
        train, test = round.labelled("train", self.limit), round.labelled("test", self.limit)
        classes = num_classes(train, test)
        mean, scale = scaling(train.x) if self.standardize else (torch.zeros(()), torch.ones(()))
        values: dict[str, float] = {}
        reasons = []
        for fraction in self.fractions:
            name = f"{100 * fraction:g}pct"
            rows, each = balanced(train.y, fraction, self.seed), per_class(train.y, fraction)
            if each < 2:
                reasons.append(
                    f"{100 * fraction:g} % of {len(train.y)} labelled training rows leaves {each} of each class, at "
                    "least 2 are needed"
                )
                continue
            x = (train.x[rows] - mean) * scale
            heads, best = self._probe(x, train.y[rows], classes, min(self.folds, each))
            values[f"top1_{name}"] = accuracy(heads((test.x - mean) * scale)[best], test.y)["top1"]
            votes = knn_votes(train.x[rows], train.y[rows], test.x, classes, min(self.k, each), self.temperature)
            values[f"knn_{name}"] = accuracy(votes, test.y)["top1"]
            values |= {f"chosen/lr_{name}": float(self.rates[best]), f"chosen/rows_{name}": float(len(rows))}
        if not values:
            raise Skip("; ".join(reasons))
        round.notes += reasons
        return values

    def _probe(self, x: Tensor, y: Tensor, classes: int, folds: int) -> tuple[Heads, int]:
        """Heads trained on all rows, one for each rate, and the place of the rate that cross-validation chose."""
        fold = ranks(y) % folds
        right = torch.zeros(len(self.rates), device=x.device)
        for i in range(folds):
            scores = self._fit(x[fold != i], y[fold != i], classes)(x[fold == i])
            right += (scores.argmax(2) == y[fold == i]).sum(1)
        return self._fit(x, y, classes), int(right.argmax())

    def _fit(self, x: Tensor, y: Tensor, classes: int) -> Heads:
        passes = math.ceil(self.steps / math.ceil(len(y) / self.batch_size))
        return fit(x, y, classes, self.rates, passes, self.batch_size, 0.0, self.seed)
