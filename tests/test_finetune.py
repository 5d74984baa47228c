"""Fine-tuning as an evaluation: on a copy, from the weights it is given, the same digits each time."""

import copy

import pytest
import torch
from lightning.fabric import Fabric
from vectors import FakeData, Method, clusters, run

from ssl_lab.backbones.vit import ViT
from ssl_lab.errors import UserError
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


def test_finetune_learns_from_the_few_rows_that_have_a_label():
    (x, y), test = clusters(noise=0.1)
    few = torch.where(torch.arange(len(y)) % 11 == 0, y, -1)  # one or two in a batch of 16, none in the last
    few[-16:] = -1
    values = run(Finetune(Optim(lr=1e-2), steps=60), FakeData((x, few), test), Method())
    assert values["top1"] > 90
    with pytest.raises(UserError, match="at least 1"):
        Finetune(Optim(), steps=0)


def test_a_mean_over_labels_is_what_torch_takes():
    data, optim = FakeData(*clusters()), Optim(lr=1e-12, schedule="constant")
    (x, y), test = clusters()
    hidden = FakeData((x, y.where(torch.arange(len(y)) % 3 > 0, -1)), test)
    for each in (data, hidden):  # all classes are as likely, so the mean is ln 4 however many are labelled
        values = run(Finetune(optim, steps=8, label_smoothing=0.0), each, Method())
        assert values["train/loss"] == pytest.approx(torch.tensor(4.0).log().item(), abs=1e-6)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "64-true"])
def test_a_run_in_any_precision_is_tuned_in_float32_at_least(precision):
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    torch.manual_seed(0)
    method = Method()
    method.encoder = ViT(image_size=8, patch_size=4, dim=32, depth=1, num_heads=2)
    method = fabric.setup_module(method).module
    before = next(method.parameters()).clone()
    x, y = clusters(dim=3 * 8 * 8)[0]
    split = (5 * x.view(-1, 3, 8, 8), y)
    evaluator = Finetune(Optim(lr=1e-2), steps=30)
    values = run(evaluator, FakeData(split, split), method, precision=fabric.autocast)
    assert values["top1"] > 90 and values["train/loss"] < 1.0
    assert torch.equal(next(method.parameters()), before) and torch.get_default_dtype() == torch.float32
