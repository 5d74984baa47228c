"""The command line: help without torch, exit codes, the printed configuration, the user's own folder."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

import ssl_lab
from ssl_lab.cli import catalog
from ssl_lab.cli.main import main
from ssl_lab.cli.usage import VERBS
from ssl_lab.errors import UserError

ENV = {**os.environ, "PYTHONPATH": str(Path(ssl_lab.__file__).parents[1])}  # installed or not


@pytest.fixture
def verb(monkeypatch):
    """Put a stand-in where a verb's body is."""

    def install(run, name="train"):
        monkeypatch.setitem(sys.modules, f"ssl_lab.cli.{name}", SimpleNamespace(run=run))

    return install


def printed_config(capsys, *words):
    assert main([*words, "--cfg", "job"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["train", "--help"], ["list"], ["--version"]])
def test_answers_without_loading_torch_or_hydra(argv, tmp_path):
    code = (
        f"import sys; from ssl_lab.cli.main import main; code = main({argv!r}); "
        "print([m for m in ('torch', 'lightning', 'hydra', 'omegaconf', 'antlr4') if m in sys.modules]); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=ENV)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_names_every_verb(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in VERBS)
    assert "experiment=quickstart" in text


@pytest.mark.parametrize("name", VERBS)
def test_help_of_a_verb_has_examples_and_choices(name, capsys):
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert "Examples" in text
    if name == "train":
        for word in ("mae, masked_lm", "shapes", "vit_s16", "duration=10 epochs", "quickstart"):
            assert word in text
    if name == "tokenizer":
        assert "data.path=???" in text and "a folder of them" in text


@pytest.mark.parametrize("name", ["train", "evaluate", "export", "bench", "tokenizer", "doctor"])
def test_examples_in_the_help_compose(name, capsys, tmp_path, monkeypatch, verb):
    from ssl_lab.cli import launch
    from ssl_lab.cli.usage import EXAMPLES

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "COMMAND", [sys.executable, "-c", ""])  # jobs of a sweep are processes
    for body in (name, "bench_suite"):  # the latter is what `bench suite=` calls
        verb(lambda cfg: None, body)
    for line in EXAMPLES[name]:
        assert main(line.split()[1:]) == 0, (line, capsys.readouterr().err)


def test_train_is_the_default_verb(capsys):
    short, long = printed_config(capsys, "method=mae"), printed_config(capsys, "train", "method=mae")
    assert short == long


def test_printed_configuration_is_resolved(capsys):
    cfg = printed_config(capsys, "experiment=quickstart", "seed=3")
    assert cfg["name"] == "quickstart"
    assert cfg["out"] == "runs/quickstart/3"
    assert "${" not in yaml.safe_dump(cfg)
    assert "hydra" not in cfg


