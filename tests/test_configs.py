"""Every YAML in conf/ composes, every key is an argument of its target, and every method and backbone builds."""

import inspect
from pathlib import Path

import pytest
import torch
import yaml
from hydra.utils import get_object, instantiate

from ssl_lab.cli import catalog
from ssl_lab.cli.check import arguments_in, targets
from ssl_lab.cli.compose import compose

CONF = catalog.conf_folder()
EXPERIMENTS = catalog.choices("experiment", [CONF])
METHODS = catalog.choices("method", [CONF])
PATH = "data.path=somewhere"  # sets that need a place get one; nothing is read


def composed(*words, verb="train"):
    return compose(verb, list(words), [CONF])


def needs_path(cfg_words):
    """The words, with a path where the chosen data set has none of its own."""
    from ssl_lab.errors import UserError

    try:
        return composed(*cfg_words)
    except UserError as error:
        if "data.path" not in str(error):
            raise
        return composed(*cfg_words, PATH)


def each_choice():
    """(group, choice) of every YAML in a group that a root file offers."""
    for group in [*catalog.root("train").groups, "backbone", "views"]:
        for choice in catalog.choices(group, [CONF]):
            if group not in ("experiment", "method", "local"):
                yield group, choice


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_composes(name):
    cfg = needs_path([f"experiment={name}"])
    assert cfg.name == name


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_method_of_experiment_builds(name):
    with torch.device("meta"):
        instantiate(needs_path([f"experiment={name}"]).method, _convert_="all")


@pytest.mark.parametrize("name", METHODS)
def test_method_builds(name):
    with torch.device("meta"):
        instantiate(needs_path([f"method={name}"]).method, _convert_="all")


@pytest.mark.parametrize("name", catalog.choices("backbone", [CONF]))
def test_backbone_builds(name):
    cfg = needs_path(["method=supervised", f"backbone={name}"])
    with torch.device("meta"):
        instantiate(cfg.method.encoder, _convert_="all")


@pytest.mark.parametrize(("group", "choice"), list(each_choice()))
def test_every_key_is_an_argument_of_its_target(group, choice):
    cfg = needs_path(["method=supervised", f"{group}=[{choice}]" if group == "eval" else f"{group}={choice}"])
    for path, node in targets(cfg):
        target = get_object(node["_target_"])
        parameters = inspect.signature(target).parameters
        if not any(p.kind == p.VAR_KEYWORD for p in parameters.values()):
            assert set(arguments_in(node)) <= set(parameters), path


@pytest.mark.parametrize("verb", ["train", "evaluate", "export", "bench", "doctor"])
def test_root_file_stands_first(verb):
    """Were `_self_` last in a root file, its values would silently beat those of groups and experiments."""
    defaults = yaml.safe_load((CONF / f"{verb}.yaml").read_text()).get("defaults", ["_self_"])
    assert defaults[0] == "_self_" or isinstance(defaults[0], str), "or includes another root file"
    groups = [entry for entry in defaults if isinstance(entry, dict)]
    if groups:
        assert defaults.index("_self_") < defaults.index(groups[0])


def test_every_key_of_the_train_root_has_a_use_for_a_reader():
    root = catalog.root("train")
    assert {"method", "data", "optim", "trainer", "eval", "logger", "experiment"} <= set(root.groups)
    assert {"attention", "seed", "duration", "ckpt", "name", "out"} <= set(root.keys)
    assert catalog.root("bench").keys.items() >= {k: v for k, v in root.keys.items() if k != "out"}.items()


def test_conf_holds_only_small_yaml_files():
    for file in Path(CONF).rglob("*"):
        if file.is_file() and file.name != ".gitkeep":
            assert file.suffix == ".yaml", file
            assert len(file.read_text().splitlines()) < 80, file
