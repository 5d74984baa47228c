"""What a sweep over sizes and lengths says: its runs, the laws through them, and the best size for a budget."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from ssl_lab.bench.scaling_law import Fit, Law, Point, fit_chinchilla, fit_kaplan
from ssl_lab.errors import UserError

_BEYOND = (1, 10, 100)  # budgets, in FLOPs of the largest run
_ROUGH = 0.05  # root mean square difference of log L that a law may have and still be one
_OPEN = 0.3  # width of an exponent's range beyond which it tells nothing
_REPEATED = 4  # epochs; more of the same tokens teach clearly less than fresh ones (arXiv:2305.16264)


@dataclass(frozen=True, kw_only=True)
class Measured(Point):
    """A finished run. `flops` are those of the whole run, `unit` is what D counts: tokens or samples."""

    size: str
    duration: str
    unit: str
    flops: float
    epochs: float


@dataclass(frozen=True)
class Best:
    """The run of a law with the lowest loss for a number of FLOPs."""

    law: str
    times_largest: float
    flops: float
    parameters: float
    tokens: float
    loss: float


@dataclass(frozen=True)
class Result:
    """All that is told. `work` are measured FLOPs per parameter and token, 6 in the approximation of Kaplan et al."""

    name: str
    unit: str
    work: float
    measured: list[Measured]
    laws: dict[str, Fit[Any]]
    best: list[Best]
    notes: list[str]
    failed: list[str]

    def markdown(self) -> str:
        """Runs, laws and best sizes as tables."""
        return "\n".join(self._lines()) + "\n"

    def _lines(self) -> Iterator[str]:
        laws = {name: fit for name, fit in self.laws.items() if fit.note is None}
        yield f"# {self.name}: loss over parameters N and {self.unit} D"
        yield ""
        yield from _table(
            ["size", "duration", "N", "D", "FLOPs", "loss", *(f"{name} says" for name in laws)],
            (
                [m.size, m.duration, _short(m.parameters), _short(m.tokens), f"{m.flops:.2e}", f"{m.loss:.4f}"]
                + [f"{fit.law.loss(m.parameters, m.tokens):.4f}" for fit in laws.values()]
                for m in self.measured
            ),
        )
        for name, fit in self.laws.items():
            yield from ["", f"{name}: {_constants(fit)}; root mean square error of log L {fit.error:.2g}"]
            if fit.note is not None:
                yield f"-> {fit.note}"
            elif fit.ranges:
                low, high = fit.ranges["exponent"]
                told = f" (80 % of resampled fits: {low:.2f} to {high:.2f})"
                yield f"best N grows as FLOPs^{fit.law.exponent:.2f}{told}"
        if self.best:
            yield from ["", f"Lowest loss for a budget ({self.work:.3g} FLOPs per parameter and {self.unit[:-1]}):", ""]
            yield from _table(
                ["law", "budget", "FLOPs", "N", "D", "loss"],
                (
                    [b.law, f"{b.times_largest:g} x the largest run", f"{b.flops:.2e}"]
                    + [_short(b.parameters), _short(b.tokens), f"{b.loss:.3f}"]
                    for b in self.best
                ),
            )
        yield from (f"\n-> {note}" for note in self.notes)
        yield from (f"\nfailed: {text}" for text in self.failed)


def conclude(name: str, measured: Sequence[Measured], failed: Sequence[str] = ()) -> Result:
    """Fit both laws to what there is; why one could not be fitted becomes a note."""
    unit = measured[0].unit if measured else "samples"
    work = median(m.flops / (m.parameters * m.tokens) for m in measured) if measured else 6.0
    laws: dict[str, Fit[Any]] = {}
    notes: list[str] = []
    fits: dict[str, Callable[..., Fit[Any]]] = {"Chinchilla": fit_chinchilla, "Kaplan": fit_kaplan}
    for law, fitted in fits.items():
        try:
            laws[law] = fitted(measured)
        except UserError as error:
            notes.append(f"{law}: {error}")
    notes += [
        f"{law}: the runs are off by {fit.error:.0%}: they follow no such law, so do not build on its sizes"
        for law, fit in laws.items()
        if fit.note is None and fit.error > _ROUGH
    ]
    for law, fit in laws.items():
        low, high = fit.ranges.get("exponent", (0.0, 0.0))
        if fit.note is None and high - low > _OPEN:
            notes.append(f"{law}: these runs leave open how the best N grows: more sizes, and more lengths of each")
    if (most := max((m.epochs for m in measured), default=0.0)) > _REPEATED:
        notes.append(f"the longest run saw its data {most:.1f} times: repeated data teach less than the laws assume")
    best = [b for law, fit in laws.items() if fit.note is None for b in _budgets(law, fit.law, measured, work)]
    return Result(name, unit, work, list(measured), laws, best, notes, list(failed))


def _budgets(name: str, law: Law, measured: Sequence[Measured], work: float) -> Iterator[Best]:
    largest = max(m.flops for m in measured)
    for times in _BEYOND:
        size = law.best_parameters(times * largest, work)
        tokens = times * largest / (work * size)
        yield Best(name, times, times * largest, size, tokens, law.loss(size, tokens))


def _constants(fit: Fit[Any]) -> str:
    return ", ".join(
        f"{name} {value:.3g}" + (f" ({fit.ranges[name][0]:.3g} to {fit.ranges[name][1]:.3g})" if fit.ranges else "")
        for name, value in asdict(fit.law).items()
    )


def _table(head: list[str], rows: Iterator[list[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|" + "|".join("---" if i < 2 else "--:" for i in range(len(head))) + "|"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _short(count: float) -> str:
    for sign, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{sign}"
    return f"{count:.3g}"
