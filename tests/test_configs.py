"""Every YAML in conf/ composes, every key is an argument of its target, and every method and backbone builds."""

import inspect

import pytest
import torch
import yaml
from hydra.utils import get_object

from ssl_lab.cli import catalog
from ssl_lab.cli.check import arguments_in, targets
from ssl_lab.cli.compose import build, compose

CONF = catalog.conf_folder()
EXPERIMENTS = catalog.choices("experiment", [CONF])
METHODS = catalog.choices("method", [CONF])
PATH = "data.path=somewhere"  # some data sets have no place of their own; nothing is read there


def composed(*words, verb="train"):
    return compose(verb, list(words), [CONF])


def choosing(group, choice):
    """The words that choose it."""
    place = "views@data.views" if group == "views" else group
    if group == "backbone" and (tower := choice.partition("_")[0]) in ("clip", "siglip"):
        place = f"backbone@method.{'text' if '_text' in choice else 'image'}.backbone"
        assert tower in METHODS
    beside = {"pixels": ["data=cifar10_pixels"], "cifar10_pixels": ["views@data.views=pixels"]}.get(choice, [])
    beside += ["method.decoder.max_length=256"] if beside else []
    if choice in SOUND and group == "views":
        beside += ["data=tones"]
    if "spoken" in choice:
        beside += ["data=shapes_spoken"] if group == "views" else ["views@data.views=spoken"]
        beside += ["method.text.backbone.max_length=32"]
    if choice in LISTENING:
        beside += ["data=tones_questions"] if group == "views" else ["views@data.views=conversations_sound"]
        beside += ["backbone@method.model.vision=conformer_small"]
    place = [f"{place}=[{choice}]" if group == "eval" else f"{place}={choice}"]
    return [*place, *beside, *([PATH] if group == "data" else [])]


LISTENING = ("conversations_sound", "tones_questions", "digits_questions")
READERS = {  # of what neither images give nor a method chooses by itself
    ("views", "mask_pairs"): "masked_lm",
    **{("data", name): "masked_lm" for name in ("text", "tinyshakespeare", "passages")},
    **{("data", name): method for name, method in [("sst2", "text_classification"), ("multi30k", "seq2seq")]},
    ("data", "xquad"): "span_qa",
    **{("data", name): "clip" for name in ("shapes_spoken", "captions_spoken")},
    **{("views", name): "clip" for name in ("spoken", "spoken_resize")},
    ("data", "cifar10_pixels"): "causal_lm",
    **{("data", name): "llava" for name in ("easy_vqa", "image_captions", "image_classes", "conversations")},
    ("data", "preferences"): "llava_dpo",
    ("views", "pixels"): "causal_lm",
    **{(group, name): "llava" for group in ("data", "views") for name in LISTENING},
}
SOUND = ("tones", "tones_sequences", "digits", "digits_connected", "audio", "speech", "audio_whole")
FAMILIES = {
    "clip_": "clip",
    "siglip_": "siglip",
    "gpt": "causal_lm",
    "llama": "causal_lm",
    "transformer": "seq2seq",
    "speech_transformer": "seq2seq",
    "t5": "seq2seq",
    "bert": "masked_lm",
    "conformer": "ctc",
    "wav2vec2": "ctc",
    "ast": "audio_classification",
}


def method_for(group, choice):
    """The words that choose a method that reads what the choice gives: one that chooses it itself, or one of images."""
    if group == "method":
        return []
    if group == "backbone":
        return [f"method={next((m for name, m in FAMILIES.items() if choice.startswith(name)), 'supervised')}"]
    mount = f"data@_global_.data: {choice}\n" if group == "data" else f"data.views: {choice}\n"
    choosing = [m for m in METHODS if mount in (CONF / f"method/{m}.yaml").read_text()]
    default = "audio_classification" if choice in SOUND else "supervised"
    return [f"method={READERS.get((group, choice), choosing[0] if choosing else default)}"]


def each_choice():
    """(group, choice) of every YAML in a group that can be chosen beside a method."""
    for group in [*catalog.root("train").groups, "backbone", "views"]:
        for choice in catalog.choices(group, [CONF]):
            if group not in ("experiment", "local"):
                yield group, choice


