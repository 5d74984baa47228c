"""Scaling laws: loss as a function of parameters N and tokens D, fitted to a table of finished runs.

Two forms. Hoffmann et al. (2022, arXiv:2203.15556, eq. 10), known as Chinchilla: L = E + A / N^alpha + B / D^beta.
Kaplan et al. (2020, arXiv:2001.08361, eq. 1.5): L = ((Nc / N)^(aN / aD) + Dc / D)^aD, with no floor under the loss.

Both are fitted as in appendix D.2 of Hoffmann et al.: the sum over runs of the Huber loss (delta = 1e-3) of the
differences of log L, from every start of a grid, the best end counts. Where they run L-BFGS from one start after the
other, all starts take damped Gauss-Newton steps on the reweighted squares (Huber, 1964) at once: the objective is the
same, its value never rises, and five parameters need no approximate curvature.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from ssl_lab.errors import UserError

DELTA = 1e-3
_RESAMPLES = 200
Curve = Callable[[Tensor], tuple[Tensor, Tensor]]  # theta (S, P) -> log L (S, M) and its derivatives (S, M, P)


@dataclass(frozen=True)
class Point:
    """One finished run: parameters, tokens it was trained on, loss at its end in nats (or any unit above 0)."""

    parameters: float
    tokens: float
    loss: float


class Law(Protocol):
    """A fitted law. `work` are FLOPs per parameter and token: 6 for a plain language model (Kaplan et al.)."""

    def loss(self, parameters: float, tokens: float) -> float:
        """Foretold for one run."""
        ...

    def best_parameters(self, flops: float, work: float = 6.0) -> float:
        """N of the lowest loss where flops = work N D; D follows."""
        ...

    @property
    def exponent(self) -> float:
        """Power of the compute by which the best N grows; D grows by one minus that."""
        ...


@dataclass(frozen=True)
class Chinchilla:
    """L = E + A / N^alpha + B / D^beta."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, parameters: float, tokens: float) -> float:
        return self.E + _power(self.A, parameters, -self.alpha) + _power(self.B, tokens, -self.beta)

    def best_parameters(self, flops: float, work: float = 6.0) -> float:
        """Eq. 4 of Hoffmann et al.: G (C / work)^a."""
        balance = math.log(self.alpha * self.A) - math.log(self.beta * self.B)
        return _exp(balance / (self.alpha + self.beta) + self.exponent * math.log(flops / work))

    @property
    def exponent(self) -> float:
        return self.beta / (self.alpha + self.beta)


@dataclass(frozen=True)
class Kaplan:
    """L = ((Nc / N)^(alpha_n / alpha_d) + Dc / D)^alpha_d."""

    Nc: float
    Dc: float
    alpha_n: float
    alpha_d: float

    def loss(self, parameters: float, tokens: float) -> float:
        share = self.alpha_n / self.alpha_d
        return _power(1.0, _power(1.0, self.Nc / parameters, share) + self.Dc / tokens, self.alpha_d)

    def best_parameters(self, flops: float, work: float = 6.0) -> float:
        """Where the derivative of the inner sum along work N D = flops is 0.

        Another question than the compute-efficient frontier of the paper, which stops large models early.
        """
        p = self.alpha_n / self.alpha_d
        return _exp((math.log(p * flops / (work * self.Dc)) + p * math.log(self.Nc)) * self.exponent)

    @property
    def exponent(self) -> float:
        return 1 / (1 + self.alpha_n / self.alpha_d)


L = TypeVar("L", bound=Law)


@dataclass(frozen=True)
class Fit(Generic[L]):
    """A law and how far to trust it.

    Attributes:
        law: the best end of all starts.
        objective: sum of the Huber losses.
        error: root mean square of the differences of log L.
        ranges: name of a constant, or `exponent` -> 10th and 90th percentile over fits to runs drawn with replacement.
        note: why the constants should not be used, None = no reason was found.
    """

    law: L
    objective: float
    error: float
    ranges: dict[str, tuple[float, float]]
    note: str | None = None


