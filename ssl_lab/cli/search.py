"""`ssl-lab -m sweeper=optuna`: values chosen by the results so far, kept on disk so that a search goes on."""

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import optuna
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from ssl_lab.cli import overrides
from ssl_lab.cli.launch import Job
from ssl_lab.cli.nearest import did_you_mean
from ssl_lab.cli.resume import holding
from ssl_lab.cli.sweep import SWEEPS, Planner
from ssl_lab.errors import UserError
from ssl_lab.evals.results import latest, read
from ssl_lab.train.signals import CODES


class Optuna:
    """Search by the tree-structured Parzen estimator (Bergstra et al., 2011), Optuna's own choice.

    Spaces are written in Hydra's words: `key=interval(1e-4,1e-2)`, `key=tag(log,interval(1e-4,1e-2))`,
    `key=int(interval(1,8))`, `key=range(0,10,2)`, `key=choice(a,b)` or `key=a,b`.

    Args:
        objective: evaluator/value of metrics.json, of the trained weights.
        direction: maximize or minimize.
        trials: runs in all; failed ones count.
        name: of the folder in runs/sweeps, None = the name of the run.
        seed: of the choices; with several jobs at a time they depend on which ends first.

    Raises:
        UserError: an argument that means nothing.
    """

    def __init__(
        self, objective: str, direction: str = "maximize", trials: int = 20, name: str | None = None, seed: int = 0
    ) -> None:
        if direction not in ("maximize", "minimize") or trials < 1:
            raise UserError(f"sweeper.direction={direction}, trials={trials}: maximize or minimize in at least 1 trial")
        self.objective, self.trials, self.name, self.seed = objective, trials, name, seed
        self.direction: Literal["maximize", "minimize"] = "maximize" if direction == "maximize" else "minimize"

    def source(self, planner: Planner, words: list[str]) -> "Search":
        """The trials; the ends of every space are checked first.

        Raises:
            UserError: another verb than train, a mistake in any of them, no space at all, or an objective that no
                evaluator measures.
        """
        if planner.verb != "train":
            raise UserError(f"sweeper=optuna searches by the results of training, not of {planner.verb}: leave it out")
        parsed = {text: overrides.parse(text, planner.folders) for text in words}
        space = {word.get_key_element(): word for word in parsed.values() if word.is_sweep_override()}
        fixed = [text for text, word in parsed.items() if not word.is_sweep_override()]
        if not space:
            raise UserError("sweeper=optuna has nothing to choose: give a key a space, optim.lr=interval(1e-4,1e-2)")
        first = [f"{key}={_ends(word)[0]}" for key, word in space.items()]
        cfg = planner.composed([*fixed, *first])
        for n, (key, word) in enumerate(space.items()):
            for value in _ends(word)[1:]:
                planner.composed([*fixed, *first[:n], f"{key}={value}", *first[n + 1 :]])
        evaluators = list(cfg.get("eval") or {})
        if self.objective.partition("/")[0] not in evaluators:
            hint = did_you_mean(self.objective, evaluators)
            raise UserError(f"sweeper.objective={self.objective} is measured by no evaluator of this run; {hint}")
        return Search(self, planner, fixed, space, self.name or str(cfg.name))


