"""The collapse alarm: silent in a healthy run, in words when features or assignments become all alike."""

import math

import lightning as L
import pytest
import torch
from test_methods import batch, build

from ssl_lab.losses.distill import entropy, information
from ssl_lab.train.alarm import CollapseAlarm, diagnosis
from ssl_lab.train.optim import Optim

HEALTHY = {"train/feature_std": 0.5, "train/rankme": 30.0}


def test_diagnosis_names_what_is_wrong():
    assert diagnosis(HEALTHY) == {}
    features = diagnosis(HEALTHY | {"train/feature_std": 0.001})["features"]
    assert "all samples get nearly the same features" in features and "method.encoder" not in features
    assert "rankme 1.1" in diagnosis(HEALTHY | {"train/rankme": 1.1})["features"]


@pytest.mark.parametrize(
    ("logits", "words"),
    [
        (50 * torch.eye(16)[torch.zeros(8, dtype=torch.int64)], "on the same prototype"),
        (0.01 * torch.eye(16)[:8], "the same assignment"),
        (50 * torch.eye(16)[:8], None),
    ],
)
def test_diagnosis_of_a_teacher(logits, words):
    p = logits.softmax(-1)
    values = {"train/teacher_entropy": float(entropy(p).mean()), "train/teacher_information": float(information(p))}
    found = diagnosis(HEALTHY | values)
    assert (words in found["teacher"]) if words else not found
    assert "image" not in str(found)  # runs may be of text or sound


def test_information_lies_between_nothing_and_one_prototype_each():
    assert float(information(torch.eye(8))) == pytest.approx(math.log(8))
    assert float(information(torch.full((4, 8), 1 / 8))) == pytest.approx(0, abs=1e-6)


def fit(method, steps=40):
    said = []
    alarm = CollapseAlarm(said.append)
    loader = torch.utils.data.DataLoader([0] * steps, batch_size=None, collate_fn=lambda _: batch())
    trainer = L.Trainer(
        max_steps=steps,
        log_every_n_steps=4,
        accelerator="cpu",
        callbacks=[alarm],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(method, loader)
    return said, alarm.values


def test_the_alarm_sounds_once_in_a_collapsed_run_and_not_in_a_good_one():
    good = build("simclr")
    good.optim = Optim(lr=3e-3, warmup=0.1)
    said, values = fit(good)
    assert not said and values["train/feature_std"] > 0.05
    dead = build("simclr")
    dead.optim = Optim(lr=1e-12, warmup=0.0)
    torch.nn.init.zeros_(dead.encoder.norm.weight)
    torch.nn.init.ones_(dead.encoder.norm.bias)
    said, values = fit(dead)
    assert len(said) == 1 and "nearly the same features" in said[0] and values["train/feature_std"] < 1e-3


def test_looking_changes_nothing():
    states = []
    for watched in (True, False):
        method = build("dino", seed=1)
        method.optim = Optim(lr=1e-3, warmup=0.0)
        if watched:
            fit(method, 8)
        else:
            trainer = L.Trainer(
                max_steps=8, logger=False, accelerator="cpu", enable_checkpointing=False, enable_progress_bar=False
            )
            trainer.fit(method, torch.utils.data.DataLoader([0] * 8, batch_size=None, collate_fn=lambda _: batch()))
        states.append(method.state_dict())
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
