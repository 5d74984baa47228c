"""Zero-shot classification against a naive loop, and what it says of chance, of classes left out and of mistakes."""

import json
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics.functional.classification import multiclass_accuracy

from ssl_lab.data.source import Samples
from ssl_lab.errors import UserError
from ssl_lab.evals.base import Round, Skip
from ssl_lab.evals.runner import run_all
from ssl_lab.evals.texts import embed_texts
from ssl_lab.evals.zero_shot import TEMPLATES, ZeroShot, class_embeddings
from ssl_lab.types import EmbedsPairs

NAMES = ["red_star", "blue ring", "moon", "heart", "cross", "circle"]
DIM = 6


class Encode:
    """Characters as tokens."""

    def __call__(self, texts):
        rows = [[ord(c) % 97 for c in text][:24] for text in texts]
        tokens = torch.tensor([row + [0] * (24 - len(row)) for row in rows])
        return {"tokens": tokens, "valid": torch.tensor([[i < len(r) for i in range(24)] for r in rows])}


class TwoTowers(nn.Module):
    """Random maps of images and of counts of characters."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(12, DIM), nn.Embedding(97, DIM)
        self.batches = 0

    def embed(self, batch):
        return batch["image"].flatten(1)

    def embed_image(self, batch):
        self.batches += 1
        return F.normalize(self.image(batch["image"].flatten(1)), dim=1)

    def embed_text(self, batch):
        weight = batch["valid"].to(self.text.weight.dtype).unsqueeze(2) * torch.arange(1, 25).view(1, -1, 1)
        return F.normalize((self.text(batch["tokens"]) * weight).sum(1), dim=1)


class Source:
    unit = "images"

    def __init__(self, length=90, classes=NAMES):
        g = torch.Generator().manual_seed(1)
        self.images = torch.randn(length, 3, 2, 2, generator=g)
        self.targets = torch.randint(0, len(classes) or 1, (length,), generator=g)
        self.classes, self.encode = list(classes), Encode()

    def __len__(self):
        return len(self.images)

    def read(self, rows):
        index = torch.tensor(rows)
        return Samples(self.images[index], self.targets[index], index)


class Data:
    def __init__(self, test):
        self.train = self.test = test
        self.classes = test.classes

    def eval_loader(self, split, limit=None):
        rows = torch.arange(len(self.test))[:limit]
        for part in rows.split(32):
            yield {"image": self.test.images[part], "target": self.test.targets[part], "index": part}


@pytest.fixture
def data():
    return Data(Source())


def run(data, evaluator, method=None):
    notes = []
    rows = run_all({"zero_shot": evaluator}, method or TwoTowers(), data, say=notes.append)
    return {row.name: row.value for row in rows}, rows, notes


def naive(method, source, names, templates):
    """Scores (N, C), one image and one prompt after the other, in float64."""
    method = method.double()
    scores = []
    with torch.no_grad():
        for image in source.images.double():
            x = method.embed_image({"image": image[None]})[0]
            line = []
            for name in names:
                total = torch.zeros(DIM, dtype=torch.float64)
                for template in templates:
                    embedded = method.embed_text(source.encode([template.replace("{}", name)]))[0]
                    total += embedded / embedded.norm()
                mean = total / len(templates)
                line.append(float(x @ (mean / mean.norm())))
            scores.append(line)
    method.float()
    return torch.tensor(scores)


@pytest.mark.parametrize("templates", [None, ["{} is here", "I see a {}, a {}"]])
def test_it_is_the_naive_loop(data, templates):
    method, names = TwoTowers(), ["red star", *NAMES[1:]]
    values, _, _ = run(data, ZeroShot(templates=templates), method)
    scores = naive(method, data.test, names, templates or TEMPLATES)
    best, y = scores.argmax(1), data.test.targets
    assert values["top1"] == pytest.approx(100 * float((best == y).double().mean()), abs=1e-5)
    for k in (1, 5):
        theirs = multiclass_accuracy(scores, y, 6, top_k=k, average="micro")
        assert values[f"top{k}"] == pytest.approx(100 * float(theirs), abs=1e-4)
    mean = multiclass_accuracy(scores, y, 6, average="macro")
    assert values["class_mean"] == pytest.approx(100 * float(mean), abs=1e-4)
    assert 0 < values["top1"] < 100 and values["top1"] != values["class_mean"]


def test_embeddings_of_classes_are_means_of_unit_vectors(data):
    method = TwoTowers()
    round = Round(method, data)
    found = class_embeddings(round, NAMES, ["{}", "two {}"], data.test.encode)
    assert torch.allclose(found.norm(dim=1), torch.ones(6))
    with torch.no_grad():
        each = [F.normalize(method.embed_text(data.test.encode([t, f"two {t}"])), dim=1).mean(0) for t in NAMES]
    assert torch.allclose(found, F.normalize(torch.stack(each), dim=1), atol=1e-6)


def test_many_texts_are_embedded_in_parts(data):
    method, texts = TwoTowers(), [f"text {i}" for i in range(600)]
    found = embed_texts(Round(method, data, nullcontext), texts, data.test.encode)
    with torch.no_grad():
        assert torch.allclose(found, method.embed_text(data.test.encode(texts)), atol=1e-6)


def test_chance_and_the_protocol_are_said(data):
    values, rows, notes = run(data, ZeroShot(templates=["a {}"]))
    largest = 100 * float(data.test.targets.bincount().max()) / 90
    assert values["chance/top1"] == pytest.approx(100 / 6) and values["chance/largest_class"] == pytest.approx(largest)
    assert any("chance is 16.7 %" in note for note in notes)
    assert rows[0].protocol["templates"] == ["a {}"] and rows[0].samples == {"test": 90}
    json.dumps(rows[0].protocol)
    many = ZeroShot(templates=[f"{i} {{}}" for i in range(80)]).protocol["templates"]
    assert many == "80, from '0 {}' to '79 {}'"


def test_classes_that_training_left_out_are_told_apart(data):
    data.test.held_out = [1, 4]
    method = TwoTowers()
    values, _, _ = run(data, ZeroShot(), method)
    scores = naive(method, data.test, ["red star", *NAMES[1:]], TEMPLATES)
    right, never = scores.argmax(1) == data.test.targets, torch.isin(data.test.targets, torch.tensor([1, 4]))
    assert values["held_out"] == pytest.approx(100 * float(right[never].double().mean()))
    assert values["seen"] == pytest.approx(100 * float(right[~never].double().mean()))
    data.test.held_out = []
    assert "held_out" not in run(data, ZeroShot())[0]


def test_the_data_may_have_templates_of_their_own(data):
    given = run(data, ZeroShot(templates=["a large {}"]))[0]
    data.test.templates = ("a large {}",)
    assert run(data, ZeroShot())[0] == given
    assert run(data, ZeroShot(templates=list(TEMPLATES)))[0] != given


def test_names_and_templates_may_come_from_files(data, tmp_path):
    given = run(data, ZeroShot(templates=["see {}", "{}"]))[0]
    (tmp_path / "templates.txt").write_text("see {}\n\n{}\n")
    (tmp_path / "names.txt").write_text("\n".join(["red star", *NAMES[1:]]) + "\n")
    (tmp_path / "names.json").write_text(json.dumps(["red star", *NAMES[1:]]))
    for file in ("names.txt", "names.json"):
        evaluator = ZeroShot(templates=str(tmp_path / "templates.txt"), names=str(tmp_path / file))
        assert run(data, evaluator)[0] == given
    other = ["moon", "red star", *NAMES[3:], "blue ring"]
    (tmp_path / "names.txt").write_text("\n".join(other))
    assert run(data, ZeroShot(templates=["see {}", "{}"], names=str(tmp_path / "names.txt")))[0] != given


def test_mistakes_are_named(data, tmp_path):
    (tmp_path / "few.txt").write_text("one\ntwo\n")
    (tmp_path / "none.txt").write_text("\n")
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "object.json").write_text("{}")
    for evaluator, said in (
        (ZeroShot(templates=["a photo"]), "a photo"),
        (ZeroShot(templates=str(tmp_path / "none.txt")), "there is none"),
        (ZeroShot(templates=str(tmp_path / "no.txt")), "cannot be read"),
        (ZeroShot(names=str(tmp_path / "few.txt")), "2 names, the data 6 classes"),
        (ZeroShot(names=str(tmp_path / "bad.json")), r"bad\.json"),
        (ZeroShot(names=str(tmp_path / "object.json")), "list"),
    ):
        with pytest.raises(UserError, match=said):
            run(data, evaluator)


def test_what_cannot_be_judged_is_skipped(data):
    unnamed = Data(Source(classes=[]))
    assert run(unnamed, ZeroShot())[0] == {} and "no classes" in run(unnamed, ZeroShot())[2][0]
    data.test.encode = None
    assert "no captions" in run(data, ZeroShot())[2][0]
    assert run(data, ZeroShot(encode=Encode()))[0]["top1"] >= 0
    data.test.targets.fill_(-1)
    with pytest.raises(Skip, match="no labels"):
        ZeroShot(encode=Encode()).run(Round(TwoTowers(), data))


def test_weights_that_diverged_are_named(data):
    method = TwoTowers()
    method.text.weight.data[:] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        run(data, ZeroShot(), method)


def test_a_method_without_texts_is_refused(data):
    assert isinstance(TwoTowers(), EmbedsPairs) and not isinstance(nn.Identity(), EmbedsPairs)
    with pytest.raises(UserError, match="embed_image, embed_text"):
        run(data, ZeroShot(), nn.Identity())


def test_images_are_embedded_once_for_all_evaluators(data):
    method = TwoTowers()
    run_all({"a": ZeroShot(), "b": ZeroShot(templates=["{}"])}, method, data, say=lambda _: None)
    assert method.batches == 3  # 90 images, 32 at a time