class Search:
    """The trials of `Optuna`, as jobs. Those that a killed search left behind come first: their runs go on."""

    def __init__(
        self, settings: Optuna, planner: Planner, fixed: list[str], space: dict[str, Override], name: str
    ) -> None:
        self.settings, self.total, self.before = settings, settings.trials, 0
        self._planner, self._fixed, self._space, self._folder = planner, fixed, space, SWEEPS / name
        self._trials: dict[int, optuna.Trial] = {}

    @contextlib.contextmanager
    def opened(self) -> Iterator[Path]:
        """The folder of the search, kept from others.

        Raises:
            UserError: it holds another search, or another process works on it.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with holding(self._folder):
            storage = JournalStorage(JournalFileBackend(str(self._folder / "trials.log")))
            self._study = optuna.create_study(
                storage=storage, study_name="search", load_if_exists=True, direction=self.settings.direction
            )
            asked = sorted([*self._fixed, *(str(word.input_line) for word in self._space.values())])
            asked.append(f"{self.settings.direction} {self.settings.objective}")
            if (there := self._study.user_attrs.get("asked", asked)) != asked:
                raise UserError(
                    f"{self._folder} holds a search with other words ({' '.join(sorted({*there} ^ {*asked}))}): "
                    "give another sweeper.name="
                )
            self._study.set_user_attr("asked", asked)
            trials = self._study.trials
            self._study.sampler = optuna.samplers.TPESampler(seed=self.settings.seed + len(trials))
            left = [trial for trial in trials if not trial.state.is_finished()]
            self._left = [optuna.Trial(self._study, trial._trial_id) for trial in left]
            self.total, self.before = max(self.total, len(trials)), len(trials) - len(left)
            yield self._folder

    def next(self) -> Job | None:
        """The next trial as a job."""
        if not self._left and len(self._study.trials) >= self.total:
            return None
        trial = self._left.pop(0) if self._left else self._study.ask()
        self._trials[trial.number] = trial
        values = {key: _suggested(trial, key.lstrip("+"), word) for key, word in self._space.items()}
        words = [*self._fixed, *(f"{key}={value}" for key, value in values.items())]
        return self._planner.job(trial.number, words, values, {"trial": str(trial.number)})

    def ended(self, job: Job, code: int) -> str:
        """Tell the study; a run that a signal stopped stays open."""
        if code in CODES.values():
            return ""
        value, problem = self._value(Path(job.out)) if code == 0 else (None, "")
        state = TrialState.FAIL if value is None else TrialState.COMPLETE
        self._study.tell(self._trials[job.number], value, state=state)
        return problem

    def _value(self, out: Path) -> tuple[float | None, str]:
        found = latest(read(out / "metrics.json"))
        value = found.get(self.settings.objective)
        if value is None:
            return None, f"no {self.settings.objective} in metrics.json; {did_you_mean('', found)}"
        return (value, "") if math.isfinite(value) else (None, f"{self.settings.objective} is {value}")

    def conclusion(self) -> str:
        """The best trial so far."""
        done = [trial for trial in self._study.trials if trial.state == TrialState.COMPLETE]
        if not done:
            return "no trial has a result"
        best = self._study.best_trial
        words = " ".join(f"{key}={value}" for key, value in best.params.items())
        return f"best of {len(done)}: {self.settings.objective} {best.value:.6g}, trial {best.number + 1}: {words}"


def _ends(word: Override) -> list[Any]:
    """Values that stand for a space: all of them where they are counted, both ends of an interval."""
    value = word.value()
    if not isinstance(value, IntervalSweep):
        return list(word.sweep_string_iterator())
    start, end = value.start, value.end
    if start is None or end is None or start >= end or ("log" in value.tags and start <= 0):
        raise UserError(f"{word.input_line}: an interval goes from a number to a larger one, under log from above zero")
    return [start, end]


def _suggested(trial: optuna.Trial, key: str, word: Override) -> str:
    space = word.value()
    if isinstance(space, IntervalSweep):
        whole = isinstance(space.start, int) and isinstance(space.end, int)
        suggest: Callable[..., float] = trial.suggest_int if whole else trial.suggest_float
        return str(suggest(key, space.start, space.end, log="log" in space.tags))
    if isinstance(space, RangeSweep) and all(isinstance(x, int) for x in space.range()):
        numbers = sorted(int(x) for x in space.range())
        return str(trial.suggest_int(key, numbers[0], numbers[-1], step=abs(int(space.step))))
    assert isinstance(space, ChoiceSweep | RangeSweep)
    return str(trial.suggest_categorical(key, list(word.sweep_string_iterator())))
