"""`-m sweeper=optuna`: values follow the results, a search that was killed goes on, failures are marked."""

import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ssl_lab.cli import launch
from ssl_lab.cli.main import main

optuna = pytest.importorskip("optuna")

STUB = """
import json, math, os, signal, sys
given = dict(word.split("=", 1) for word in sys.argv[2:])
out = "runs/" + given["name"].strip('"') + "/0"
lr, trial = float(given["optim.lr"]), int(out.partition("trial=")[2].partition("/")[0])
with open("seen.jsonl", "a") as file:
    file.write(json.dumps({"trial": trial, "lr": lr, "dim": given.get("method.encoder.dim")}) + "\\n")
if os.path.exists(f"kill-{trial}"):
    os.remove(f"kill-{trial}")
    os.kill(os.getppid(), signal.SIGKILL)
    sys.exit(75)
if os.path.exists(f"stop-{trial}"):
    os.remove(f"stop-{trial}")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which the sweep hands on, maybe before the exit
    os.kill(os.getppid(), signal.SIGTERM)
    sys.exit(75)
if os.path.exists(f"fail-{trial}"):
    sys.exit("ssl-lab: bad luck")
value = math.nan if os.path.exists(f"nan-{trial}") else -math.log10(lr / 0.03) ** 2
os.makedirs(out)
row = {"subject": "trained", "step": 1, "evaluator": "knn", "name": "top1", "value": value, "samples": {},
       "protocol": {}, "seconds": 0.0, "time": ""}
with open(out + "/metrics.json", "w") as file:
    json.dump([row], file)
"""
WORDS = ["-m", "method=mae", "eval=[knn]", "optim.lr=tag(log,interval(1e-5,1))"]
SEARCH = ["sweeper=optuna", "sweeper.objective=knn/top1"]


@pytest.fixture
def stub(tmp_path, monkeypatch):
    (tmp_path / "stub.py").write_text(STUB)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(launch, "COMMAND", [sys.executable, str(tmp_path / "stub.py")])


def apart(*words):
    """Exit code of the search in a process of its own."""
    program = "import sys; from ssl_lab.cli import launch; from ssl_lab.cli.main import main; "
    program += f"launch.COMMAND = {launch.COMMAND!r}; sys.exit(main())"
    return subprocess.run([sys.executable, "-c", program, *WORDS, *SEARCH, *words], check=False).returncode


def seen():
    return [json.loads(line) for line in Path("seen.jsonl").read_text().splitlines()]


def trials(name="mae"):
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    storage = JournalStorage(JournalFileBackend(f"runs/sweeps/{name}/trials.log"))
    return optuna.load_study(study_name="search", storage=storage).trials


def test_values_follow_the_results(stub, capsys):
    assert main([*WORDS, *SEARCH, "sweeper.trials=12"]) == 0
    tried = [c["lr"] for c in seen()]
    assert len(set(tried)) == 12 and all(1e-5 <= lr <= 1 for lr in tried)
    best = min(tried, key=lambda lr: abs(math.log10(lr / 0.03)))
    out = capsys.readouterr().out
    assert "12 ok, 0 failed" in out and f"optim.lr={best}\n" in out.splitlines(True)[-1]
    assert main([*WORDS, *SEARCH, "sweeper.trials=12", "name=other", "sweeper.direction=minimize"]) == 0
    others = [c["lr"] for c in seen()[12:]]
    assert others[:10] == tried[:10] and others[11] != tried[11], "ten at random, then by what they gave"


@pytest.mark.faults("C3", "a search is killed or stopped in a trial: the trial goes on, all the others are kept")
@pytest.mark.parametrize(("how", "code"), [("kill", -signal.SIGKILL), ("stop", 75)])
def test_a_search_goes_on(stub, capsys, how, code):
    Path(f"{how}-2").touch()
    assert apart("sweeper.trials=4") == code
    assert [c["trial"] for c in seen()] == [0, 1, 2]
    assert main([*WORDS, *SEARCH, "sweeper.trials=4"]) == 0
    assert [c["trial"] for c in seen()] == [0, 1, 2, 2, 3]
    assert seen()[2] == seen()[3], "the same values, in the same run folder"
    assert {trial.state.name for trial in trials()} == {"COMPLETE"}
    out = capsys.readouterr().out
    assert "2 ok, 0 failed\n" in out and "best of 4" in out
    assert main([*WORDS, *SEARCH, "sweeper.trials=4"]) == 0 and len(seen()) == 5, "nothing is left to do"
    assert main([*WORDS, *SEARCH, "sweeper.trials=2"]) == 0 and "0 ok, 0 failed\n" in capsys.readouterr().out
    assert main([*WORDS, *SEARCH, "sweeper.trials=4", "seed=3"]) == 2, "another search in the same folder"
    assert "sweeper.name" in capsys.readouterr().err


def test_failures_are_marked(stub, capsys):
    Path("fail-1").touch()
    Path("nan-2").touch()
    words = ["sweeper.trials=4", "sweeper.name=mine", "launcher.jobs=2", "method.encoder.dim=32,64"]
    assert main([*WORDS, *SEARCH, *words]) == 1
    assert [trial.state.name for trial in trials("mine")] == ["COMPLETE", "FAIL", "FAIL", "COMPLETE"]
    assert {c["dim"] for c in seen()} <= {"32", "64"}
    out = capsys.readouterr().out
    assert "2 ok, 2 failed" in out and "bad luck" in out and "knn/top1 is nan" in out and "best of 2" in out


def test_only_training_is_searched(stub, capsys):
    words = ["evaluate", "method=mae", "data=shapes", "average=1,2", "eval=[knn]", *SEARCH]
    assert main(["-m", *words]) == 2
    error = capsys.readouterr().err
    assert "the results of training, not of evaluate" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["eval=[knn]", *SEARCH], "nothing to choose"),
        (["eval=[knn]", "optim.lr=interval(1,0)", *SEARCH], "larger"),
        (["eval=[knn]", "optim.lr=tag(log,interval(0,1))", *SEARCH], "above zero"),
        (["eval=[knn]", "method.encoder.dim=interval(8,16)", *SEARCH], "method.encoder.dim"),
        (["eval=[linear]", "optim.lr=1,2", *SEARCH], "sweeper.objective=knn/top1"),
        (["eval=[knn]", "optim.lr=1,2", *SEARCH, "sweeper.direction=up"], "maximize or minimize"),
        (["optim.lr=1,2", "sweeper=optuna"], "sweeper.objective is not given"),
    ],
)
def test_mistakes_take_a_line(stub, capsys, words, told):
    assert main(["-m", "method=mae", *words]) == 2
    assert told in capsys.readouterr().err
    assert not list(Path().iterdir())


def test_without_optuna_the_extra_is_named(stub, capsys, monkeypatch):
    monkeypatch.setattr("ssl_lab.cli.sweep.find_spec", lambda name: None)
    assert main([*WORDS, *SEARCH]) == 2
    assert "ssl-lab[optuna]" in capsys.readouterr().err