def fit_chinchilla(points: Sequence[Point], *, resamples: int = _RESAMPLES) -> Fit[Chinchilla]:
    """The grid of starts is the paper's: 4,500 of them.

    Raises:
        UserError: fewer than 6 runs, or fewer than 3 different N or D.
    """
    n, d, _ = _logs(points, least=6)
    centre_n, centre_d = float(n.mean()), float(d.mean())

    def curve(theta: Tensor) -> tuple[Tensor, Tensor]:
        a, b, e, alpha, beta = theta.unsqueeze(-1).unbind(1)
        terms = torch.stack([a - alpha * (n - centre_n), b - beta * (d - centre_d), e.expand(-1, len(n))], -1)
        share = terms.softmax(-1)
        slopes = [share, -share[..., :1] * (n - centre_n)[:, None], -share[..., 1:2] * (d - centre_d)[:, None]]
        return terms.logsumexp(-1), torch.cat(slopes, -1)

    def law(theta: Tensor) -> Chinchilla:
        a, b, e, alpha, beta = theta.tolist()
        return Chinchilla(_exp(e), _exp(a + alpha * centre_n), _exp(b + beta * centre_d), alpha, beta)

    halves = [0.0, 0.5, 1.0, 1.5, 2.0]
    fives = [0.0, 5.0, 10.0, 15.0, 20.0, 25.0]
    starts = [
        (a - alpha * centre_n, b - beta * centre_d, e, alpha, beta)
        for alpha, beta, e, a, b in itertools.product(halves, halves, [-1.0, -0.5, 0.0, 0.5, 1.0], fives, fives)
    ]
    return _fit(curve, starts, points, law, resamples)


def fit_kaplan(points: Sequence[Point], *, resamples: int = _RESAMPLES) -> Fit[Kaplan]:
    """The paper names no grid; this one spans its constants and those of far smaller tasks.

    Raises:
        UserError: fewer than 5 runs, or fewer than 3 different N or D.
    """
    n, d, _ = _logs(points, least=5)
    centre_n, centre_d = float(n.mean()), float(d.mean())

    def curve(theta: Tensor) -> tuple[Tensor, Tensor]:
        c, k, alpha, log_q = theta.unsqueeze(-1).unbind(1)
        q = log_q.exp()
        size = (c - alpha * (n - centre_n)) / q
        terms = torch.stack([size, k - (d - centre_d)], -1)
        total, share = terms.logsumexp(-1), terms.softmax(-1)
        slopes = [share[..., 0], q * share[..., 1], -share[..., 0] * (n - centre_n), q * (total - share[..., 0] * size)]
        return q * total, torch.stack(slopes, -1)

    def law(theta: Tensor) -> Kaplan:
        c, k, alpha, log_q = theta.tolist()
        return Kaplan(_exp(c / alpha + centre_n) if alpha else math.inf, _exp(k + centre_d), alpha, _exp(log_q))

    powers, sizes = [0.05, 0.1, 0.2, 0.4], [10.0, 15.0, 20.0, 25.0, 30.0, 35.0]
    starts = [
        (alpha * (nc - centre_n), dc - centre_d, alpha, math.log(q))
        for alpha, q, nc, dc in itertools.product(powers, powers, sizes, sizes)
    ]
    return _fit(curve, starts, points, law, resamples)


def _logs(points: Sequence[Point], *, least: int) -> tuple[Tensor, Tensor, Tensor]:
    """Natural logarithms of N, D and L, each (M,) float64."""
    sizes, lengths = {p.parameters for p in points}, {p.tokens for p in points}
    if len(points) < least or len(sizes) < 3 or len(lengths) < 3:
        raise UserError(
            f"a law needs {least} finished runs with 3 sizes and 3 lengths among them, there are {len(points)} with "
            f"{len(sizes)} and {len(lengths)}: give more sizes= or durations="
        )
    if min(min(p.parameters, p.tokens, p.loss) for p in points) <= 0:
        raise UserError("a law of powers needs losses above 0")
    return tuple(  # type: ignore[return-value]
        torch.tensor([getattr(p, name) for p in points], dtype=torch.float64).log()
        for name in ("parameters", "tokens", "loss")
    )


