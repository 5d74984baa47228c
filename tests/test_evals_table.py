"""Many values stand below each other, few beside each other; the Markdown table says the same as the screen."""

import io

from rich.console import Console

from ssl_lab.evals.results import Row, markdown, matrix, table


def rows(names, subjects=(("raw pixels", 0), ("trained", 3000)), **changes):
    settings = dict(samples={"train": 50, "test": 9}, protocol={"k": 20, "limit": None, "rates": [0.1, 1.0]})
    settings |= dict(seconds=0.1, time="2026-01-01T00:00:00+00:00") | changes
    return [
        Row(subject, step, name.partition(".")[0], name.partition(".")[2], 10.0 * i + j, **settings)
        for j, (subject, step) in enumerate(subjects)
        for i, name in enumerate(names)
    ]


FEW = ["knn.top1", "knn.top5", "linear.top1"]
MANY = [*FEW, "linear.lr_1/top1", "retrieval.map", "retrieval.recall_1", "collapse.std", "collapse.rankme"]


def test_few_values_stand_beside_each_other():
    assert matrix(rows(FEW)) == [
        ["features", "step", "knn\ntop1", "knn\ntop5", "linear\ntop1"],
        ["raw pixels", "0", "0", "10", "20"],
        ["trained", "3000", "1", "11", "21"],
    ]


def test_many_values_stand_below_each_other_without_details():
    found = matrix(rows(MANY))
    assert found[0] == ["evaluator", "value", "raw pixels", "trained\nstep 3000"]
    assert found[1:4] == [
        ["knn", "top1", "0.000", "1.000"],
        ["", "top5", "10.00", "11.00"],
        ["linear", "top1", "20.00", "21.00"],
    ]
    assert [line[1] for line in found[1:]] == ["top1", "top5", "top1", "map", "recall_1", "std", "rankme"]


def test_a_value_that_one_subject_lacks_stays_empty():
    found = matrix([*rows(MANY), *rows(["knn.top1"], subjects=[("random encoder", 0)])])
    assert [line[-1] for line in found] == ["random encoder", "0.000", *[""] * 6]


def test_another_protocol_is_another_column():
    found = matrix([*rows(MANY), *rows(["knn.top1"], protocol={"k": 200})])
    assert found[0] == ["evaluator", "value", "raw pixels", "trained\nstep 3000", "raw pixels", "trained\nstep 3000"]


def test_eighty_columns_are_enough_even_for_a_long_path():
    screen = Console(file=io.StringIO(), width=80)
    subjects = [
        ("raw pixels", 0),
        ("random encoder", 0),
        ("/a/long/path/to/some/place/where/weights/are/elsewhere.pt", 0),
    ]
    screen.print(table(rows(MANY, subjects=subjects)))
    lines = screen.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    text = "".join(line[-30:].strip() for line in lines)
    assert "elsewhere.pt" in text.replace(" ", "") and sum("rankme" in line for line in lines) == 1


def test_markdown_says_the_same_and_how_it_was_measured():
    text = markdown(rows(MANY, subjects=[("a|b", 5)]))
    head, marks, first, *rest = text.splitlines()
    assert (head, marks) == ("| evaluator | value | a\\|b step 5 |", "| --- | --- | ---: |")
    assert first == "| knn | top1 | 0.000 |" and len([line for line in rest if line.startswith("|")]) == 6
    assert "- knn: rows train 50, test 9, k 20, rates (0.1, 1.0)" in rest and "None" not in text
    assert markdown([]).startswith("| features | step |")
