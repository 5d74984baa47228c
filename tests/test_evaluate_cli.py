"""`ssl-lab evaluate` from the command line: it repeats what training measured, and answers mistakes in one line."""

import io
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from training import TINY

from ssl_lab.cli.catalog import conf_folder
from ssl_lab.cli.compose import compose
from ssl_lab.cli.data_name import data_name
from ssl_lab.cli.gallery import Gallery
from ssl_lab.cli.main import main
from ssl_lab.cli.usage import verb_of
from ssl_lab.errors import UserError
from ssl_lab.evals.collapse import Collapse
from ssl_lab.evals.linear import Linear
from ssl_lab.evals.results import read

ARCHITECTURE = [word for word in TINY if word.startswith(("method", "backbone", "data"))]
KNN = ["eval=[knn]", "eval.knn.k=3"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluate") / "run"
    assert main(repeated(out)) == 0
    return out


def repeated(out):
    """The command of the run."""
    short = ["duration=4steps", "trainer.precision=bf16-mixed", "trainer.enable_progress_bar=false"]
    return [*TINY, *short, *KNN, f"out={out}"]


@pytest.fixture
def run(trained, tmp_path):
    """A copy that a test may write to."""
    shutil.copytree(trained, tmp_path / "run", symlinks=True)
    return tmp_path / "run"


def values(folder):
    return {(r.subject, r.step, r.evaluator, r.name): r.value for r in read(folder / "metrics.json")}


def test_a_run_gives_offline_what_it_gave_in_training(run, capsys):
    before = read(run / "metrics.json")
    assert main(["evaluate", f"ckpt={run}", *KNN]) == 0
    after = read(run / "metrics.json")
    assert [r.key for r in after] == [r.key for r in before] and [r.value for r in after] == [r.value for r in before]
    assert after[0].time >= before[0].time
    assert "trained" in capsys.readouterr().out
    assert (run / "pictures/features.png").stat().st_size > 1000


def test_baselines_and_all_evaluators_stand_beside_it(run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    words = ["eval=[knn,linear,collapse,finetune]", "eval.finetune.steps=2", "baselines=true", "+data.batch_size=4"]
    assert main(["evaluate", f"ckpt={run / 'checkpoints/last.ckpt'}", *words]) == 0
    found = values(run)
    for subject, step in (("random encoder", 0), ("trained", 4)):
        assert {(subject, step, e, "top1") for e in ("knn", "linear", "finetune")} <= found.keys()
    assert ("raw pixels", 0, "collapse", "rankme") in found
    text = capsys.readouterr().out
    assert "raw pixels" in text and "rankme" in text and "lr_0.001" not in text


SUITE = {"knn", "linear", "low_shot", "retrieval", "crop_scale", "collapse"}
FEW = ["eval.low_shot.fractions=[0.5,1]", "eval.low_shot.steps=5"]  # of 40 images


def test_a_suite_is_one_table_on_the_screen_and_as_a_file(run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["evaluate", "suite=vision", f"ckpt={run}", "baselines=true", *FEW]) == 0
    found = values(run)
    for subject, step in (("raw pixels", 0), ("random encoder", 0), ("trained", 4)):
        assert {e for s, n, e, _ in found if (s, n) == (subject, step)} == SUITE
    shown, written = capsys.readouterr().out, (run / "table.md").read_text()
    for (_, _, _, name), value in found.items():
        if "/" not in name:
            assert f"{value:#.4g}" in shown and f"{value:#.4g}" in written and name in shown and name in written
    assert max(len(line) for line in shown.splitlines() if "top1" in line or "raw pixels" in line) <= 80
    assert (
        "| raw pixels | random encoder | trained step 4 |" in written
        and "- retrieval: rows train 40, test 16" in written
    )


def test_other_data_take_the_views_of_the_run(run, tmp_path):
    words = [
        "data=shapes",
        "data.train.length=20",
        "data.test.length=10",
        "data.image_size=16",
        f"out={tmp_path / 'o'}",
    ]
    assert main(["evaluate", f"ckpt={run}", *words, *KNN, "pictures=false"]) == 0
    assert ("trained", 4, "knn", "top1") in values(tmp_path / "o")


def test_other_data_do_not_replace_the_results_of_the_run(run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    before = read(run / "metrics.json")
    same = [word for word in ARCHITECTURE if word.startswith("data")]
    assert main(["evaluate", f"ckpt={run}", *same, *KNN, "pictures=false"]) == 0
    own = read(run / "metrics.json")
    assert [r.key for r in own] == [r.key for r in before], "chosen again, but the same"
    assert main(["evaluate", f"ckpt={run}", "+data.eval_views.size=16", *KNN, "pictures=false"]) == 0
    other = read(run / "metrics.json")
    assert other[: len(own)] == own and {r.data for r in other[len(own) :]} == {"size=16"}
    assert "trained on size=16" in capsys.readouterr().out
    assert main(repeated(run)) == 0
    assert read(run / "metrics.json") == other


def test_other_data_are_named():
    own = {part: {"_target_": "a.Images", "path": "a/b", "split": part, "tokenizer": "x"} for part in ("train", "test")}
    own["eval_views"] = {"size": 32}
    assert data_name(own, own | {"tokenizer": "y", "batch_size": 3, "views": {}}) == ""
    assert data_name(own, {k: v | {"path": "c"} if "path" in v else v for k, v in own.items()}) == "path=c"
    other = {"train": {"_target_": "a.Files", "path": "c"}, "test": {"_target_": "a.Files", "path": "c"}}
    assert data_name(own, other | {"eval_views": {"size": 64}}) == "c, size=64"
    assert data_name({}, {"test": {"_target_": "a.Shapes", "length": 3}}) == "Shapes"


def test_features_are_extracted_once_for_all_evaluators_and_pictures(run, monkeypatch):
    from ssl_lab.data.module import DataModule

    asked, original = [], DataModule.eval_loader

    def eval_loader(self, split, limit=None):
        asked.append((split, limit))
        return original(self, split, limit)

    monkeypatch.setattr(DataModule, "eval_loader", eval_loader)
    assert main(["evaluate", "suite=vision", f"ckpt={run}", *FEW]) == 0
    crops = 3  # of the test split
    assert asked.count(("train", None)) == 1 and asked.count(("test", None)) == 1 + crops
    assert {limit for _, limit in asked} == {None, 8}  # 8 images to look at


def test_pictures_are_a_page_that_opens_from_disk(run):
    assert main(["evaluate", f"ckpt={run}", *KNN]) == 0
    page = (run / "pictures/index.html").read_text()
    linked = set(re.findall(r'src="([^"]+)"', page))
    assert linked == {"neighbours.png", "map.png", "map_images.png", "attention.png", "features.png"}
    assert all((run / "pictures" / name).stat().st_size > 500 for name in linked)
    assert "http" not in page and ">knn<" not in page and "<td>trained</td>" in page and "run, trained, step 4" in page


def test_pictures_without_our_blocks_or_not_at_all(tmp_path):
    words = ["method=supervised", "backbone@method.encoder=timm", "method.encoder.name=resnet10t", *KNN]
    words += [word for word in ARCHITECTURE if word.startswith("data")]
    assert main(["evaluate", *words, f"out={tmp_path / 'a'}"]) == 0
    page = (tmp_path / "a/pictures/index.html").read_text()
    assert "No attention maps: Timm has no blocks of ours" in page and 'src="neighbours.png"' in page
    assert main(["evaluate", *words, f"out={tmp_path / 'b'}", "pictures=false"]) == 0
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["metrics.json", "table.md"]


def test_a_suite_judges_weights_that_timm_wrote(run, tmp_path):
    assert main(["export", f"ckpt={run}", "to=timm", f"out={tmp_path / 'timm'}"]) == 0
    words = ["evaluate", "suite=vision", *ARCHITECTURE, *FEW, f"out={tmp_path / 'out'}", "precision=bf16-mixed"]
    assert main([*words, f"ckpt=timm:local-dir:{tmp_path / 'timm'}"]) == 0
    assert main(["evaluate", "suite=vision", f"ckpt={run}", *FEW]) == 0
    theirs, ours = values(tmp_path / "out"), {k: v for k, v in values(run).items() if k[2] != "knn"}
    theirs = {k[2:]: v for k, v in theirs.items() if k[2] != "knn"}
    assert theirs == pytest.approx({k[2:]: v for k, v in ours.items()})


def test_a_suite_judges_weights_that_transformers_wrote(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    table = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    config = transformers.ViTConfig(**table, image_size=32, patch_size=8)
    transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "hf")
    words = ["evaluate", "suite=vision", *ARCHITECTURE, *FEW, f"out={tmp_path / 'out'}", "pictures=false"]
    words.append("method.encoder.positions=learned")
    assert main([*words, f"ckpt=hf:{tmp_path / 'hf'}"]) == 0
    assert {(s, e) for s, _, e, _ in values(tmp_path / "out")} == {(f"hf:{tmp_path / 'hf'}", e) for e in SUITE}
    capsys.readouterr()
    assert main([*words, f"ckpt=hf:{tmp_path / 'nothing'}"]) == 2
    error = capsys.readouterr().err
    assert f"hf:{tmp_path / 'nothing'}" in error and error.count("\n") == 1


def test_timm_without_a_network_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("timm.create_model", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    words = ["method=mae", "backbone=vit_ti16", "data=shapes", "data.train.length=8", "data.test.length=8"]
    assert main(["evaluate", "suite=vision", "ckpt=timm:vit_tiny_patch16_224", *words, f"out={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert "timm:vit_tiny_patch16_224: no weights (no network)" in error and error.count("\n") == 1


def test_weights_without_a_run(run, tmp_path):
    alone = tmp_path / "elsewhere.safetensors"
    shutil.copy(run / "last.safetensors", alone)
    out = tmp_path / "out"
    assert main(["evaluate", f"ckpt={alone}", *ARCHITECTURE, *KNN, "precision=bf16-mixed", f"out={out}"]) == 0
    assert values(out) == {(str(alone), 0, "knn", name): value for (_, _, _, name), value in values(run).items()}


def test_weights_of_an_encoder_are_not_judged_by_a_new_head(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    words = ["evaluate", "method=supervised", *ARCHITECTURE[1:], "pictures=false"]
    words += [f"ckpt={run / 'last.safetensors'}", f"out={tmp_path / 'out'}"]
    words = [word for word in words if not word.startswith("method.decoder")]
    assert main([*words, "eval=[knn,accuracy]", "eval.knn.k=3"]) == 0
    assert {evaluator for _, _, evaluator, _ in values(tmp_path / "out")} == {"knn"}
    assert "evaluator accuracy skipped: ckpt=" in capsys.readouterr().out
    assert main([*words, "eval=[accuracy]"]) == 2
    error = capsys.readouterr().err
    assert "eval=[accuracy] judges more than features" in error and error.count("\n") == 1


def test_an_untrained_encoder_depends_on_the_seed_alone(tmp_path):
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert main(["evaluate", *ARCHITECTURE, "eval=[collapse]", f"seed={seed}", f"out={tmp_path / folder}"]) == 0
    a, b, c = (values(tmp_path / folder) for folder in "abc")
    assert a == b and a.keys() == c.keys() and a != c
    assert {subject for subject, *_ in a} == {"random encoder"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ckpt=runs/no_such_run"], "ckpt=runs/no_such_run does not exist"),
        ([], "method is not known: choose method=NAME, or give ckpt=<run folder>"),
        (["ckpt=RUN", "eval=[]"], "choose e.g. eval=[knn,linear]"),
        (["ckpt=RUN", "+method.encoder.dim=64"], "does not fit this MAE"),
        (["ckpt=RUN", "device=abacus"], "device=abacus"),
        (["ckpt=RUN", "+data.batch_size=0"], "data.batch_size is 0"),
        (["ckpt=RUN/metrics.json"], "metrics.json"),
        (["ckpt=RUN", "out=RUN/config.yaml"], "config.yaml: File exists; give a folder that can be written to"),
        (["ckpt=RUN", "suite=vison"], "suite=vison does not exist; did you mean vision?"),
        (["ckpt=RUN", "projection=tsne"], "projection=tsne does not exist; there are pca, umap"),
        (["ckpt=RUN", "suite=vision", "eval.low_shot.fractions=[2]"], "low_shot.fractions=[2]"),
        (
            ["ckpt=runs/no_such.safetensors", "suite=vision"],
            "a run folder, a .ckpt, a .safetensors, timm:<name>, hf:",
        ),
        (["ckpt=timm:vit_tiny_patch16_224", "suite=vision"], "weights alone need a method whose encoder they fit"),
        (["ckpt=timm:vit_tinny_patch16_224", "suite=vision", *ARCHITECTURE], "timm has no model"),
    ],
)
def test_mistakes_are_answered_in_one_line(run, capsys, words, message):
    words = [word.replace("RUN", str(run)) for word in words]
    assert main(["evaluate", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and "Traceback" not in error


def test_a_configuration_that_would_run_something_else_is_refused(run, tmp_path, capsys):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["views"] = {"_target_": "os.system", "_args_": [f"touch {tmp_path / 'harm'}"]}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["evaluate", f"ckpt={run}"]) == 2
    assert "os.system" in capsys.readouterr().err and not (tmp_path / "harm").exists()


def documented():
    text = (Path(__file__).parent.parent / "docs/evaluation.md").read_text()
    return [line for line in text.splitlines() if line.startswith("ssl-lab ")]


@pytest.mark.parametrize("command", documented())
def test_documented_commands_compose(command):
    verb, words = verb_of(command.split()[1:], [conf_folder()])
    cfg = compose(verb or "train", words, [conf_folder()])
    assert set(cfg.eval) <= {"knn", "linear", "collapse", "finetune", "low_shot", "retrieval", "crop_scale"}


def test_a_long_extraction_is_shown(monkeypatch):
    from ssl_lab.cli import watch

    now = [0.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: now[0])
    console = Console(file=io.StringIO(), width=120)
    with watch.Extraction(console, {"train": 5000, "test": 100}) as shown:
        shown.subject = "trained"
        for done in range(100, 5001, 100):
            now[0] += 1.0
            shown.rows("train", done, None)
        shown.begin("knn")
        for done in (50, 100):
            now[0] += 20
            shown.rows("test", done, 60)
    assert console.file.getvalue() == "trained: features of train, 3,100 of 5,000, 100 a second\n"


def test_what_was_measured_outlives_a_failure_of_the_next(run, tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise UserError("no room")

    out = tmp_path / "out"
    words = ["evaluate", f"ckpt={run}", "eval=[knn,collapse]", f"out={out}"]
    with monkeypatch.context() as broken:
        broken.setattr(Collapse, "run", fail)
        assert main(words) == 2
    assert {r.evaluator for r in read(out / "metrics.json")} == {"knn"}
    monkeypatch.setattr(Gallery, "write", fail)
    capsys.readouterr()
    assert main(words) == 2
    assert "rankme" in capsys.readouterr().out and {r.evaluator for r in read(out / "metrics.json")} == {
        "knn",
        "collapse",
    }
    (out / "metrics.json").write_text("{")
    monkeypatch.setattr(Collapse, "run", None)
    assert main(words) == 2
    assert "metrics.json is not a list of results" in capsys.readouterr().err


def test_training_too_keeps_each_result_at_once(run, capsys, monkeypatch):
    words = [*repeated(run), "eval=[knn,collapse,linear]", "eval.linear.passes=1"]
    with monkeypatch.context() as broken:
        broken.setattr(Linear, "run", None)
        assert main(words) == 1
    found = values(run)
    assert ("trained", 4, "collapse", "rankme") in found and ("trained", 4, "linear", "top1") not in found
    monkeypatch.setattr(Collapse, "run", None)
    assert main(words) == 0 and values(run).items() >= found.items()
    last = (run / "metrics.csv").read_text().splitlines()
    row = dict(zip(last[0].split(","), last[-1].split(","), strict=True))
    assert row["step"] == "4" and row["eval/linear/top1"] and row["eval/collapse/rankme"]


def test_rows_are_plain_json(trained):
    (row, *_) = json.loads((trained / "metrics.json").read_text())
    assert row["protocol"]["k"] == 3 and row["samples"] == {"train": 40, "test": 16}
