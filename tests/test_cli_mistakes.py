"""Every typed mistake is answered in one short message that names the key and the nearest valid name."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import ssl_lab
from ssl_lab.cli.main import main

ENV = {**os.environ, "PYTHONPATH": str(Path(ssl_lab.__file__).parents[1])}  # installed or not

MISTAKES = [
    # choices
    ("experiment=quickstrt", ["experiment=quickstrt", "quickstart"]),
    ("method=maee", ["method=maee", "mae"]),
    ("method=mae data=shape", ["data=shape", "shapes"]),
    ("method=mae backbone=vit_s61", ["backbone=vit_s61", "vit_s16"]),
    ("method=mae backbone@method.encodr=vit_s16", ["method.encodr", "backbone@method.encoder=vit_s16"]),
    ("method=mae eval=[knnn]", ["eval=knnn", "knn"]),
    ("method=mae eval.knn.k=20", ["eval.knn", "eval=[...,knn]"]),
    ("method=mae method.encoder=vit_s16", ["method.encoder", "backbone@method.encoder=vit_s16"]),
    ("method=mae ~optim", ["optim cannot be empty", "adamw"]),
    ("method=mae strategy=deepspeed", ["strategy=deepspeed", "strategy=fsdp2"]),
    ("+experiment=foo", ["experiment=foo", "leave out the +"]),
    ("train", ["method is not chosen", "mae", "experiment="]),
    # keys
    ("methd=mae", ["methd", "method"]),
    ("method=mae lr=1e-3", ["lr", "optim.lr"]),
    ("method=mae batch_size=64", ["batch_size", "data.batch_size"]),
    ("method=mae optim.lrr=1", ["optim.lrr", "did you mean optim.lr"]),
    ("method=mae +optim.lrr=1", ["optim.lrr", "did you mean lr"]),
    ("method=mae data.batchsize=64", ["data.batchsize", "batch_size"]),
    ("method=mae method.encoder.num_head=4", ["method.encoder.num_head", "num_heads"]),
    ("method=mae trainer.gradient_clip=1", ["trainer.gradient_clip", "gradient_clip_val"]),
    ("method=mae +foo=1", ["foo"]),
    ("method=mae attention=flsh", ["kernel=flsh", "did you mean flash"]),
    ("method=mae trainer.max_steps=10", ["trainer.max_steps", "duration="]),
    ("method=mae trainer.max_time=00:01:00:00", ["trainer.max_time", "duration=", "timeout"]),
    ("method=mae epochs=10", ["epochs", "duration=10epochs"]),
    ("method=mae compil=true", ["compil", "compile"]),
    # values
    ("method=mae optim.lr=fast", ["optim.lr=fast", "a number"]),
    ("method=mae optim.scale_lr=liner", ["optim.scale_lr=liner", "linear"]),
    ("method=mae data.batch_size=6.5", ["data.batch_size=6.5", "a whole number"]),
    ("method=mae trainer.precision=bf16-mixd", ["trainer.precision=bf16-mixd", "bf16-mixed"]),
    ("method=mae compile=maybe", ["compile=maybe", "true or false"]),
    ("method=mae seed=[1,2]", ["seed", "a whole number", "-m"]),
    ("method=mae duration=10", ["duration=10", "epochs"]),
    ("method=mae duration=10epohcs", ["duration=10epohcs", "epochs"]),
    ("export to=timm", ["ckpt is not given", "ckpt="]),
    # grammar
    ("method=mae optim.lr=1e-3,1e-4", ["optim.lr=1e-3,1e-4", "-m"]),
    ("method=mae name=a=b", ["name=a=b", "quote"]),
    ("method=mae optim.lr", ["'optim.lr' has no value", "key=value"]),
    ("method=mae =3", ["=3", "without spaces"]),
    ("quickstart", ["'quickstart' is an experiment", "experiment=quickstart"]),
    ("trian method=mae", ["trian", "train"]),
    ("method=mae --multirum", ["--multirum", "--multirun"]),
    ("-m method=mae seed=0,1 launcher.jobs=2 launcher.gpus=[0]", ["launcher.gpus=[0]", "launcher.jobs=2"]),
    ("-m method=mae,maee", ["method=maee", "mae"]),
    ("-m method=mae seed=0,1 --cfg job", ["--cfg job", "leave out -m"]),
]


SCRIPT = """
import contextlib, io, json, sys
from ssl_lab.cli.main import main

