"""Accuracy of a method's own classifier, with a known answer."""

import pytest
import torch
from torch import nn

from ssl_lab.errors import UserError
from ssl_lab.evals.accuracy import Accuracy
from ssl_lab.evals.runner import run_all


class Scores(nn.Module):
    """The batch holds the logits themselves."""

    def classify(self, batch):
        return batch["image"]


class Rows:
    classes = ["a", "b", "c"]

    def __init__(self, target):
        self.target = torch.tensor(target)

    def eval_loader(self, split, limit=None):
        logits = torch.eye(3)[torch.tensor([0, 1, 2, 0])]
        yield {"image": logits, "target": self.target, "index": torch.arange(4)}


def test_the_share_of_right_answers():
    rows = run_all({"accuracy": Accuracy()}, Scores(), Rows([0, 1, 2, 1]))
    assert {r.name: r.value for r in rows} == {"top1": 75.0}


def test_unlabelled_rows_do_not_count():
    rows = run_all({"accuracy": Accuracy()}, Scores(), Rows([0, 2, -1, -1]))
    assert {r.name: r.value for r in rows} == {"top1": 50.0}


def test_a_head_of_fewer_classes_than_the_data_is_not_judged():
    data = Rows([0, 1, 2, 3])
    data.classes = ["a", "b", "c", "d"]
    said = []
    assert not run_all({"accuracy": Accuracy()}, Scores(), data, say=said.append)
    assert "head tells 3 classes, and these data have 4" in said[0]


def test_a_method_without_a_classifier_is_named():
    with pytest.raises(UserError, match="classify"):
        run_all({"accuracy": Accuracy()}, nn.Identity(), Rows([0, 1, 2, 0]))
