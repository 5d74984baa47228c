"""How well a run uses its devices, in its log: work of the first step, peak of a listed card, waiting for ranks."""

import csv
import json
from types import SimpleNamespace

import pytest
import torch
from test_dist import PLAIN, TWO, finished
from training import TINY

from ssl_lab.bench import efficiency
from ssl_lab.bench.efficiency import Efficiency, listed_peak
from ssl_lab.cli.main import main


def rows(out):
    with open(out / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


SHORT = ["duration=4steps", "eval=[]", "trainer.enable_progress_bar=false"]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_work_of_a_step_over_its_time(tmp_path, accumulate):
    """The counted work is that of `ssl-lab bench`; with attention written out nothing is computed again."""
    words = [*TINY, *SHORT, "attention=eager", f"trainer.accumulate_grad_batches={accumulate}"]
    assert main([*words, f"out={tmp_path / 'run'}"]) == 0
    assert main(["bench", *TINY, "rounds=1", "memory=false", "loop=false", f"out={tmp_path / 'bench.json'}"]) == 0
    flops = json.loads((tmp_path / "bench.json").read_text())["flops"]
    for row in rows(tmp_path / "run"):
        seconds = 8 * accumulate / float(row["time/samples_per_s"])
        assert float(row["time/tflops_per_s"]) * 1e12 * seconds == pytest.approx(flops * accumulate, rel=1e-6)
        assert "time/mfu" not in row and "time/communication" not in row


def test_counting_changes_no_bit(tmp_path, monkeypatch):
    assert main([*TINY, *SHORT, f"out={tmp_path / 'counted'}"]) == 0
    monkeypatch.setattr(Efficiency, "on_train_batch_start", lambda *_: None)
    assert main([*TINY, *SHORT, f"out={tmp_path / 'not'}"]) == 0
    kept = [[(row["train/loss"], row["opt/grad_norm"]) for row in rows(tmp_path / name)] for name in ("counted", "not")]
    assert kept[0] == kept[1] and len(kept[0]) == 4
    assert "time/tflops_per_s" not in rows(tmp_path / "not")[0]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("Tesla T4", "t4"),
        ("NVIDIA A10", None),
    ],
)
def test_a_listed_card_is_known_by_its_name(monkeypatch, name, found):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    card = efficiency.ACCELERATORS.get(found)
    assert listed_peak(torch.device("cuda"), half=True) == (card and card.half)
    assert listed_peak(torch.device("cuda"), half=False) == (card and card.single)
    assert listed_peak(torch.device("cpu"), half=True) is None


def test_share_of_the_peak():
    one = Efficiency(compiled=False, half=True)
    one._flops, one._peak, one._micro, one._strategy = int(1e12), 1e14, 2, SimpleNamespace()
    assert one.rates(0.1) == {"time/tflops_per_s": pytest.approx(20.0), "time/mfu": pytest.approx(0.2)}


def test_waiting_for_other_ranks(tmp_path):
    finished([*PLAIN, *TWO, *SHORT, f"out={tmp_path / 'run'}"])
    shares = [float(row["time/communication"]) for row in rows(tmp_path / "run") if row.get("time/communication")]
    assert shares and all(0 <= share <= 1 for share in shares) and any(shares)
