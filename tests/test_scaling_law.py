"""Fits of scaling laws: known constants come back, best sizes are where a search finds them."""

import math

import pytest
import torch

from ssl_lab.bench.scaling_law import Chinchilla, Kaplan, Point, _descend, fit_chinchilla, fit_kaplan
from ssl_lab.bench.scaling_report import Measured, conclude
from ssl_lab.errors import UserError

HOFFMANN = Chinchilla(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)  # eq. 10 of arXiv:2203.15556
KAPLAN = Kaplan(Nc=6.4e13, Dc=1.8e13, alpha_n=0.076, alpha_d=0.103)  # table 2 of arXiv:2001.08361


def runs(law, sizes, lengths, noise=0.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [
        Point(n, d, law.loss(n, d) * math.exp(noise * float(torch.randn((), generator=g, dtype=torch.float64))))
        for n in sizes
        for d in lengths
    ]


SIZES = [7e7, 2e8, 6e8, 2e9, 6e9, 1.6e10]
LENGTHS = [5e9, 2e10, 8e10, 3e11, 5e11]


def test_the_published_law_of_chinchilla_comes_back() -> None:
    fit = fit_chinchilla(runs(HOFFMANN, SIZES, LENGTHS), resamples=0)
    for name in ("E", "A", "B", "alpha", "beta"):
        assert getattr(fit.law, name) == pytest.approx(getattr(HOFFMANN, name), rel=1e-4), name
    assert fit.law.exponent == pytest.approx(0.28 / 0.62, rel=1e-4) and fit.error < 1e-7 and fit.note is None


def test_with_noise_and_an_outlier_the_ranges_hold_the_truth() -> None:
    points = runs(HOFFMANN, SIZES, LENGTHS, noise=1e-3)
    spoiled = points[:7] + [Point(points[7].parameters, points[7].tokens, points[7].loss * 1.2)] + points[8:]
    fit = fit_chinchilla(spoiled, resamples=100)
    assert fit.law.alpha == pytest.approx(0.34, abs=0.02) and fit.law.beta == pytest.approx(0.28, abs=0.02)
    assert pytest.approx(1.69, abs=0.05) == fit.law.E
    low, high = fit.ranges["exponent"]
    assert low < fit.law.exponent < high and high - low < 0.05


def test_kaplan_comes_back() -> None:
    fit = fit_kaplan(runs(KAPLAN, [1e5, 1e6, 1e7, 1e8, 1e9], [2e7, 2e8, 2e9, 2e10]), resamples=0)
    assert fit.law.alpha_n == pytest.approx(0.076, rel=1e-3) and fit.law.alpha_d == pytest.approx(0.103, rel=1e-3)
    assert math.log(fit.law.Nc) == pytest.approx(math.log(6.4e13), rel=1e-3)
    assert math.log(fit.law.Dc) == pytest.approx(math.log(1.8e13), rel=1e-3)


def test_small_tasks_are_fitted_too() -> None:
    small = Chinchilla(E=1.2, A=20, B=300, alpha=0.4, beta=0.5)
    fit = fit_chinchilla(runs(small, [1e4, 4e4, 2e5, 1e6], [1e5, 4e5, 2e6]), resamples=0)
    assert fit.law.loss(3e5, 3e6) == pytest.approx(small.loss(3e5, 3e6), rel=1e-4)


@pytest.mark.parametrize("law", [HOFFMANN, KAPLAN])
@pytest.mark.parametrize("work", [6.0, 3.5])
def test_the_best_size_is_where_a_search_finds_it(law, work) -> None:
    flops = 5.76e23
    sizes = torch.linspace(math.log(1e7), math.log(1e13), 40001, dtype=torch.float64).exp().tolist()
    found = min(sizes, key=lambda n: law.loss(n, flops / (work * n)))
    assert law.best_parameters(flops, work) == pytest.approx(found, rel=1e-3)
    grown = law.best_parameters(10 * flops, work) / law.best_parameters(flops, work)
    assert math.log10(grown) == pytest.approx(law.exponent, rel=1e-9)


def test_descending_ends_where_lbfgs_cannot_go_lower() -> None:
    """A plain problem whose minimum torch's own L-BFGS finds too: a line through points with one far off."""
    x, y = torch.arange(5.0, dtype=torch.float64), torch.tensor([0.0, 1.1, 1.9, 3.0, 9.0], dtype=torch.float64)
    x, y = x / 1000, y / 1000
    slopes = torch.stack([torch.ones_like(x), x], -1)

    def line(theta):
        return theta @ slopes.T, slopes.expand(len(theta), -1, -1)

    theta, value = _descend(line, torch.zeros(1, 2, dtype=torch.float64), y, torch.ones(1, 5).double(), steps=3000)
    free = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([free], max_iter=500, line_search_fn="strong_wolfe", tolerance_grad=1e-14)

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.huber_loss(slopes @ free, y, delta=1e-3, reduction="sum") * 1e6
        loss.backward()
        return loss

    optimizer.step(closure)
    assert float(value) == pytest.approx(float(closure().detach()) / 1e6, rel=1e-6)
    torch.testing.assert_close(theta[0], free.detach(), rtol=1e-3, atol=1e-7)


def test_too_few_runs_are_refused() -> None:
    with pytest.raises(UserError, match="there are 4 with 2 and 2"):
        fit_chinchilla(runs(HOFFMANN, SIZES[:2], LENGTHS[:2]))
    with pytest.raises(UserError, match="above 0"):
        fit_kaplan([Point(p.parameters, p.tokens, p.loss - 5) for p in runs(HOFFMANN, SIZES, LENGTHS)])


def test_what_the_runs_do_not_determine_is_said() -> None:
    rising = [Point(n, d, 2.0 + 0.1 * math.log(n)) for n in (1e5, 1e6, 1e7) for d in (1e6, 1e7, 1e8)]
    assert "do not determine" in (fit_kaplan(rising, resamples=0).note or "")


def test_runs_that_follow_no_law_are_called_so() -> None:
    facts = {"size": "", "duration": "", "unit": "tokens", "flops": 1e12, "epochs": 1.0}
    learned_by_heart = {  # N -> losses after 205k, 614k and 1.84M tokens of generated sentences
        5776: (2.3675, 1.7797, 1.1981),
        17696: (2.0536, 1.4927, 0.3099),
        110272: (1.6802, 0.4536, 0.2003),
        239000: (1.5681, 0.2943, 0.1651),
    }
    jumping = [
        Measured(n, d, loss, **facts)
        for n, losses in learned_by_heart.items()
        for d, loss in zip((204800, 614400, 1843200), losses, strict=True)
    ]
    assert any("they follow no such law" in note for note in conclude("jump", jumping).notes)
    smooth = [Measured(p.parameters, p.tokens, p.loss, **facts) for p in runs(HOFFMANN, SIZES, LENGTHS)]
    assert not any("Chinchilla" in note for note in conclude("smooth", smooth).notes)