def test_a_tilde_is_the_home_folder(capsys, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    words = ["data=folder", "data.path=~/images", "ckpt=~/old", 'out="~/runs/${seed}"']
    cfg = printed_config(capsys, "method=mae", *words)
    assert (cfg["out"], cfg["ckpt"], cfg["data"]["path"]) == ("/home/me/runs/0", "/home/me/old", "/home/me/images")


def test_without_an_experiment_the_method_names_the_run(capsys):
    assert printed_config(capsys, "method=mae")["name"] == "mae"


def test_experiment_beats_root_and_command_line_beats_experiment(tmp_path, capsys):
    folder = tmp_path / "mine" / "experiment"
    folder.mkdir(parents=True)
    text = "# @package _global_\ndefaults: [{override /method: mae}]\nattention: eager\nseed: 7\noptim: {lr: 0.5}\n"
    (folder / "own.yaml").write_text(text)
    cfg = printed_config(capsys, "--config-dir", str(tmp_path / "mine"), "experiment=own", "seed=8")
    assert (cfg["attention"], cfg["seed"], cfg["optim"]["lr"]) == ("eager", 8, 0.5)
    assert cfg["method"]["encoder"]["block"]["kernel"] == "eager"


def test_settings_of_evaluators_that_are_not_chosen_are_left_out(capsys):
    words = ["experiment=igpt_cifar10", "data.path=there"]  # sets eval.knn.limit and eval.linear.limit
    assert printed_config(capsys, *words)["eval"]["knn"]["limit"] == 10000
    assert printed_config(capsys, *words, "eval=[]")["eval"] == {}
    assert list(printed_config(capsys, *words, "eval=[linear]")["eval"]) == ["linear"]


def test_constructor_argument_that_no_yaml_names_needs_no_plus(capsys):
    cfg = printed_config(capsys, "method=mae", "method.encoder.num_registers=4", "trainer.gradient_clip_val=1.0")
    assert cfg["method"]["encoder"]["num_registers"] == 4
    assert cfg["trainer"]["gradient_clip_val"] == 1.0


def test_a_group_mounted_once_needs_no_place(capsys):
    short = printed_config(capsys, "method=mae", "backbone=vit_ti4")
    assert short == printed_config(capsys, "method=mae", "backbone@method.encoder=vit_ti4")
    assert short["method"]["encoder"]["patch_size"] == 4


def test_evaluate_takes_parts_of_what_a_checkpoint_brings(capsys):
    cfg = printed_config(capsys, "evaluate", "ckpt=runs/x/0", "data.batch_size=8")
    assert cfg["data"] == {"batch_size": 8}


def test_own_folder_brings_experiments_and_code(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "own_code.py").write_text("class Own:\n    def __init__(self, size: int = 1) -> None: ...\n")
    (tmp_path / "mine" / "method").mkdir(parents=True)
    (tmp_path / "mine" / "method" / "own.yaml").write_text(
        "defaults: ['/views@_global_.data.views: crop', _self_]\n_target_: own_code.Own\n".replace("'", '"').replace(
            '["/views@_global_.data.views: crop"', "[{/views@_global_.data.views: crop}"
        )
    )
    assert printed_config(capsys, "--config-dir", "mine", "method=own", "method.size=3")["method"]["size"] == 3
    assert main(["--config-dir", "mine", "method=own", "method.sise=3"]) == 2
    assert "size" in capsys.readouterr().err


def test_own_folder_may_not_hide_a_shipped_file(tmp_path, capsys):
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "mae.yaml").write_text("_target_: x.Y\n")
    assert main(["--config-dir", str(tmp_path), "method=mae"]) == 2
    assert "rename it" in capsys.readouterr().err
    assert main(["--config-dir", str(tmp_path / "no"), "method=mae"]) == 2


def test_lightning_does_not_take_the_run_for_one_of_hydra(verb):
    """Else its launcher would start the other ranks with Hydra's arguments."""
    from hydra.core.hydra_config import HydraConfig

    seen = []
    verb(lambda cfg: seen.append(HydraConfig.initialized()))
    assert main(["method=mae"]) == 0
    assert seen == [False]


def test_exit_codes(verb, capsys):
    def fails(error):
        def run(cfg):
            raise error

        verb(run)
        return main(["method=mae"]), capsys.readouterr().err

    code, text = fails(UserError("data.path=/no: there is no such folder"))
    assert (code, text) == (2, "ssl-lab: data.path=/no: there is no such folder\n")
    code, text = fails(ZeroDivisionError("a bug"))
    assert code == 1
    assert "Traceback" in text
    assert "runs/mae/0" in text.splitlines()[-1]
    assert fails(KeyboardInterrupt())[0] == 130


