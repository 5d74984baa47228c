"""Known answers for few labels, retrieval and crops."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from vectors import FakeData, clusters, run, shuffled_labels

from ssl_lab.errors import UserError
from ssl_lab.evals.base import Common
from ssl_lab.evals.collapse import Collapse
from ssl_lab.evals.crop_scale import CropScale, centre
from ssl_lab.evals.knn import KNN
from ssl_lab.evals.linear import Linear
from ssl_lab.evals.low_shot import LowShot
from ssl_lab.evals.pixels import Pixels
from ssl_lab.evals.retrieval import Retrieval, ordered, ranking
from ssl_lab.evals.runner import run_all
from ssl_lab.subsets import balanced, ranks

# ---- few labels


def test_few_labels_suffice_for_separable_features_and_give_chance_on_permuted_ones():
    values = run(LowShot(), FakeData(*clusters(per_class=256)))
    assert values["top1_1pct"] == values["top1_10pct"] == values["knn_1pct"] == values["knn_10pct"] == 100
    assert values["chosen/rows_1pct"] == 12 and values["chosen/rows_10pct"] == 104
    wrong = run(LowShot(), FakeData(*shuffled_labels(clusters(per_class=256, noise=3))))
    assert 17 < wrong["top1_10pct"] < 33 and 17 < wrong["knn_10pct"] < 33


def test_more_labels_help():
    values = run(LowShot(), FakeData(*clusters(per_class=512, noise=0.5)))
    assert values["top1_10pct"] > values["top1_1pct"] + 2 and values["knn_10pct"] > values["knn_1pct"] + 2


def test_the_subset_is_balanced_seeded_and_nested():
    y = torch.arange(5).repeat_interleave(torch.tensor([400, 100, 300, 4, 196]))  # sorted and uneven
    some, more = balanced(y, 0.05, 0), balanced(y, 0.1, 0)
    assert y[some].bincount().tolist() == [10, 10, 10, 4, 10]
    assert y[more].bincount().tolist() == [20, 20, 20, 4, 20]
    assert set(some.tolist()) < set(more.tolist()) and some.tolist() == sorted(some.tolist())
    assert torch.equal(some, balanced(y, 0.05, 0)) and not torch.equal(some, balanced(y, 0.05, 1))
    assert torch.equal(balanced(y, 1.0, 0)[-196:], torch.arange(804, 1000))


def test_ranks_count_earlier_rows_of_the_class():
    y = torch.tensor([2, 0, 2, 2, 0, 7])
    assert ranks(y).tolist() == [0, 0, 1, 2, 1, 0]


def test_only_the_subset_is_learned_from():
    (x, y), test = clusters(per_class=100, noise=0.5)
    outside = torch.ones(len(y), dtype=torch.bool)
    outside[balanced(y, 0.1, 0)] = False
    settings = LowShot(fractions=(0.1,), standardize=False)
    values = run(settings, FakeData((x, y), test))
    assert values["top1_10pct"] > 60
    assert run(settings, FakeData((torch.where(outside[:, None], -x, x), y), test)) == values
    assert run(settings, FakeData((torch.where(outside[:, None], x, -x), y), test)) != values


def test_the_rate_is_chosen_by_cross_validation_and_blind_to_the_test_split():
    train, test = clusters(per_class=256, noise=0.8)
    wrong = (test[0], test[1].roll(1))
    settings = dict(fractions=(0.1,), rates=(1e-6, 1e-2, 3.0))
    right, misled = (run(LowShot(**settings), FakeData(train, t)) for t in (test, wrong))
    assert right["chosen/lr_10pct"] == misled["chosen/lr_10pct"]
    alone = {rate: run(LowShot(fractions=(0.1,), rates=(rate,)), FakeData(train, test)) for rate in settings["rates"]}
    assert right["top1_10pct"] == alone[right["chosen/lr_10pct"]]["top1_10pct"]


def test_too_few_rows_are_told_and_the_other_fraction_goes_on():
    said = []
    rows = run_all({"it": LowShot()}, Pixels(), FakeData(*clusters(per_class=30)), say=said.append)
    assert {r.name for r in rows} == {"top1_10pct", "knn_10pct", "chosen/lr_10pct", "chosen/rows_10pct"}
    assert said == [
        "evaluator it: 1 % of 120 labelled training rows leaves 0 of each class, at least 2 are needed",
    ]
    assert run_all({"it": LowShot()}, Pixels(), FakeData(*clusters(per_class=3)), say=said.append) == []
    assert said[1].startswith("evaluator it skipped: 1 % of 12") and "10 % of 12" in said[1]


def test_one_rare_class_spoils_nothing():
    (x, y), test = clusters(per_class=100)
    rare = torch.cat([(y != 3).nonzero()[:, 0], (y == 3).nonzero()[:1, 0]])
    values = run(LowShot(fractions=(0.1,)), FakeData((x[rare], y[rare]), test))
    assert values["chosen/rows_10pct"] == 3 * 8 + 1 and values["top1_10pct"] > 75


def test_unreasonable_settings_are_named():
    for fractions in ((), (0.0,), (1.5,)):
        with pytest.raises(UserError, match=r"low_shot.fractions"):
            LowShot(fractions=fractions)
    with pytest.raises(UserError, match=r"low_shot.folds=1"):
        LowShot(folds=1)
    with pytest.raises(UserError, match=r"crop_scale.scales"):
        CropScale(scales=(0.5, 0))


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        *((kind, "k", value) for kind in (KNN, CropScale, LowShot) for value in (0, -1)),
        *((kind, "temperature", 0.0) for kind in (KNN, CropScale, LowShot)),
        *((kind, name, value) for kind in (Linear, LowShot) for name, value in (("rates", ()), ("batch_size", 0))),
        *((Linear, name, value) for name, value in (("passes", 0), ("held_out", 0.0), ("held_out", 1.5))),
        (LowShot, "steps", 0),
        *((Retrieval, name, value) for name, value in (("at", (0,)), ("max_queries", 0), ("bank", "val"))),
    ],
)
def test_numbers_that_would_measure_nothing_are_refused(kind, name, value):
    with pytest.raises(UserError, match=rf"^[a-z_]+\.{name}="):
        kind(**{name: value})


# ---- retrieval


def naive(bank, bank_y, query, c, left_out=None):
    """Average precision and rank of the first hit by a plain loop."""
    pairs = [(-float(F.cosine_similarity(query, row, dim=0)), i) for i, row in enumerate(bank) if i != left_out]
    hits, precisions, first = 0, [], 0
    for rank, (_, i) in enumerate(sorted(pairs), 1):
        if int(bank_y[i]) == c:
            hits += 1
            first = first or rank
            precisions.append(hits / rank)
    return sum(precisions) / len(precisions) if precisions else 0.0, first


@pytest.mark.parametrize("leave_one_out", [False, True])
def test_ranking_equals_a_double_loop(leave_one_out, monkeypatch):
    g = torch.Generator().manual_seed(1)
    bank = torch.randn(41, 7, generator=g, dtype=torch.float64)
    y = torch.randint(0, 6, (41,), generator=g)
    y[0] = 9  # a class with one row
    queries, own = (bank, torch.arange(41)) if leave_one_out else (torch.randn(13, 7, generator=g).double(), None)
    queries_y = y if leave_one_out else torch.randint(0, 8, (13,), generator=g)
    pairs = enumerate(zip(queries, queries_y.tolist()))
    expected = [naive(bank, y, q, c, i if leave_one_out else None) for i, (q, c) in pairs]
    for cells in (1 << 20, 100):  # at once, and chunks of two queries
        monkeypatch.setattr("ssl_lab.evals.retrieval._CELLS", cells)
        precision, first = ranking(bank, y, queries, queries_y, torch.arange(41), own)
        torch.testing.assert_close(precision, torch.tensor([p for p, _ in expected], dtype=torch.float64))
        assert first.tolist() == [rank for _, rank in expected]


def test_ties_count_against_the_encoder():
    bank, y = torch.ones(8, 3), torch.tensor([1, 0] * 4)
    precision, first = ranking(bank, y, torch.ones(1, 3), torch.tensor([1]), torch.arange(8))
    assert first.tolist() == [5] and float(precision) == pytest.approx((1 / 5 + 2 / 6 + 3 / 7 + 4 / 8) / 4)


def test_sorting_keeps_the_order_of_every_float():
    g = torch.Generator().manual_seed(0)
    x = torch.cat(
        [torch.randn(3, 500, generator=g), torch.tensor([[0.0, 1e-30, -1e-30, 1.0, -1.0, -torch.inf]] * 3)], 1
    )
    relevant = torch.rand(x.shape, generator=g) > 0.5
    assert torch.equal(ordered(x, relevant), relevant.gather(1, x.argsort(1, descending=True)))


def test_retrieval_of_a_ranking_known_by_hand():
    angles = torch.tensor([0.1, 0.2, 0.3, 0.4])  # from the query, in the order of the bank
    bank = torch.stack([angles.cos(), angles.sin()], 1), torch.tensor([1, 0, 1, 0])
    values = run(Retrieval(at=(1, 2, 3)), FakeData(bank, (torch.tensor([[2.0, 0.0]]), torch.tensor([0]))))
    assert values["map"] == pytest.approx(100 * (1 / 2 + 2 / 4) / 2)
    assert [values[f"recall_{k}"] for k in (1, 2, 3)] == [0, 100, 100]


@pytest.mark.parametrize("bank", ["train", "test"])
def test_retrieval_is_perfect_on_separable_features_and_at_chance_on_permuted_labels(bank):
    assert run(Retrieval(bank=bank), FakeData(*clusters()))["map"] == pytest.approx(100)
    (x, y), (x_test, _) = clusters(per_class=128, noise=3)
    g = torch.Generator().manual_seed(0)
    data = FakeData((x, y[torch.randperm(len(y), generator=g)]), (x_test, y[torch.randperm(len(y), generator=g)]))
    values = run(Retrieval(bank=bank), data)
    assert 23 < values["map"] < 29 and 17 < values["recall_1"] < 33 and values["recall_10"] > 85


def test_recall_at_one_is_the_nearest_neighbour():
    data = FakeData(*clusters(noise=0.6))
    assert run(Retrieval(), data)["recall_1"] == pytest.approx(run(KNN(k=1), data)["top1"])


def test_queries_without_a_relevant_row_are_left_out():
    (x, y), (x_test, y_test) = clusters()
    y_test = y_test.clone()
    y_test[:28] = 3
    y_test[:8] = 7  # nowhere in the bank
    (row, *_) = run_all({"it": Retrieval()}, Pixels(), FakeData((x, y), (x_test, y_test)))
    assert row.samples == {"train": 128, "test": 120}
    said = []
    assert run_all({"it": Retrieval()}, Pixels(), FakeData((x, y), (x_test, y_test * 0 + 9)), say=said.append) == []
    assert "no test row has a class" in said[0]


def test_queries_are_at_most_so_many_and_evenly_spaced():
    (row, *_) = run_all({"it": Retrieval(max_queries=10)}, Pixels(), FakeData(*clusters()))
    assert row.samples == {"train": 128, "test": 10}


# ---- crops


class Photos(FakeData):
    """Coloured squares, the class in the middle and another one's colour around it."""

    def __init__(self, middle=10, side=32, count=24):
        y = torch.arange(count) % 3
        noise = 0.1 * torch.randn(2, count, 3, side, side, generator=torch.Generator().manual_seed(0))
        x = torch.zeros(count, 3, side, side)
        inside = slice((side - middle) // 2, (side + middle) // 2)
        for i, c in enumerate(y.tolist()):
            x[i, (c + 1) % 3] = 1.0
            x[i, :, inside, inside] = 0.0
            x[i, c, inside, inside] = 1.0
        super().__init__((x + noise[0], y), (x + noise[1], y), num_classes=3)


class Mean(nn.Module):
    def embed(self, batch):
        return batch["image"].mean((2, 3))


def test_a_crop_is_the_centre_at_the_size_of_the_image():
    image = torch.randn(2, 3, 32, 24, generator=torch.Generator().manual_seed(0))
    assert centre(image, 1.0) is image
    ramp = torch.arange(24.0).expand(1, 3, 32, 24)  # any cubic filter keeps it, but for the edges
    expected = (6 + (torch.arange(24) + 0.5) / 2 - 0.5).expand(1, 3, 32, 24)
    torch.testing.assert_close(centre(ramp, 0.25)[..., 4:-4], expected[..., 4:-4])
    torch.testing.assert_close(centre(ramp.transpose(2, 3), 0.25), centre(ramp, 0.25).transpose(2, 3))
    assert centre(image.bfloat16(), 1e-9).dtype == torch.bfloat16  # one pixel
    torch.testing.assert_close(centre(torch.full((1, 3, 9, 9), 2.0), 0.3), torch.full((1, 3, 9, 9), 2.0))


def test_crops_change_what_a_colour_mean_sees():
    """The whole image has the surrounding's colour, its middle another class's: the crop is taken for that class."""
    data = Photos()
    values = run(CropScale(k=3), data, Mean())
    assert values == {"top1_100pct": 100, "top1_50pct": 100, "top1_25pct": values["top1_25pct"], "top1_10pct": 0}
    assert data.asked == ["train", "test", "test", "test", "test"]


def test_scale_one_is_knn_and_shares_its_features():
    data = Photos()
    rows = run_all({"knn": KNN(), "crop": CropScale(scales=(1, 0.5))}, Mean(), data)
    values = {(r.evaluator, r.name): r.value for r in rows}
    assert values["crop", "top1_100pct"] == values["knn", "top1"] and data.asked == ["train", "test", "test"]


def test_vectors_cannot_be_cropped():
    said = []
    assert run_all({"it": CropScale()}, Pixels(), FakeData(*clusters()), say=said.append) == []
    assert said == ["evaluator it skipped: a crop needs images (B, C, H, W), not (16, 12)"]


# ---- all of them


EVERY = [KNN, LowShot, Retrieval, CropScale, Collapse]


@pytest.mark.parametrize("kind", EVERY)
def test_common_settings_count_everywhere(kind):
    evaluator = kind(limit=12, every=5)
    assert isinstance(evaluator, Common) and evaluator.protocol["limit"] == 12 and evaluator.every == 5
    rows = run_all({"it": evaluator}, Mean(), Photos())
    assert all(n <= 12 for row in rows for n in row.samples.values())


def test_the_same_digits_twice():
    evaluators = {kind.__name__: kind() for kind in EVERY}
    first, second = ([(r.name, r.value) for r in run_all(evaluators, Mean(), Photos(count=240))] for _ in range(2))
    assert first == second and len({name for name, _ in first}) > 12


def test_unlabelled_data_are_skipped():
    (x, y), test = clusters()
    said = []
    data = FakeData((x, torch.full_like(y, -1)), test)
    assert run_all({"a": LowShot(), "b": Retrieval()}, Pixels(), data, say=said.append) == []
    assert said == [f"evaluator {name} skipped: the train split has no labels" for name in "ab"]
