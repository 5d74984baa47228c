"""Durations, signatures read from source, kinds of value, nearest names."""

import inspect

import pytest
from hydra.utils import get_object

from ssl_lab.cli.compose import steps_of
from ssl_lab.cli.kinds import misfit
from ssl_lab.cli.nearest import did_you_mean, nearest
from ssl_lab.cli.signature import exists, signature_of
from ssl_lab.errors import UserError


@pytest.mark.parametrize(
    ("duration", "steps"),
    [
        ("2000 steps", 2000),
        ("1step", 1),
        ("1e3steps", 1000),
        ("10 epochs", 40),
        ("1 epoch", 4),
        ("0.5epochs", 2),
        ("1000 samples", 4),
        ("1e6 samples", 3907),
        ("1_024 samples", 4),
        ("1 sample", 1),
    ],
)
def test_duration_becomes_steps(duration, steps):
    assert steps_of(duration, samples_per_step=256, num_train=1024) == steps


def test_a_started_step_counts():
    assert steps_of("1 epoch", samples_per_step=256, num_train=1025) == 5
    assert steps_of("3 epochs", samples_per_step=100, num_train=1000) == 30


@pytest.mark.parametrize(
    "duration",
    [
        "",
        "10",
        "epochs",
        "ten epochs",
        "-1 epochs",
        "0 steps",
        "1.5 steps",
        "nan epochs",
        "1e999 steps",
        "5 days",
        "0x10 steps",
    ],
)
def test_nonsense_durations_are_refused(duration):
    with pytest.raises(UserError, match="duration="):
        steps_of(duration, 256, 1024)


TARGETS = [
    "ssl_lab.backbones.vit.ViT",
    "ssl_lab.methods.mae.MAE",
    "ssl_lab.methods.supervised.Supervised",
    "ssl_lab.train.optim.Optim",
    "ssl_lab.schedules.Warmup",
    "ssl_lab.nn.block.encoder_block",
    "lightning.Trainer",
    "lightning.pytorch.callbacks.ModelCheckpoint",
    "timm.data.Mixup",
    "torch.nn.Linear",
    "torch.optim.AdamW",
    "torchvision.transforms.v2.RandomHorizontalFlip",
]


@pytest.mark.parametrize("target", TARGETS)
def test_source_tells_the_same_arguments_as_the_imported_object(target):
    read = signature_of(target)
    assert read is not None
    real = inspect.signature(get_object(target)).parameters
    named = [name for name, p in real.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    assert set(read.arguments) == set(named)
    assert read.open == any(p.kind == p.VAR_KEYWORD for p in real.values())


def test_what_the_source_does_not_tell_is_left_open():
    assert signature_of("no_such_package.Thing") is None
    assert signature_of("builtins.dict") is None
    assert not exists("ssl_lab.methods.mae.MEA")
    assert not exists("ssl_lab.no_module.Thing")
    assert exists("ssl_lab.methods.mae.MAE")


def kinds(target, argument):
    signature = signature_of(target)
    assert signature is not None
    return signature.arguments[argument]


@pytest.mark.parametrize(
    ("target", "argument", "good", "bad"),
    [
        ("ssl_lab.train.optim.Optim", "lr", [1, 0.1], ["fast", True, None, [1]]),
        ("ssl_lab.train.optim.Optim", "weight_decay", [0.1, {"_target_": "x"}], ["fast"]),
        ("ssl_lab.train.optim.Optim", "name", ["adamw"], ["adam", 3]),
        ("ssl_lab.train.optim.Optim", "layer_decay", [0.5, None], ["x"]),
        ("ssl_lab.train.optim.Optim", "betas", [[0.9, 0.9]], [0.9]),
        ("ssl_lab.backbones.vit.ViT", "depth", [12], [1.5, "12"]),
        ("ssl_lab.backbones.vit.ViT", "cls_token", [True], [1, "yes"]),
        ("ssl_lab.methods.mae.MAE", "pooling", ["mean"], ["max"]),
        ("lightning.Trainer", "precision", ["bf16-mixed", 32, "32-true", None], ["bf16-mixd"]),
        ("lightning.Trainer", "devices", [1, "auto", [0, 1]], [1.5]),
        ("lightning.Trainer", "max_epochs", [3, None], ["ten"]),
        ("lightning.Trainer", "default_root_dir", ["x"], []),
    ],
)
def test_values_are_judged_by_the_annotation(target, argument, good, bad):
    taken = kinds(target, argument)
    for value in good:
        assert misfit(value, taken) is None, value
    for value in bad:
        assert misfit(value, taken) is not None, value


def test_nearest_names():
    assert nearest("optm", ["method", "optim", "data"]) == ["optim"]
    assert did_you_mean("xyz", ["a", "b"]) == "there are a, b"
    assert did_you_mean("optm", ["optim"]) == "did you mean optim?"