def test_what_a_constructor_refuses_is_told_with_its_key(verb, capsys):
    from ssl_lab.cli.compose import build

    def run(cfg):
        cfg.optim._target_ = "ssl_lab.train.optim.Optim"
        cfg.optim["name"] = "adamm"
        build(cfg.optim)

    verb(run)
    assert main(["method=mae"]) == 2
    assert "adamm" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("node", "named"),
    [
        ({"_target_": "ssl_lab.schedules.Linear", "start": 0.0, "stop": 1.0}, ["optim.stop", "start"]),
        ({"_target_": "ssl_lab.schedules.Linear", "start": 0.0}, ["optim lacks 'end'", "optim.end="]),
        ({"_target_": "ssl_lab.schedules.Linnear"}, ["optim._target_=ssl_lab.schedules.Linnear"]),
    ],
)
def test_late_mistakes_of_construction_name_the_key(node, named, verb, capsys):
    from hydra.utils import instantiate
    from omegaconf import OmegaConf, open_dict

    def run(cfg):
        with open_dict(cfg):
            cfg.optim = OmegaConf.create(node)
        instantiate(cfg.optim, _convert_="all")

    verb(run)
    assert main(["method=mae"]) == 2
    message = capsys.readouterr().err
    assert all(name in message for name in named), message


def test_build_gives_plain_python_and_takes_parts(capsys):
    from omegaconf import OmegaConf

    from ssl_lab.cli.compose import build

    made = build(OmegaConf.create({"_target_": "types.SimpleNamespace", "a": [1, {"b": 2}]}), part={1, 2})
    assert made.a == [1, {"b": 2}]
    assert type(made.a) is list
    assert made.part == {1, 2}


def test_list_shows_experiments_with_their_fields(capsys):
    assert main(["list"]) == 0
    text = capsys.readouterr().out
    for name in catalog.choices("experiment", [catalog.conf_folder()]):
        assert name in text
    for word in ("hardware", "result", "Methods", "Backbones", "Data sets", "vit_s16", "shapes"):
        assert word in text
    assert main(["list", "imagenet"]) == 0
    assert "quickstart" not in capsys.readouterr().out
    assert main(["list", "quikstart"]) == 2
    assert "quickstart" in capsys.readouterr().err


def test_every_experiment_says_what_it_is():
    for experiment in catalog.experiments([catalog.conf_folder()]):
        assert not experiment.summary.startswith("("), experiment.name
        assert set(experiment.fields) == set(catalog.FIELDS), experiment.name


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (
            ["optim.weight_decay={_target_: ssl_lab.schedules.Cosine, start: 0.04, end: 0.4}"],
            "optim.weight_decay.end",
            0.4,
        ),
        (["optim.layer_decay=null"], "optim.layer_decay", None),
        (["duration=10epochs"], "duration", "10epochs"),
        (["duration=10 epochs"], "duration", "10 epochs"),
        (["name=7"], "name", "7"),
        (['name="a=b"'], "name", "a=b"),
        (["eval=knn"], "eval.knn._target_", "ssl_lab.evals.knn.KNN"),
        (["eval=[knn,linear]", "eval.knn.k=7"], "eval.knn.k", 7),
        (["eval=[knn,linear]", "~eval.linear"], "eval.linear", None),
        (["logger=[tensorboard,wandb]"], "logger.csv._target_", "ssl_lab.train.loggers.CSVLogger"),
        (["views@data.views=resize"], "data.views._target_", "ssl_lab.data.views.Resize"),
        (["debug=fast", "eval=[knn]"], "name", "debug-fast"),
    ],
)
def test_ways_to_write_a_value(words, key, value, capsys):
    node = printed_config(capsys, "method=mae", *words)
    for part in key.split("."):
        node = None if node is None else node.get(part)
    assert node == value


def test_one_value_where_a_list_stands(capsys):
    assert printed_config(capsys, "bench", "method=mae", "against=timm")["against"] == ["timm"]


def test_a_path_alone_is_taken_for_a_checkpoint(capsys, tmp_path):
    assert main(["evaluate", str(tmp_path)]) == 2
    assert f"ckpt={tmp_path}" in capsys.readouterr().err
