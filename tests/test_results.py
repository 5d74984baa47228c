"""The file of results, the table made from it, and the YAML of every evaluator."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from vectors import FakeData, Method, clusters

from ssl_lab.errors import UserError
from ssl_lab.evals.collapse import Collapse
from ssl_lab.evals.finetune import Finetune
from ssl_lab.evals.knn import KNN
from ssl_lab.evals.linear import Linear
from ssl_lab.evals.results import Row, latest, read, table, write
from ssl_lab.evals.runner import logged, run_all
from ssl_lab.train.optim import Optim


def row(value=1.0, **changes):
    settings = dict(subject="trained", step=10, evaluator="knn", name="top1", samples={"test": 3}, protocol={"k": 20})
    return Row(**(settings | changes), value=value, seconds=0.1, time="2026-01-01T00:00:00+00:00")


def test_the_same_measurement_replaces_and_another_is_added(tmp_path):
    path = tmp_path / "run" / "metrics.json"
    write(path, [row(1.0), row(2.0, name="top5")])
    write(path, [row(3.0), row(4.0, step=20), row(5.0, protocol={"k": 200}), row(6.0, subject="raw pixels")])
    assert [r.value for r in read(path)] == [3, 2, 4, 5, 6]
    assert [r["value"] for r in json.loads(path.read_text())] == [3, 2, 4, 5, 6]
    assert [p.name for p in path.parent.iterdir()] == ["metrics.json"]


def test_results_on_other_data_stand_beside_those_of_the_run(tmp_path):
    path = tmp_path / "metrics.json"
    old = json.dumps([{name: value for name, value in asdict(row(1.0)).items() if name != "data"}])
    path.write_text(old)  # of a version that did not name data
    write(path, [row(2.0, data="cifar10"), row(3.0, step=5), row(4.0, data="stl10", step=20)])
    rows = read(path)
    assert [(r.data, r.value) for r in rows] == [("", 1), ("cifar10", 2), ("", 3), ("stl10", 4)]
    assert latest(rows) == {"knn/top1": 1}, "of the last step, whatever stands below"
    assert latest([]) == {}
    assert [*table(rows).columns[0].cells] == ["trained", "trained on cifar10", "trained", "trained on stl10"]


def test_every_protocol_survives_the_file(tmp_path):
    evaluators = {"knn": KNN(), "linear": Linear(passes=1), "collapse": Collapse(), "ft": Finetune(Optim(), steps=2)}
    rows = run_all(evaluators, Method(), FakeData(*clusters()), step=7)
    for _ in range(2):
        write(tmp_path / "metrics.json", rows)
    assert read(tmp_path / "metrics.json") == rows
    assert all(r.step == 7 and r.protocol and r.time and r.samples for r in rows)
    assert logged(rows)["eval/knn/top1"] == rows[0].value


@pytest.mark.parametrize("content", ["{", '{"a": 1}', '[{"name": "top1"}]', "[1]"])
def test_a_corrupt_file_is_named_and_left_alone(tmp_path, content):
    path = tmp_path / "metrics.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"metrics.json is not a list of results"):
        write(path, [row()])
    assert path.read_text() == content


def test_the_table_has_a_line_per_subject_and_leaves_out_details():
    out = table(
        [
            row(30.5, subject="random encoder", step=0),
            row(50.25),
            row(60.0, evaluator="linear"),
            row(59.0, evaluator="linear", name="lr_0.001/top1"),
            row(49.0, protocol={"k": 200}),
        ]
    )
    assert [c.header for c in out.columns] == ["features", "step", "knn\ntop1", "linear\ntop1"]
    assert [list(c.cells) for c in out.columns] == [
        ["random encoder", "trained", "trained"],
        ["0", "10", "10"],
        ["30.5", "50.25", "49"],
        ["", "60", ""],
    ]


def test_the_yaml_of_every_evaluator_builds():
    hydra, omegaconf = pytest.importorskip("hydra.utils"), pytest.importorskip("omegaconf")
    for path in sorted((Path(__file__).parent.parent / "conf/eval").glob("*.yaml")):
        node = omegaconf.OmegaConf.load(path)
        assert list(node) == [path.stem]
        evaluator = hydra.instantiate(node, _convert_="all")[path.stem]
        assert isinstance(evaluator.every, int) and evaluator.protocol
        json.dumps(evaluator.protocol)
