"""Linear probe on frozen features; its learning rates are tried side by side."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_lab.errors import UserError
from ssl_lab.evals.base import Common, Round, Skip, accuracy
from ssl_lab.evals.features import num_classes
from ssl_lab.schedules import Cosine
from ssl_lab.types import Embeds


@dataclass(frozen=True)
class Linear(Common):
    """Softmax regression by AdamW; the rate is chosen without the test split.

    Heads for all rates see the same batches in one pass. They are first trained without a held-out share of the
    training rows, which then chooses the rate; then on all training rows, and the chosen one is reported. Weights start
    at 0, so the order of the rows is the only randomness, and it comes from `seed` alone.

    Args:
        rates: peak learning rates, each followed by a cosine to 0.
        passes: over the training rows.
        batch_size: rows per step.
        weight_decay: of AdamW, not on biases.
        standardize: give every feature zero mean and unit variance over the training rows, the part of the affine-free
            batch norm before MAE's probe (arXiv:2111.06377).
        held_out: share of the training rows that chooses the rate.
        seed: of the order of rows and of the held-out choice.
    """

    rates: Sequence[float] = (1e-3, 3e-3, 1e-2)
    passes: int = 20
    batch_size: int = 1024
    weight_decay: float = 0.0
    standardize: bool = True
    held_out: float = 0.1
    seed: int = 0
    needs: ClassVar[type] = Embeds

    def __post_init__(self) -> None:
        require_fit("linear", self.rates, self.batch_size)
        if self.passes < 1:
            raise UserError(f"linear.passes={self.passes}: at least 1 pass trains the heads")
        if not 0 < self.held_out < 1:
            raise UserError(f"linear.held_out={self.held_out:g}: give a share of the training rows between 0 and 1")

    @property
    def protocol(self) -> dict[str, Any]:
        """Settings that the values depend on."""
        return {
            "optimizer": "AdamW, cosine to 0",
            "rates": [float(rate) for rate in self.rates],
            "rate_chosen_on": f"{self.held_out:g} of the training rows, held out; then trained on all of them",
            "passes": self.passes,
            "batch_size": self.batch_size,
            "weight_decay": self.weight_decay,
            "standardize": self.standardize,
            "seed": self.seed,
            "limit": self.limit,
        }

    def run(self, round: Round) -> dict[str, float]:
        """Percent of test rows: top1, top5; as details the rate, and what each gave on test and held-out rows."""
        train, test = round.labelled("train", self.limit), round.labelled("test", self.limit)
        if len(train.y) < 2:
            raise Skip("a linear probe needs at least 2 labelled training rows")
        classes = num_classes(train, test)
        x, x_test = standardized(train.x, test.x) if self.standardize else (train.x, test.x)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(self.seed)).to(x.device)
        held, rest = torch.split(order, [n := max(1, int(len(x) * self.held_out)), len(x) - n])

        chooser = self._fit(x[rest], train.y[rest], classes)
        chosen = [accuracy(scores, train.y[held])["top1"] for scores in chooser(x[held])]
        best = chosen.index(max(chosen))
        tested = [accuracy(scores, test.y) for scores in self._fit(x, train.y, classes)(x_test)]
        details = {"chosen/lr": float(self.rates[best])}
        for rate, on_held, on_test in zip(self.rates, chosen, tested, strict=True):
            details |= {f"lr_{rate:g}/top1": on_test["top1"], f"lr_{rate:g}/held_out_top1": on_held}
        return tested[best] | details

    def _fit(self, x: Tensor, y: Tensor, classes: int) -> "Heads":
        return fit(x, y, classes, self.rates, self.passes, self.batch_size, self.weight_decay, self.seed)


@dataclass(frozen=True)
class Heads:
    """R linear heads: weight (R, D, C) and bias (R, C)."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """(N, D) -> logits (R, N, C)."""
        return x @ self.weight + self.bias[:, None]


def require_fit(name: str, rates: Sequence[float], batch_size: int) -> None:
    """Raise a `UserError` that names evaluator `name` where `fit` has nothing to choose from or to train on."""
    if not rates or not all(rate > 0 for rate in rates):
        raise UserError(f"{name}.rates={list(rates)}: give learning rates above 0")
    if batch_size < 1:
        raise UserError(f"{name}.batch_size={batch_size}: a step takes at least 1 row")


def fit(
    x: Tensor,
    y: Tensor,
    classes: int,
    rates: Sequence[float],
    passes: int,
    batch_size: int,
    weight_decay: float,
    seed: int,
) -> Heads:
    """Features (N, D), classes (N,) -> one head per rate; each is the head that its rate alone would give."""
    (N, D), R = x.shape, len(rates)
    weights = [torch.zeros(D, classes, device=x.device, requires_grad=True) for _ in rates]
    biases = [torch.zeros(classes, device=x.device, requires_grad=True) for _ in rates]
    groups = [{"params": [w], "lr": r, "weight_decay": weight_decay} for w, r in zip(weights, rates, strict=True)]
    groups += [{"params": [b], "lr": r, "weight_decay": 0.0} for b, r in zip(biases, rates, strict=True)]
    optimizer = torch.optim.AdamW(groups, fused=True)
    generator, factor = torch.Generator().manual_seed(seed), Cosine(1.0, 0.0)
    total, step = passes * -(-N // batch_size), 0
    for _ in range(passes):
        for rows in torch.split(torch.randperm(N, generator=generator).to(x.device), batch_size):
            for group, rate in zip(optimizer.param_groups, [*rates, *rates], strict=True):
                group["lr"] = rate * factor(step / total)
            with torch.enable_grad():
                logits = torch.addmm(torch.cat(biases), x[rows], torch.cat(weights, 1)).view(-1, R, classes)
                target = y[rows, None].expand(-1, R)
                loss = F.cross_entropy(logits.transpose(1, 2), target, reduction="sum") / len(rows)
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
    return Heads(torch.stack(weights).detach(), torch.stack(biases).detach())


def standardized(x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """`x` (N, D) with zero mean and unit variance per feature, and the others by the same shift and scale."""
    mean, scale = scaling(x)
    return tuple((part - mean) * scale for part in (x, *others))


def scaling(x: Tensor) -> tuple[Tensor, Tensor]:
    """Features (N, D) -> mean (D,) and the reciprocal of the standard deviation (D,).

    It is 0 for a feature that is constant up to rounding.
    """
    mean, std = x.mean(0), x.std(0, correction=0)
    return mean, torch.where(std > 1e-6 * (mean.abs() + std.max()), 1 / std, 0.0)
