"""`ssl-lab bench suite=...`: rows compose, methods and kernels are measured, an earlier table is compared with."""

import json
import shlex
from dataclasses import replace

import pytest
import torch
import yaml

from ssl_lab.bench.kernels import kernel_times, masks
from ssl_lab.bench.suite import Measured, SuiteTable
from ssl_lab.cli.catalog import choices, conf_folder
from ssl_lab.cli.compose import compose
from ssl_lab.cli.main import main
from ssl_lab.errors import UserError
from ssl_lab.nn.attend import KERNELS

SUITES = yaml.safe_load((conf_folder() / "bench_suite.yaml").read_text())["suites"]
LINES = [
    pytest.param(f"{row['words']} {suite['kinds'][row['kind']]}", id=f"{name} {row_name}")
    for name, suite in SUITES.items()
    for row_name, row in suite["rows"].items()
]


@pytest.mark.parametrize("line", LINES)
def test_every_row_composes(line):
    compose("bench", shlex.split(line), [conf_folder()])


def test_the_small_suite_has_every_method():
    lines = [row["words"] for row in SUITES["small"]["rows"].values()]
    timed = {word.partition("=")[2] for line in lines for word in line.split() if word.startswith("method=")}
    without = {"text_classification", "span_qa"}  # heads on the encoder of masked_lm
    assert timed == set(choices("method", [conf_folder()])) - without


def test_a_suite_is_measured_and_compared(tmp_path, capsys):
    small = ["method.encoder.dim=32", "method.encoder.depth=1", "method.encoder.num_heads=2", "data.batch_size=4"]
    words = f"method=supervised data=shapes data.train.length=16 data.test.length=8 {' '.join(small)}"
    suite = {"kinds": {"image": ""}, "rows": {"tiny": {"kind": "image", "words": words}}}
    suite["attention"] = {"batch": 1, "heads": 2, "head_dim": 8, "lengths": [8]}
    suite["rows"]["broken"] = {"kind": "image", "words": "method=supervised data=shapes method.encoder.dim=33"}
    shipped = yaml.safe_load((conf_folder() / "bench_suite.yaml").read_text())
    typed = ["bench", "suite=small", "rounds=1", "threads=1", f"out={tmp_path / 'first'}"]
    cfg = compose("bench_suite", ["name=small", *typed[2:]], [conf_folder()])
    assert cfg.suites == shipped["suites"]
    cfg.suites["small"] = suite
    from ssl_lab.cli import bench_suite

    with pytest.raises(SystemExit) as left:  # one row failed, the others stand in the table
        bench_suite.run(cfg)
    assert left.value.code == 1
    table = json.loads((tmp_path / "first/table.json").read_text())
    rows = {row["name"]: row for row in table["rows"]}
    assert rows["tiny"]["median_s"] > 0 and rows["tiny"]["params"] > 0 and 0 < rows["tiny"]["share_of_peak"] < 1
    assert rows["broken"]["median_s"] is None and "num_heads" in rows["broken"]["note"]
    assert [row for name, row in rows.items() if name.startswith("attention eager")]
    assert sum(row["note"] == "auto" for row in table["rows"]) == len(masks(1, 8, torch.device("cpu")))
    text = (tmp_path / "first/table.md").read_text()
    assert text.count("\n| ") == len(rows) + 1 and "GFLOP/s" in text
    capsys.readouterr()
    assert main([*typed[:-1], f"out={tmp_path / 'second'}", "only=[nothing]"]) == 2
    assert "only=['nothing'] leaves no row: there are supervised" in capsys.readouterr().err
    for wrong, told in (
        ("rounds=0", "at least one round"),
        (f"before={tmp_path / 'first/table.json'}", "would be written over: give another out="),
    ):
        assert main([*typed, wrong]) == 2 and told in capsys.readouterr().err
    assert main(["bench", "suite=base", f"before={tmp_path / 'first/table.json'}"]) == 2
    assert "is of suite=small, whose rows have other sizes" in capsys.readouterr().err
    assert main(["bench", "suite=huge"]) == 2 and "choose one of small, base" in capsys.readouterr().err


def test_what_became_slower_is_told():
    then = SuiteTable(
        "s",
        "bf16-mixed",
        {"device": "x"},
        {"bfloat16": 1e9},
        [Measured("a", 0.1, 10, 0.5), Measured("b", 0.1, 10, 0.5)],
    )
    now = replace(
        then, rows=[Measured("a", 0.2, 5, 0.25), Measured("b", note="out of memory"), Measured("c", 0.1, 10, 0.1)]
    )
    assert now.lost(then, 0.15) == [
        "a fell from 50.0% of the peak to 25.0%",
        "b ran before and does not now: out of memory",
    ]
    assert now.lost(then, 0.6) == ["b ran before and does not now: out of memory"]
    a, b, c = list(now.cells(then))[1:]
    assert a[-3:] == ["0.50", "0.50", ""] and b[-1] == "out of memory" and c[-3:-1] == ["", ""]


def test_a_table_is_read_again(tmp_path):
    table = SuiteTable(
        "s", "32-true", {"device": "x", "threads": 1}, {"float32": 1e9}, [Measured("a", 0.1, 10, 0.5, 3)]
    )
    table.write(tmp_path)
    assert SuiteTable.read(tmp_path / "table.json") == table
    (tmp_path / "other.json").write_text('{"rows": [{"what": 1}]}')
    for file in ("other.json", "missing.json"):
        with pytest.raises(UserError, match=f"before=.*{file} is no table of a suite"):
            SuiteTable.read(tmp_path / file)


def test_kernels_are_timed_or_say_why_not():
    found = [
        *kernel_times(batch=1, heads=2, head_dim=8, length=8, dtype=torch.float32, device=torch.device("cpu"), rounds=1)
    ]
    assert {time.kernel for time in found} == set(KERNELS)
    assert all((time.median_s is None) == bool(time.reason) for time in found)
    assert next(time for time in found if time.kernel == "flex").reason