def build_on_meta(node):
    """The object without memory for its weights; a classifier's classes come from the data set otherwise."""
    parameters = inspect.signature(get_object(node._target_)).parameters
    from_data = {name: 10 for name in ("num_classes", "start_token", "vocab_size") if name in parameters}
    with torch.device("meta"):
        return build(node, **from_data)


def test_there_is_something_to_test():
    assert {"quickstart", "mae_cifar10"} <= set(EXPERIMENTS)
    assert {"mae", "supervised"} <= set(METHODS)
    assert len(list(each_choice())) > 20


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_composes_and_its_method_builds(name):
    cfg = composed(f"experiment={name}", PATH)
    assert cfg.name == name
    assert {str(p.device) for p in build_on_meta(cfg.method).parameters()} == {"meta"}


@pytest.mark.parametrize("name", METHODS)
def test_method_builds(name):
    build_on_meta(composed(f"method={name}").method)


@pytest.mark.parametrize("name", catalog.choices("backbone", [CONF]))
def test_backbone_builds(name):
    method = composed(*method_for("backbone", name), *choosing("backbone", name)).method
    part = next(part for part in ("encoder", "decoder", "model", "text", "image") if part in method)
    part = "image" if part == "text" and "_text" not in name else part
    assert build_on_meta(method[part].get("backbone", method[part])).dim > 0


@pytest.mark.parametrize(("group", "choice"), list(each_choice()))
def test_every_key_is_an_argument_of_its_target(group, choice):
    cfg = composed(*method_for(group, choice), *choosing(group, choice))
    for path, node in targets(cfg):
        target = get_object(node["_target_"])
        if target.__module__ == "datetime":  # written in C, tells no signature
            continue
        parameters = inspect.signature(target).parameters
        if not any(p.kind == p.VAR_KEYWORD for p in parameters.values()):
            assert set(arguments_in(node)) <= set(parameters), path


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_bench_takes_every_experiment(name):
    assert "_target_" in composed(f"experiment={name}", PATH, verb="bench").method


@pytest.mark.parametrize("name", METHODS)
def test_evaluate_takes_the_groups_of_a_method(name):
    chosen = composed(f"method={name}")
    hears = "sampling_rate" in chosen.data
    reads_images = chosen.data.get("path") != "captions" and "encoder" in chosen.method and not hears
    more = ["data=shapes", "backbone=vit_ti4"] if reads_images else []
    cfg = composed(f"method={name}", *more, "eval=[knn]", verb="evaluate")
    assert list(cfg.eval) == ["knn"]
    assert cfg.data._target_ == f"ssl_lab.data.{'audio_module.Audio' if hears else 'module.Data'}Module"


@pytest.mark.parametrize("verb", ["train", "evaluate", "export", "doctor"])
def test_root_file_stands_before_its_groups(verb):
    """Were `_self_` last in a root file, its values would silently beat those of groups and experiments."""
    defaults = yaml.safe_load((CONF / f"{verb}.yaml").read_text()).get("defaults", ["_self_"])
    assert defaults[0] == "_self_"


def test_experiment_is_chosen_after_all_groups_that_it_overrides():
    groups = list(catalog.root("train").groups)
    assert groups[groups.index("experiment") :] == ["experiment", "suite", "debug", "local"]


def test_a_suite_takes_the_place_of_an_experiments_evaluators_and_a_typed_list_that_of_a_suite():
    vision = ["knn", "linear", "low_shot", "retrieval", "crop_scale", "collapse"]
    assert list(composed("method=mae", "suite=vision").eval) == vision
    assert list(composed("suite=vision", "experiment=quickstart", "eval.knn.k=7").eval) == vision
    assert list(composed("experiment=quickstart", "suite=vision", "eval=[knn]").eval) == ["knn"]


def test_conf_holds_only_small_yaml_files():
    for file in CONF.rglob("*"):
        if file.is_file() and file.name != ".gitkeep":
            assert file.suffix == ".yaml", file
            assert len(file.read_text().splitlines()) < 80, file
