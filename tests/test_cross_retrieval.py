"""Retrieval across image and text against naive loops and torchmetrics; ties, several captions, chance, pictures."""

import random

import pytest
import torch
import torch.nn.functional as F
from test_zero_shot import Data, Encode, Source, TwoTowers
from torchmetrics.functional.retrieval import retrieval_hit_rate

from ssl_lab.analysis.pairs import caption_grid, similarity_matrix
from ssl_lab.cli.gallery import Gallery
from ssl_lab.data.module import DataModule
from ssl_lab.data.pair_views import PairViews
from ssl_lab.data.pairs_shapes import ShapesPairs
from ssl_lab.data.pairs_tokenizer import trained
from ssl_lab.data.views import Resize
from ssl_lab.evals.base import Round
from ssl_lab.evals.cross_retrieval import CrossRetrieval, by_chance, first_ranks, relevant
from ssl_lab.evals.runner import run_all
from ssl_lab.evals.zero_shot import ZeroShot


class Captioned(Source):
    """Image i has i % 3 + 1 captions; every tenth image shares its first caption with the one before it."""

    def captions(self, rows):
        return [[f"picture {i - (i % 10 == 9)} a", f"{i} b", f"c {i}"][: i % 3 + 1] for i in rows]


@pytest.fixture
def data():
    return Data(Captioned(60))


def run(data, evaluator, method=None):
    notes = []
    rows = run_all({"cross_retrieval": evaluator}, method or TwoTowers(), data, say=notes.append)
    return {row.name: row.value for row in rows}, rows, notes


def naive_rank(scores, right):
    """1 + the number of wrong candidates that are as good as the best right one."""
    best = max(s for s, r in zip(scores, right, strict=True) if r)
    return 1 + sum(s >= best for s, r in zip(scores, right, strict=True) if not r)


@pytest.mark.parametrize("identical", [False, True])
def test_it_is_the_naive_loop(data, identical):
    method = TwoTowers()
    values, _, _ = run(data, CrossRetrieval(at=(1, 3, 10), identical=identical), method)
    captions = data.test.captions(range(60))
    texts, owner = [t for c in captions for t in c], [i for i, c in enumerate(captions) for _ in c]
    with torch.no_grad():
        x = method.double().embed_image({"image": data.test.images.double()})
        z = method.embed_text(data.test.encode(texts))
    similarity = (z @ x.T).tolist()

    def belongs(t, i):
        return texts[t] in captions[i] if identical else owner[t] == i

    to_image = [naive_rank(similarity[t], [belongs(t, i) for i in range(60)]) for t in range(len(texts))]
    columns = list(zip(*similarity, strict=True))
    to_text = [naive_rank(columns[i], [belongs(t, i) for t in range(len(texts))]) for i in range(60)]
    for k in (1, 3, 10):
        assert values[f"image_{k}"] == pytest.approx(100 * sum(r <= k for r in to_image) / len(to_image))
        assert values[f"text_{k}"] == pytest.approx(100 * sum(r <= k for r in to_text) / len(to_text))
    assert 0 < values["image_10"] < 100 and 0 < values["text_10"] < 100


def test_it_is_torchmetrics_hit_rate():
    g = torch.Generator().manual_seed(4)
    images, texts = torch.randn(30, 8, generator=g), torch.randn(75, 8, generator=g)
    owner = torch.arange(75) * 2 % 30
    owner[:30] = torch.arange(30)
    ranks = first_ranks(images, texts, *relevant(owner))
    similarity = F.normalize(texts, dim=1) @ F.normalize(images, dim=1).T
    right = owner[:, None] == torch.arange(30)
    for k in (1, 5, 10):
        for name, scores, correct in (("image", similarity, right), ("text", similarity.T, right.T)):
            theirs = [float(retrieval_hit_rate(s, r, top_k=k)) for s, r in zip(scores, correct, strict=True)]
            assert ((ranks[name] <= k).double() == torch.tensor(theirs).double()).all()


def test_parts_of_the_work_give_the_whole(monkeypatch):
    g = torch.Generator().manual_seed(5)
    images, texts = torch.randn(40, 4, generator=g), torch.randn(90, 4, generator=g)
    owner = torch.randint(0, 40, (90,), generator=g)
    owner[:40] = torch.arange(40)
    words = [f"{int(x)}" for x in torch.randint(0, 50, (90,), generator=g)]
    for pairs in (relevant(owner), relevant(owner, words)):
        whole = first_ranks(images, texts, *pairs)
        monkeypatch.setattr("ssl_lab.evals.cross_retrieval._CELLS", 200)
        part = first_ranks(images, texts, *pairs)
        monkeypatch.undo()
        assert all(torch.equal(whole[key], part[key]) for key in whole)