def _fit(
    curve: Curve,
    starts: Sequence[Sequence[float]],
    points: Sequence[Point],
    law: Callable[[Tensor], L],
    resamples: int,
) -> Fit[L]:
    target = torch.tensor([p.loss for p in points], dtype=torch.float64).log()
    everything = torch.ones(1, len(points), dtype=torch.float64)
    theta, value = _descend(curve, torch.tensor(starts, dtype=torch.float64), target, everything, steps=60)
    front = theta[value.argsort()[:32]]  # the rest has had its chance; these go on to the bottom
    theta, value = _descend(curve, front, target, everything, steps=2000)
    best = theta[value.argmin()]
    found = law(best)
    residual = curve(best[None])[0][0] - target
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(points), (resamples, len(points)), generator=generator)
    counts = torch.zeros(resamples, len(points), dtype=torch.float64)
    counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
    others = [law(row) for row in _descend(curve, best.expand(resamples, -1), target, counts, steps=500)[0]]
    constants = [{**asdict(one), "exponent": one.exponent} for one in others]  # type: ignore[call-overload]
    ranges = {name: _percentiles([row[name] for row in constants]) for name in constants[0]} if constants else {}
    return Fit(found, float(value.min()), float(residual.square().mean().sqrt()), ranges, _doubt(found))


def _descend(curve: Curve, theta: Tensor, target: Tensor, counts: Tensor, *, steps: int) -> tuple[Tensor, Tensor]:
    """Lower sum(counts * huber(log L - target)) from every row of `theta` (S, P) at once; gives ends and values."""

    def objective(residual: Tensor) -> Tensor:
        size = residual.abs()
        huber = torch.where(size <= DELTA, 0.5 * size.square(), DELTA * (size - 0.5 * DELTA))
        return (counts * huber).sum(1).nan_to_num(nan=math.inf)

    damping = torch.full((len(theta),), 1e-2, dtype=theta.dtype)
    log_loss, slopes = curve(theta)
    residual, eye = log_loss - target, torch.eye(theta.shape[1], dtype=theta.dtype)
    value, still = objective(residual), 0
    for _ in range(steps):
        weight = counts / residual.abs().clamp(min=DELTA)  # squares that touch the Huber loss from above
        weighted = slopes * weight[..., None]
        gradient, curvature = (weighted * residual[..., None]).sum(1), weighted.mT @ slopes
        scale = torch.diagonal(curvature, dim1=1, dim2=2).clamp(min=1e-12)
        step = torch.linalg.solve(curvature + eye * (damping[:, None] * scale + 1e-14)[:, None], gradient)
        trial = theta - step
        log_loss, trial_slopes = curve(trial)
        trial_value = objective(log_loss - target)
        better = trial_value < value
        still = 0 if bool((better & (value - trial_value > 1e-13 * value)).any()) else still + 1
        theta, value = torch.where(better[:, None], trial, theta), torch.where(better, trial_value, value)
        residual = torch.where(better[:, None], log_loss - target, residual)
        slopes = torch.where(better[:, None, None], trial_slopes, slopes)
        damping = torch.where(better, damping / 3, damping * 4).clamp(1e-12, 1e12)
        if still > 20:
            break
    return theta, value


def _doubt(law: Law) -> str | None:
    constants = asdict(law)  # type: ignore[call-overload]
    wrong = [
        name
        for name, value in constants.items()
        if not (1e-3 < value < 5 if "alpha" in name or name == "beta" else 0 <= value < math.inf)
    ]
    return f"these runs do not determine {', '.join(wrong)}" if wrong else None


def _percentiles(values: list[float]) -> tuple[float, float]:
    ordered = sorted(values)
    return ordered[round(0.1 * (len(ordered) - 1))], ordered[round(0.9 * (len(ordered) - 1))]


def _power(factor: float, base: float, exponent: float) -> float:
    """factor * base ** exponent, without an end where that is beyond all numbers."""
    return _exp(math.log(factor) + exponent * math.log(base)) if factor > 0 and base > 0 else 0.0


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf
