"""Fine-tuning as an evaluation: on a copy, from the weights it is given, the same digits each time."""

import copy

import pytest
import torch
from vectors import FakeData, Method, clusters, run

from ssl_lab.evals.base import Round, Skip
from ssl_lab.evals.finetune import Finetune
from ssl_lab.evals.pixels import Pixels
from ssl_lab.train.optim import Optim


def test_finetune_learns_on_a_copy_and_repeats_its_digits():
    method, data = Method(), FakeData(*clusters(noise=0.3))
    before = copy.deepcopy(method.state_dict())
    evaluator = Finetune(Optim(lr=1e-2, layer_decay=0.75), steps=40)
    first = run(evaluator, data, method)
    assert first["top1"] > 90 and first["train/loss"] < 1.0
    assert all(torch.equal(v, before[k]) for k, v in method.state_dict().items())
    assert all(p.grad is None for p in method.parameters())
    torch.manual_seed(5)
    assert run(evaluator, data, method) == first


def test_finetune_starts_from_the_weights_it_is_given():
    """Rates of almost 0: the head stays at 0 and every class is as likely."""
    evaluator = Finetune(Optim(lr=1e-12, schedule="constant"), steps=2, label_smoothing=0.0)
    values = run(evaluator, FakeData(*clusters()), Method())
    assert values["train/loss"] == pytest.approx(torch.tensor(4.0).log().item(), abs=1e-6)


def test_finetune_without_labels_or_encoder():
    (x, y), test = clusters()
    optim = Optim()
    with pytest.raises(Skip, match="no classes"):
        Finetune(optim).run(Round(Method(), FakeData((x, y), test, num_classes=0)))
    with pytest.raises(Skip, match="no labels"):
        Finetune(optim).run(Round(Method(), FakeData((x, y * 0 - 1), test)))
    with pytest.raises(Skip, match="Pixels has no encoder"):
        Finetune(optim).run(Round(Pixels(), FakeData((x, y), test)))
