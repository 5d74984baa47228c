"""`ssl-lab train` from the command line to the run folder, and the mistakes that it answers in one line."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from training import TINY, results, rows, run

from ssl_lab.cli.main import main
from ssl_lab.cli.resume import Standing, require_left
from ssl_lab.cli.train import Training
from ssl_lab.errors import UserError
from ssl_lab.train import checkpoint, progress
from ssl_lab.train.signals import Interrupted


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    options = ["eval=[knn,linear,collapse]", "eval.knn.k=3", "baselines=true", "ema=0.9", "logger=[wandb,tensorboard]"]
    assert run([*TINY, *options, f"out={folder / 'run'}"], log=folder / "log") == 0, (folder / "log").read_text()
    return folder / "run", (folder / "log").read_text()


def test_run_folder(finished):
    out, _ = finished
    assert yaml.safe_load((out / "config.yaml").read_text())["optim"]["_target_"] == "ssl_lab.train.optim.Optim"
    assert [row["step"] for row in rows(out)][:12] == [str(n) for n in range(1, 13)]
    assert float(rows(out)[0]["train/loss"]) > 0 and float(rows(out)[5]["opt/lr"]) > 0
    assert float(rows(out)[5]["opt/grad_norm"]) > 0
    assert checkpoint.find(out).name == "step=12.ckpt" and (out / "checkpoints" / "last.ckpt").exists()
    assert {p.name for p in (out / "pictures").glob("*.png")} == {"reconstruction_step=12.png", "features_step=12.png"}
    subjects = {(subject, evaluator) for subject, _, evaluator, _, _ in results(out)}
    assert {("trained", "knn"), ("random encoder", "linear"), ("raw pixels", "collapse")} <= subjects
    assert all("protocol" in row for row in json.loads((out / "metrics.json").read_text()))


def test_exported_weights_are_the_averaged_ones(finished):
    from ssl_lab.weights.io import build

    out, _ = finished
    state = checkpoint.read(checkpoint.find(out))
    for name, value in build(out).state_dict().items():
        assert torch.equal(value, state["state_dict"][f"encoder.{name}"])
    averaged, current = (state[key]["encoder.norm.weight"] for key in ("state_dict", "current_model_state"))
    assert not torch.equal(averaged, current)


def test_screen(finished):
    _, text = finished
    for word in ("MAE", "12 steps x 8 samples", "peak lr", "random encoder", "raw pixels", "last.safetensors"):
        assert word in text.replace("\n", ""), word
    assert "Traceback" not in text and "Warning" not in text, text


def test_loggers_got_the_same(finished):
    out, _ = finished
    assert [*out.glob("wandb/offline-run-*/run-*.wandb")]
    assert [*out.glob("tensorboard/events.out.tfevents.*")]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optim.lr=0.5"], "optim.lr: not set there, 0.5 here; give another out="),
        (["duration=20steps", "seed=3"], "seed: 0 there, 3 here"),
        (["data.batch_size=4"], "data.batch_size: 8 there, 4 here"),
    ],
)
def test_another_run_in_the_folder_is_refused(finished, capsys, words, message):
    out, _ = finished
    assert main([*TINY, "ema=0.9", f"out={out}", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trainer.precision=16-mixed"], "trainer.precision=16-mixed needs a GPU"),
        (["trainer.precision=bf17"], "bf17"),
        (["trainer.log_every_n_steps=0"], "trainer.log_every_n_steps"),
        (["ckpt=nowhere/last.ckpt"], "ckpt=nowhere/last.ckpt"),
        (["trainer.gradient_clip_algorithm=norms"], "norms"),
        (["ema=1.5"], "ema=1.5"),
        (["out=/proc/run"], "/proc/run"),
        (["ema=0.9", "trainer.precision=bf16-true"], "trainer.precision=bf16-mixed"),
        (["ema=abc"], "ema=abc"),
        (["trainer.accumulate_grad_batches=0"], "trainer.accumulate_grad_batches=0"),
        (["optim.betas=[0.9]"], "optim.betas=[0.9]"),
        (["optim.betas=[1.5,2]"], "optim.betas=[1.5, 2"),
        (["optim.warmup=2"], "optim.warmup=2"),
        (["optim.min_lr=-1"], "optim.min_lr=-1"),
        (["eval=[knn]", "eval.knn.every=-3"], "eval.knn.every=-3"),
        (["picture_steps=-1"], "picture_steps=-1"),
        (["save_steps=-1"], "save_steps=-1"),
        (["optim.layer_decay=0"], "optim.layer_decay=0"),
        (["optim.weight_decay=-1"], "optim.weight_decay=-1"),
        (["+tuning.parts=[encoder]"], "take them away with '~tuning.parts'"),
    ],
)
def test_mistakes(tmp_path, capsys, words, message):
    assert main([*TINY, f"out={tmp_path / 'run'}", *words]) == 2
    text = capsys.readouterr().err
    assert message in text and text.count("\n") == 1


@pytest.mark.parametrize(
    ("method", "words", "message"),
    [
        ("moco_v3", ["trainer.precision=bf16-true"], "MoCoV3's key encoder moves by steps that 16 bits round away"),
        ("dino", ["trainer.precision=bf16-true"], "DINO's teacher moves by steps that 16 bits round away"),
    ],
)
def test_mistakes_of_a_method(tmp_path, capsys, method, words, message):
    sizes = ["method.encoder.dim=32", "method.encoder.depth=2", "method.encoder.num_heads=2", "data.num_workers=0"]
    assert main([f"method={method}", "backbone=vit", "data=shapes", *sizes, f"out={tmp_path / 'run'}", *words]) == 2
    text = capsys.readouterr().err
    assert message in text and text.count("\n") == 1


def test_sound_is_not_rounded_before_it_is_heard(tmp_path, capsys):
    assert (
        main(["experiment=conformer_tones", "ema=null", "trainer.precision=bf16-true", f"out={tmp_path / 'run'}"]) == 2
    )
    text = capsys.readouterr().err
    assert "trainer.precision=bf16-true rounds sound before it is heard" in text and text.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        (["duration=1epochs"], 5),
        (["duration=24samples"], 3),
        (["duration=1epochs", "trainer.accumulate_grad_batches=2"], 3),
        (["trainer.precision=bf16-mixed", "duration=3steps"], 3),
        (["trainer.gradient_clip_val=0.1", "optim.name=muon", "duration=3steps"], 3),
    ],
)
def test_lengths_and_options(tmp_path, words, steps):
    out = tmp_path / "run"
    assert run([*TINY, *words, f"out={out}"], log=tmp_path / "log") == 0, (tmp_path / "log").read_text()
    assert checkpoint.facts(checkpoint.find(out))["step"] == steps
    assert rows(out)[-1]["step"] == str(steps)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ({"encoder": {}}, "method.encoder.weights=other"),
        ({"decoder": {}}, "method.decoder.weights=other"),
        ({"model": {"decoder": {}}, "weights": None}, "method.weights=other"),
    ],
)
def test_a_finished_run_is_begun_from_where_its_method_takes_weights(method, words):
    with pytest.raises(UserError, match=words):
        require_left(Standing(Path("other"), 12, own=False), "other", 12, method)


def test_a_signal_before_the_first_checkpoint(tmp_path, monkeypatch, capsys):
    def early(self):
        raise Interrupted(signal.SIGTERM)

    monkeypatch.setattr(Training, "fit", early)
    with pytest.raises(SystemExit) as left:
        main([*TINY, f"out={tmp_path / 'run'}"])
    assert left.value.code == 75 and "SIGTERM: nothing to save yet" in capsys.readouterr().out


def test_begin_from_another_checkpoint(finished, tmp_path, capsys):
    source, _ = finished
    out = tmp_path / "run"
    words = [*TINY, "ema=0.9", "duration=14steps", f"out={out}", f"ckpt={source}"]
    assert run(words, log=tmp_path / "log") == 0, (tmp_path / "log").read_text()
    assert "from step 12" in (tmp_path / "log").read_text()
    assert [row["step"] for row in rows(out)] == ["13", "14"]
    assert main([*words[:-3], "duration=12steps", f"out={tmp_path / 'none'}", words[-1]]) == 2
    told = f"ckpt={source} has 12 steps behind it, and duration comes to 12: give a longer one"
    assert told in capsys.readouterr().err and not (tmp_path / "none/config.yaml").exists()
    assert main(words) == 0, "a finished run may name what it began from"
    assert main([*words[:-2], f"out={tmp_path / 'faster'}", words[-1], "optim.lr=0.5"]) == 2
    assert "optim.lr is" in capsys.readouterr().err
    words = [*words[:-2], f"out={tmp_path / 'other'}", words[-1], "method.encoder.dim=48"]
    assert main(words) == 2
    assert "does not fit" in capsys.readouterr().err


TEXT = ["method=causal_lm", "data=text", "data.tokenizer.kind=character", "data.train.length=8", "data.batch_size=4"]
TEXT += [f"method.decoder.{word}" for word in ("dim=16", "depth=1", "num_heads=2")]


def test_a_text_that_has_changed_does_not_change_the_tokenizer_of_a_run(tmp_path, capsys):
    path, out = tmp_path / "text.txt", tmp_path / "run"
    path.write_text("abcdefgh\n" * 200)
    words = [*TEXT, f"data.path={path}", "eval=[perplexity]", "trainer.accelerator=cpu"]
    for _ in range(2):
        assert main([*words, "duration=2steps", f"out={out}"]) == 0
    saved = (out / "tokenizer.json").read_text()
    path.write_text("bcdefghi\n" * 200)
    capsys.readouterr()
    assert main([*words, "duration=2steps", f"out={out}"]) == 2
    assert f"{out} was trained with another tokenizer" in capsys.readouterr().err
    assert (out / "tokenizer.json").read_text() == saved
    assert main(["evaluate", f"ckpt={out}", "eval=[perplexity]"]) == 2
    assert "no token for 'i'" in capsys.readouterr().err, "the tokenizer of the run, not one of the text as it is now"
    path.write_text("bcdefgh\n" * 200)
    assert main(["evaluate", f"ckpt={out}", "eval=[perplexity]"]) == 0
    other = [*words, "duration=4steps", f"ckpt={out}", f"out={tmp_path / 'other'}"]
    assert main(other) == 2
    assert main([word for word in other if "kind=" not in word] + [f"data.tokenizer={out}"]) == 0


@pytest.mark.parametrize("terminal", [True, False])
def test_bar_shows_steps_speed_and_time_left(terminal, monkeypatch):
    monkeypatch.setattr(progress, "_REFRESH", 0.0)
    monkeypatch.setattr(progress, "_LINE", 0.0)
    screen = io.StringIO()
    bar = progress.StepBar(Console(file=screen, force_terminal=terminal, width=100))
    trainer, method = SimpleNamespace(global_step=40, max_steps=100), SimpleNamespace(samples_per_step=64)
    bar.on_train_start(trainer, method)
    for trainer.global_step in range(41, 45):
        time.sleep(0.02)
        bar.on_train_batch_end(trainer, method, {"loss": torch.tensor(0.25)}, None, 0)
    bar.on_train_end(trainer, method)
    text = screen.getvalue()
    assert "44/100" in text and "samples/s" in text and "loss 0.25" in text
    assert ("min left" in text) == (not terminal)


@pytest.mark.faults("C18", "W&B asked for, no network: the run goes on offline")
@pytest.mark.slow
def test_no_connection_to_wandb_is_no_reason_to_fail(tmp_path):
    out = tmp_path / "run"
    words = [*TINY, "duration=2steps", f"out={out}", "logger=wandb", "logger.wandb.mode=online"]
    env = os.environ | {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40}
    command = [sys.executable, "-m", "ssl_lab", *words]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert rows(out)[-1]["step"] == "2"


def test_a_run_in_bf16_alone_ends_in_bf16_and_so_does_its_repetition(tmp_path):
    words = [*TINY, "trainer.precision=bf16-true", "eval=[collapse]", "duration=2steps", f"out={tmp_path / 'run'}"]
    found = []
    for again in range(2):
        log = tmp_path / f"log{again}"
        assert run(words, log=log) == 0, log.read_text()
        state = load_file(tmp_path / "run/last.safetensors")
        assert {value.dtype for value in state.values()} == {torch.bfloat16}
        found.append((state, results(tmp_path / "run")))
    assert found[0][1] == found[1][1] and all(torch.equal(found[0][0][k], v) for k, v in found[1][0].items())