answers = {}
for line in json.loads(sys.argv[1]):
    with contextlib.redirect_stderr(io.StringIO()) as message:
        code = main(line.split())
    answers[line] = code, message.getvalue()
heavy = [name for name in ("torch", "lightning", "timm", "datasets") if name in sys.modules]
print(json.dumps([answers, heavy]))
"""


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """Exit code and message for every line, the heavy packages loaded by then, and the folder they ran in."""
    folder = tmp_path_factory.mktemp("mistakes")
    words = [sys.executable, "-c", SCRIPT, json.dumps([line for line, _ in MISTAKES])]
    done = subprocess.run(words, capture_output=True, text=True, cwd=folder, env=ENV)
    assert done.returncode == 0, done.stderr
    return *json.loads(done.stdout), folder


@pytest.mark.faults("C19", "mistakes in the command line: one line with key and nearest name")
@pytest.mark.parametrize(("line", "named"), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_message_names_the_key_and_the_nearest_name(line, named, asked):
    code, message = asked[0][line]
    assert code == 2
    assert message.startswith("ssl-lab: ")
    assert len(message.strip().splitlines()) == 1, message
    assert len(message) < 500, message
    for name in named:
        assert name in message, message


def test_mistakes_are_found_before_torch_is_loaded(asked):
    assert asked[1] == []


def test_mistakes_leave_nothing_behind(asked):
    assert not list(asked[2].iterdir())


def test_a_value_with_a_space_is_named(capsys):
    assert main(["method=mae", "optim.lr= 1"]) == 2
    assert "without spaces" in capsys.readouterr().err


def test_broken_yaml_is_named_with_its_line(tmp_path, capsys):
    folder = tmp_path / "mine" / "experiment"
    folder.mkdir(parents=True)
    (folder / "broken.yaml").write_text("# @package _global_\ndefaults: [override /method: mae\n")
    assert main(["--config-dir", str(tmp_path / "mine"), "experiment=broken"]) == 2
    message = capsys.readouterr().err
    assert "broken.yaml, line" in message
    assert "YAML" in message


def _experiment(tmp_path, text):
    folder = tmp_path / "mine" / "experiment"
    folder.mkdir(parents=True)
    (folder / "own.yaml").write_text(f"# @package _global_\ndefaults:\n  - override /method: mae\n{text}")
    return ["--config-dir", str(tmp_path / "mine"), "experiment=own"]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("optm: {lr: 1.0}\n", ["optm", "optim"]),
        ("optim: {lrr: 1.0}\n", ["optim.lrr", "lr"]),
        ("optim: {lr: fast}\n", ["optim.lr=fast", "a number"]),
        ("  - override /data: cifra\n", ["data=cifra", "cifar10"]),
        ("method: {encoder: {image_size: '${data.sise}'}}\n", ["method.encoder.image_size", "data.sise"]),
        ("eval: {knnn: {k: 3}}\n", ["eval.knnn", "knn"]),
        ("method: {_target_: ssl_lab.methods.mae.MEA}\n", ["method._target_", "ssl_lab.methods.mae.MEA"]),
    ],
)
def test_mistakes_inside_a_yaml_are_named_too(text, named, tmp_path, capsys):
    assert main(_experiment(tmp_path, text)) == 2
    message = capsys.readouterr().err
    assert len(message.strip().splitlines()) == 1, message
    for name in named:
        assert name in message, message


@pytest.mark.faults("C19", "values that do not fit together: one line with both")
@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("method=supervised method.encoder.dim=33", "method.encoder: dim=33 must be a multiple of num_heads=6"),
        ("method=mae backbone=vit_ti4 method.encoder.dim=30 method.encoder.num_heads=3", "divisible by 4, not 30"),
        ("method=causal_lm method.decoder.num_heads=7", "dim=256 must be a multiple of num_heads=7"),
        ("method=ctc method.encoder.num_heads=7", "dim=144 must be a multiple of num_heads=7"),
    ],
)
def test_what_a_constructor_refuses_is_one_line(line, told, tmp_path, capsys):
    assert main([*line.split(), f"out={tmp_path / 'run'}"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("ssl-lab: method.") and told in message and "Traceback" not in message
    assert len(message.strip().splitlines()) == 1
