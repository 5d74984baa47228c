"""A run's config.yaml may come from anywhere: it is read as data and may build parts of known packages only."""

import pytest
import yaml

from ssl_lab.cli.catalog import conf_folder
from ssl_lab.cli.saved import check_targets, load_config, run_folder, without_downloads
from ssl_lab.errors import UserError

GOOD = {
    "method": {"_target_": "ssl_lab.evals.pixels.Pixels", "parts": [{"_target_": "torch.nn.Identity"}]},
    "fn": {"_target_": "ssl_lab.rng.fold", "_partial_": True},
    "mixup": {"_target_": "timm.data.Mixup"},
}


def save(folder, config):
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(config if isinstance(config, str) else yaml.safe_dump(config))
    return folder


def test_a_config_of_known_parts_is_read(tmp_path):
    assert load_config(save(tmp_path, GOOD)) == GOOD


@pytest.mark.faults("C13", "config that builds what it likes: refused")
@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.eval",
        "subprocess.Popen",
        "ssl_lab.evals.results.os.system",  # a good prefix that leads elsewhere
        "ssl_lab.rng.torch.hub.load",
        "torch.load",
        "torch.hub.load",
        "torchvision_evil.Thing",
        "ssl_lab.no.such.Thing",
        "torch.nn.no_such",
        "ssl_lab",
        7,
        ["os.system"],
    ],
)
def test_other_targets_are_refused_wherever_they_hide(tmp_path, target):
    for config in ({"a": {"_target_": target}}, {"a": [{"b": {"_target_": target, "_args_": ["echo"]}}]}):
        with pytest.raises(UserError, match=r"config.yaml: a.*_target_ = "):
            load_config(save(tmp_path, config))


def test_a_package_of_ones_own_can_be_trusted():
    config = {"a": {"_target_": "json.JSONDecoder"}}
    with pytest.raises(UserError, match=r"add trust=\[json\]"):
        check_targets(config, "here")
    check_targets(config, "here", trust=["json"])


def test_a_class_in_one_file_can_be_trusted_too(tmp_path, monkeypatch):
    (tmp_path / "alone.py").write_text("class Thing:\n    pass\n\ndef make():\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    for target in ("alone.Thing", "alone.make"):
        check_targets({"a": {"_target_": target}}, "here", trust=["alone"])
    with pytest.raises(UserError, match="outside"):
        check_targets({"a": {"_target_": "alone.Thing"}}, "here", trust=["alon"])


@pytest.mark.parametrize("path", sorted((conf_folder() / "strategy").glob("*.yaml")), ids=lambda path: path.stem)
def test_what_a_run_on_several_processes_saves_can_be_read(path):
    assert "_target_" in path.read_text() or path.stem == "single"
    check_targets(yaml.safe_load(path.read_text()), "here")


@pytest.mark.faults("C13", "YAML with code, aliases, a bomb: refused")
@pytest.mark.parametrize(
    "text",
    ["- a", "a: [", "a: !!python/object/apply:os.system [echo]", "a: &x [1]\nb: [*x, *x]", "x: " + "y" * (1 << 20)],
    ids=["list", "cut", "python", "aliases", "huge"],
)
def test_what_is_no_plain_mapping_is_refused(tmp_path, text):
    with pytest.raises(UserError, match=r"config.yaml"):
        load_config(save(tmp_path, text))


def test_starting_weights_are_left_out_and_loss_weights_kept():
    config = {
        "weights": [25.0, 25.0, 1.0],
        "encoder": {"weights": "timm:vit"},
        "head_weights": "hf:bert",
        "towers": [{"pretrained": True, "dim": 3}],
    }
    expected = {
        "weights": [25.0, 25.0, 1.0],
        "encoder": {"weights": None},
        "head_weights": None,
        "towers": [{"pretrained": False, "dim": 3}],
    }
    assert without_downloads(config) == expected
    assert config["encoder"]["weights"] == "timm:vit"


def test_the_run_folder_of_its_parts(tmp_path):
    run = save(tmp_path / "run", GOOD)
    (run / "checkpoints").mkdir()
    assert run_folder(run) == run
    assert run_folder(run / "last.safetensors") == run
    assert run_folder(run / "checkpoints" / "step=3.ckpt") == run
    assert run_folder(tmp_path) is None