def test_a_collapsed_method_gains_nothing_from_ties():
    ranks = first_ranks(torch.ones(12, 3), torch.ones(24, 3), *relevant(torch.arange(24) % 12))
    assert (ranks["image"] == 12).all() and (ranks["text"] == 23).all()
    perfect = first_ranks(torch.eye(12), torch.eye(12).repeat(2, 1), *relevant(torch.arange(24) % 12))
    assert (perfect["image"] == 1).all() and (perfect["text"] == 1).all()


def test_identical_captions_belong_to_all_images_that_have_one():
    text, image = relevant(torch.tensor([0, 0, 1, 2]), ["x", "y", "x", "z"])
    assert sorted(zip(text.tolist(), image.tolist(), strict=True)) == [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (3, 2)]


@pytest.mark.parametrize(("right", "among", "k"), [([1, 1, 1], 10, 3), ([2, 5, 1], 9, 4), ([3], 3, 5)])
def test_chance_is_what_random_orders_give(right, among, k):
    rng, trials, hits = random.Random(0), 6000, 0
    for _ in range(trials):
        for r in right:
            hits += min(rng.sample(range(among), r)) < k
    assert by_chance(right, among, k) == pytest.approx(hits / trials / len(right), abs=0.02)


def test_chance_and_protocol_are_said(data):
    values, rows, notes = run(data, CrossRetrieval(at=(1, 5)))
    assert values["chance/image_1"] == pytest.approx(100 / 60) and values["chance/image_5"] == pytest.approx(500 / 60)
    assert values["chance/text_1"] == pytest.approx(100 * 2 / 120)  # 2 captions of 120 on average
    assert "120 captions of 60 images" in notes[0] and "image_1 1.7 %" in notes[0]
    assert rows[0].samples == {"test": 60, "captions": 120} and rows[0].protocol["at"] == [1, 5]


def test_limit_and_max_captions_take_fewer(data):
    _, rows, _ = run(data, CrossRetrieval(limit=30, max_captions=1))
    assert rows[0].samples == {"test": 30, "captions": 30}


def test_data_without_captions_are_skipped():
    plain = Data(Source())
    assert "no captions" in run(plain, CrossRetrieval())[2][0]
    plain.test.encode = None
    assert "no captions" in run(plain, CrossRetrieval(encode=Encode()))[2][0]


def test_pictures_of_pairs_have_their_shapes_and_colours():
    images = torch.zeros(3, 4, 3, 20, 20, dtype=torch.uint8)
    own = torch.zeros(3, 4, dtype=torch.bool)
    own[1, 2] = True
    drawn = caption_grid(["short", "a very long caption " * 40, "x" * 200], images, own)
    assert drawn.dtype == torch.uint8 and drawn.shape == (3, 3 * 120, 260 + 4 * 120)
    green, red = torch.tensor([0, 158, 90]), torch.tensor([213, 70, 20])
    for i in range(3):
        for j in range(4):
            frame = drawn[:, i * 120 + 5, 260 + j * 120 + 60]
            assert torch.equal(frame.long(), green if own[i, j] else red)
    assert (drawn[:, 0:120, :260] < 128).any()  # something is written
    similarity = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    matrix = similarity_matrix(similarity, images[0, :2], ["one", "two"])
    assert matrix.shape == (3, 3 * 112, 260 + 2 * 112)
    dark = matrix[:, 112 + 20, 260 + 20].sum(), matrix[:, 112 + 20, 260 + 112 + 20].sum()
    assert dark[0] < dark[1]
    assert similarity_matrix(torch.ones(1, 1), images[0, :1], ["one"]).shape == (3, 224, 372)


def test_the_page_shows_captions_and_says_why_not(tmp_path, data):
    tokenizer = trained("shapes", "bpe", 400)
    shapes = [ShapesPairs(s, 24, tokenizer, image_size=2) for s in ("train", "test")]
    module = DataModule(*shapes, None, eval_views=PairViews(Resize(2), caption="first"), batch_size=8, image_size=2)
    method = TwoTowers()
    method.text = torch.nn.Embedding(400, 6)
    shapes[1].encode.context_length = 24
    round = Round(method.eval(), module)
    method.embed_text = lambda batch: F.normalize(method.text(batch["tokens"]).mean(1), dim=1)
    page = Gallery(round).write(tmp_path, "a run").read_text()
    assert "captions.png" in page and "similarity.png" in page
    assert {"captions.png", "similarity.png"} <= {x.name for x in tmp_path.iterdir()}


def test_zero_shot_and_retrieval_share_the_images(data):
    method = TwoTowers()
    run_all({"a": ZeroShot(), "b": CrossRetrieval()}, method, data, say=lambda _: None)
    assert method.batches == 2  # 60 images, 32 at a time
