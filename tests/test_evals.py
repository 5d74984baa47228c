"""Known answers for kNN, linear probe and collapse measures, and the round in which they share features."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from vectors import FakeData, clusters, run, shuffled_labels

from ssl_lab.errors import UserError
from ssl_lab.evals.base import Round, Watch, accuracy, require
from ssl_lab.evals.collapse import Collapse
from ssl_lab.evals.features import gather_rows, unique_rows
from ssl_lab.evals.knn import KNN, knn_votes
from ssl_lab.evals.linear import Linear, fit, standardized
from ssl_lab.evals.pixels import Pixels
from ssl_lab.evals.runner import run_all, run_round
from ssl_lab.nn.mode import evaluating
from ssl_lab.spread import feature_std, rankme

# ---- kNN


def test_knn_is_right_on_separable_features_and_at_chance_on_permuted_labels():
    assert run(KNN(), FakeData(*clusters()))["top1"] == 100
    assert 17 < run(KNN(), FakeData(*shuffled_labels(clusters(per_class=256, noise=3))))["top1"] < 33


def test_knn_equals_a_double_loop(monkeypatch):
    g = torch.Generator().manual_seed(1)
    bank, queries = torch.randn(50, 7, generator=g), torch.randn(23, 7, generator=g)
    y, k, temperature = torch.randint(0, 5, (50,), generator=g), 6, 0.2
    expected = torch.zeros(23, 5)
    for i, query in enumerate(queries):
        pairs = [(float(F.cosine_similarity(query, row, dim=0)), int(c)) for row, c in zip(bank, y)]
        for similarity, c in sorted(pairs, reverse=True)[:k]:
            expected[i, c] += torch.tensor((similarity - 1) / temperature).exp()
    torch.testing.assert_close(knn_votes(bank, y, queries, 5, k, temperature), expected)
    monkeypatch.setattr("ssl_lab.evals.knn._CELLS", 150)  # chunks of three queries
    torch.testing.assert_close(knn_votes(bank, y, queries, 5, k, temperature), expected)


def test_knn_with_fewer_rows_than_k_and_a_sharp_temperature():
    data = clusters(per_class=2)
    assert run(KNN(k=200, temperature=1e-3), FakeData(*data))["top1"] == 100


def test_top5_counts_the_five_best():
    y = torch.tensor([0, 1, 2, 3])
    scores = torch.arange(7.0).repeat(4, 1)  # classes 6 5 4 3 2 are the five best
    assert accuracy(scores, y) == {"top1": 0.0, "top5": 50.0}
    assert set(accuracy(scores[:, :4], y)) == {"top1"}


# ---- linear probe


def test_linear_is_right_on_separable_features_and_at_chance_on_permuted_labels():
    values = run(Linear(), FakeData(*clusters(per_class=128)))
    assert values["top1"] == 100 and values["chosen/lr"] in Linear().rates
    assert 17 < run(Linear(), FakeData(*shuffled_labels(clusters(per_class=256, noise=3))))["top1"] < 33


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_heads_side_by_side_equal_each_rate_alone(decay):
    (x, y), _ = clusters(noise=1.0)
    rates, rest = (1e-3, 1e-2, 0.1), (5, 24, decay, 3)
    together = fit(x, y, 4, rates, *rest)
    for i, rate in enumerate(rates):
        alone = fit(x, y, 4, (rate,), *rest)
        torch.testing.assert_close(together.weight[i], alone.weight[0])
        torch.testing.assert_close(together.bias[i], alone.bias[0])
    assert not torch.allclose(together.weight[0], together.weight[2])


def test_the_rate_is_chosen_by_held_out_training_rows():
    """With permuted test labels the test split favours some rate by luck; the choice must not see it."""
    train, test = clusters(per_class=64, noise=1.5)
    wrong = (test[0], test[1].roll(1))
    right, misled = (run(Linear(rates=(1e-4, 1e-2, 1.0)), FakeData(train, t)) for t in (test, wrong))
    assert right["chosen/lr"] == misled["chosen/lr"]
    held = {rate: right[f"lr_{rate:g}/held_out_top1"] for rate in (1e-4, 1e-2, 1.0)}
    assert held[right["chosen/lr"]] == max(held.values())
    assert right["top1"] == right[f"lr_{right['chosen/lr']:g}/top1"]


def test_standardizing_makes_the_probe_blind_to_scale_and_shift():
    train, test = clusters(noise=0.5)
    moved = [(x * torch.logspace(-2, 2, 12) + 7, y) for x, y in (train, test)]
    scores = [run(Linear(rates=(1e-2,)), FakeData(*data))["top1"] for data in ((train, test), moved)]
    assert scores[0] == pytest.approx(scores[1], abs=1) and scores[0] > 60
    raw = run(Linear(rates=(1e-2,), standardize=False), FakeData(*moved))["top1"]
    assert raw < scores[0] - 10
    x, other = standardized(train[0], test[0])
    torch.testing.assert_close(x.mean(0), torch.zeros(12), atol=1e-6, rtol=0)
    torch.testing.assert_close(x.std(0, correction=0), torch.ones(12), atol=1e-6, rtol=0)
    expected = (test[0] - train[0].mean(0)) / train[0].std(0, correction=0)
    torch.testing.assert_close(other, expected)
    constant = torch.full((99, 1), 0.1) + 1e-8 * torch.randn(99, 1)
    assert standardized(torch.cat([constant, torch.randn(99, 1)], 1))[0][:, 0].eq(0).all()


def test_a_probe_of_one_row_is_skipped():
    (x, y), test = clusters()
    said = []
    assert run_all({"linear": Linear()}, Pixels(), FakeData((x[:1], y[:1]), test), say=said.append) == []
    assert "linear" in said[0] and "2 labelled" in said[0]


# ---- collapse


def test_rankme_of_isotropic_rank_one_and_partial_features():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 16, generator=g)
    assert 15.5 < rankme(x) <= 16.001
    assert rankme(torch.outer(torch.arange(1.0, 100), torch.randn(16, generator=g))) == pytest.approx(1, abs=1e-3)
    x[:, 4:] = 0
    assert 3.8 < rankme(x) < 4.01
    assert rankme(torch.zeros(5, 3)) == pytest.approx(1, abs=1e-3)
    for shape in ((50, 20), (20, 50)):
        x = torch.randn(shape, generator=g) @ torch.diag(torch.logspace(0, -6, shape[1]))
        values = torch.linalg.svdvals(x.double())
        p = values / values.sum() + 1e-7
        assert rankme(x) == pytest.approx(float((-(p * p.log()).sum()).exp()), abs=1e-4)


def test_feature_std_is_one_if_isotropic_and_zero_if_collapsed():
    g = torch.Generator().manual_seed(0)
    assert feature_std(torch.randn(4000, 32, generator=g)) == pytest.approx(1, abs=0.02)
    assert feature_std(torch.ones(100, 32) * torch.arange(1.0, 101)[:, None]) == pytest.approx(0, abs=1e-6)


def test_collapse_needs_no_labels_and_takes_rows_evenly():
    x = torch.cat([torch.zeros(90, 8), torch.eye(8).repeat(12, 1)[:90]]) + 1e-3  # the first half is collapsed
    data = FakeData((x, torch.full((180,), -1)), (x, torch.full((180,), -1)), num_classes=0)
    some, all_rows = run(Collapse(max_rows=60), data), run(Collapse(), data)
    assert some["rankme"] == pytest.approx(all_rows["rankme"], rel=0.05) and some["rankme"] > 7


# ---- a round


def test_features_are_extracted_once_per_split_and_each_row_once():
    data = FakeData(*clusters(), repeat=5)
    rows = run_all({"knn": KNN(), "linear": Linear(passes=1), "collapse": Collapse()}, Pixels(), data)
    assert sorted(data.asked) == ["test", "train"]
    by_name = {row.evaluator: row for row in rows}
    assert by_name["knn"].samples == {"train": 128, "test": 128} and by_name["collapse"].samples == {"test": 128}


def test_another_limit_is_another_extraction():
    data = FakeData(*clusters())
    rows = run_all({"a": KNN(), "b": KNN(limit=10)}, Pixels(), data)
    assert len(data.asked) == 4 and rows[-1].samples == {"train": 10, "test": 10} and rows[-1].protocol["limit"] == 10


def test_features_at_hand_are_the_most_there_are():
    data = FakeData(*clusters())
    round = Round(Pixels(), data)
    assert len(round.at_hand("test", 20).y) == 20 and data.asked == ["test"]
    round.features("test", 50)
    assert len(round.at_hand("test", 30).y) == 50 and len(round.at_hand("test", 60).y) == 60
    round.features("test")
    assert len(round.at_hand("test", 30).y) == 128 and len(data.asked) == 4


def test_an_evaluator_starts_and_rows_are_counted_for_whoever_watches():
    class Seen(Watch):
        def __init__(self):
            self.said = []

        def begin(self, evaluator):
            self.said.append(evaluator)

        def rows(self, split, done, limit):
            self.said.append((split, done, limit))

    seen = Seen()
    run_round(
        {"knn": KNN(limit=20), "collapse": Collapse(limit=20)}, Round(Pixels(), FakeData(*clusters()), watch=seen)
    )
    steps = [("train", 16, 20), ("train", 20, 20), ("test", 16, 20), ("test", 20, 20)]
    assert seen.said == ["knn", *steps, "collapse"]


def test_rows_are_sorted_and_deduplicated_by_index():
    index = torch.tensor([3, 1, 3, 0, 1])
    features = unique_rows(torch.arange(5.0)[:, None], torch.arange(5), index)
    assert features.index.tolist() == [0, 1, 3]
    assert features.y.tolist() == [3, 1, 0]  # the first of each


def test_twice_gives_the_same_digits_and_leaves_the_global_generator_alone():
    evaluators = {"knn": KNN(), "linear": Linear(), "collapse": Collapse()}
    data = FakeData(*clusters(noise=0.8))
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = [(r.name, r.value) for r in run_all(evaluators, Pixels(), data)]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert [(r.name, r.value) for r in run_all(evaluators, Pixels(), data)] == first


def test_every_module_is_back_in_its_mode():
    net = nn.Sequential(nn.Dropout(), nn.Sequential(nn.BatchNorm1d(2)))
    net.train()
    net[1].eval()  # a frozen teacher
    with pytest.raises(RuntimeError), evaluating(net):
        assert not any(m.training for m in net.modules())
        raise RuntimeError
    assert net.training and net[0].training and not net[1].training and not net[1][0].training


def test_unlabelled_data_are_skipped_with_the_reason():
    (x, y), test = clusters()
    said = []
    data = FakeData((x, torch.full_like(y, -1)), test)
    rows = run_all({"knn": KNN(), "linear": Linear(), "collapse": Collapse()}, Pixels(), data, say=said.append)
    assert {row.evaluator for row in rows} == {"collapse"}
    assert said == [f"evaluator {name} skipped: the train split has no labels" for name in ("knn", "linear")]


def test_only_labelled_rows_count():
    (x, y), (x_test, y_test) = clusters()
    y = y.clone()
    y[::2] = -1
    (row,) = run_all({"knn": KNN()}, Pixels(), FakeData((x, y), (x_test, y_test)))
    assert row.samples == {"train": 64, "test": 128}


def test_a_method_that_cannot_embed_is_named():
    with pytest.raises(UserError, match=r"'knn' needs Embeds, but method Linear has no embed"):
        require({"knn": KNN()}, nn.Linear(2, 2))


def test_an_empty_split_and_diverged_features_are_named():
    (x, y), test = clusters()
    with pytest.raises(UserError, match="train split is empty"):
        run(KNN(), FakeData((x[:0], y[:0]), test))
    x[7, 3] = torch.nan
    with pytest.raises(UserError, match=r"1 of 128 train rows are not finite \(first row 7\)"):
        run(KNN(), FakeData((x, y), test))


def test_autocast_covers_the_forward_pass_alone():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(12, 12)

        def embed(self, batch):
            out = self.fc(batch["image"])
            assert out.dtype == torch.bfloat16
            return out

    round = Round(Net(), FakeData(*clusters()), lambda: torch.autocast("cpu", torch.bfloat16))
    assert round.features("test").x.dtype == torch.float32
    assert not torch.is_autocast_enabled("cpu")


def test_weights_of_lower_precision_get_input_of_theirs():
    class Net(Pixels):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(12, 12, dtype=torch.bfloat16)

        def embed(self, batch):
            assert batch["target"].dtype == torch.int64
            return self.fc(batch["image"])

    assert Round(Net(), FakeData(*clusters())).features("test").x.dtype == torch.float32


class Ranks:
    """Two ranks as two threads that exchange tensors."""

    def __init__(self):
        self.barrier, self.held, self.me = threading.Barrier(2, timeout=20), [None, None], threading.local()

    def gather(self, x, *, grad=True):
        self.held[self.me.rank] = x
        self.barrier.wait()
        out = torch.cat(self.held)
        self.barrier.wait()
        return out

    def run(self, work):
        def body(rank):
            self.me.rank = rank
            return work(rank)

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(body, range(2)))


def test_ranks_with_different_numbers_of_rows_are_joined(monkeypatch):
    ranks = Ranks()
    monkeypatch.setattr("ssl_lab.dist.world_size", lambda: 2)
    monkeypatch.setattr("ssl_lab.dist.gather", ranks.gather)
    rows = [torch.arange(3.0)[:, None], torch.arange(10, 12.0)[:, None]]
    for out in ranks.run(lambda rank: gather_rows(rows[rank], torch.device("cpu"))):
        assert out.flatten().tolist() == [0, 1, 2, 10, 11]
