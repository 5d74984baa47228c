"""`ssl-lab evaluate` from the command line: it repeats what training measured, and answers mistakes in one line."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from training import TINY

from ssl_lab.cli.catalog import conf_folder
from ssl_lab.cli.compose import compose
from ssl_lab.cli.main import main
from ssl_lab.cli.usage import verb_of
from ssl_lab.evals.results import read

ARCHITECTURE = [word for word in TINY if word.startswith(("method", "backbone", "data"))]
KNN = ["eval=[knn]", "eval.knn.k=3"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluate") / "run"
    short = ["duration=4steps", "trainer.precision=bf16-mixed", "trainer.enable_progress_bar=false"]
    assert main([*TINY, *short, *KNN, f"out={out}"]) == 0
    return out


@pytest.fixture
def run(trained, tmp_path):
    """A copy that a test may write to."""
    shutil.copytree(trained, tmp_path / "run", symlinks=True)
    return tmp_path / "run"


def values(folder):
    return {(r.subject, r.step, r.evaluator, r.name): r.value for r in read(folder / "metrics.json")}


def test_a_run_gives_offline_what_it_gave_in_training(run, capsys):
    before = read(run / "metrics.json")
    assert main(["evaluate", f"ckpt={run}", *KNN]) == 0
    after = read(run / "metrics.json")
    assert [r.key for r in after] == [r.key for r in before] and [r.value for r in after] == [r.value for r in before]
    assert after[0].time >= before[0].time
    assert "trained" in capsys.readouterr().out
    assert (run / "pictures/features.png").stat().st_size > 1000


def test_baselines_and_all_evaluators_stand_beside_it(run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    words = ["eval=[knn,linear,collapse,finetune]", "eval.finetune.steps=2", "baselines=true", "+data.batch_size=4"]
    assert main(["evaluate", f"ckpt={run / 'checkpoints/last.ckpt'}", *words]) == 0
    found = values(run)
    for subject, step in (("random encoder", 0), ("trained", 4)):
        assert {(subject, step, e, "top1") for e in ("knn", "linear", "finetune")} <= found.keys()
    assert ("raw pixels", 0, "collapse", "rankme") in found
    text = capsys.readouterr().out
    assert "raw pixels" in text and "rankme" in text and "lr_0.001" not in text


def test_weights_without_a_run(run, tmp_path):
    alone = tmp_path / "elsewhere.safetensors"
    shutil.copy(run / "last.safetensors", alone)
    out = tmp_path / "out"
    assert main(["evaluate", f"ckpt={alone}", *ARCHITECTURE, *KNN, "precision=bf16-mixed", f"out={out}"]) == 0
    assert values(out) == {(str(alone), 0, "knn", name): value for (_, _, _, name), value in values(run).items()}


def test_an_untrained_encoder_depends_on_the_seed_alone(tmp_path):
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert main(["evaluate", *ARCHITECTURE, "eval=[collapse]", f"seed={seed}", f"out={tmp_path / folder}"]) == 0
    a, b, c = (values(tmp_path / folder) for folder in "abc")
    assert a == b and a.keys() == c.keys() and a != c
    assert {subject for subject, *_ in a} == {"random encoder"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ckpt=runs/no_such_run"], "ckpt=runs/no_such_run does not exist"),
        ([], "method is not known: choose method=NAME, or give ckpt=<run folder>"),
        (["ckpt=RUN", "eval=[]"], "choose e.g. eval=[knn,linear]"),
        (["ckpt=RUN", "+method.encoder.dim=64"], "does not fit this MAE"),
        (["ckpt=RUN", "device=abacus"], "device=abacus"),
        (["ckpt=RUN", "+data.batch_size=0"], "data.batch_size is 0"),
        (["ckpt=RUN/metrics.json"], "metrics.json"),
    ],
)
def test_mistakes_are_answered_in_one_line(run, capsys, words, message):
    words = [word.replace("RUN", str(run)) for word in words]
    assert main(["evaluate", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and "Traceback" not in error


def test_a_configuration_that_would_run_something_else_is_refused(run, tmp_path, capsys):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["views"] = {"_target_": "os.system", "_args_": [f"touch {tmp_path / 'harm'}"]}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["evaluate", f"ckpt={run}"]) == 2
    assert "os.system" in capsys.readouterr().err and not (tmp_path / "harm").exists()


def documented():
    text = (Path(__file__).parent.parent / "docs/evaluation.md").read_text()
    return [line for line in text.splitlines() if line.startswith("ssl-lab ")]


@pytest.mark.parametrize("command", documented())
def test_documented_commands_compose(command):
    verb, words = verb_of(command.split()[1:], [conf_folder()])
    cfg = compose(verb or "train", words, [conf_folder()])
    assert set(cfg.eval) <= {"knn", "linear", "collapse", "finetune"}


def test_rows_are_plain_json(trained):
    (row, *_) = json.loads((trained / "metrics.json").read_text())
    assert row["protocol"]["k"] == 3 and row["samples"] == {"train": 40, "test": 16}
