"""A run that is killed with SIGKILL and repeated ends exactly as one that was left alone."""

import itertools
import random

import pytest
import torch
from training import TINY, run, same_end, start

from ssl_lab.train import checkpoint

EVALS = ["eval=[knn,collapse]", "eval.knn.k=3", "eval.knn.every=5", "eval.collapse.every=4"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Uninterrupted runs, one per set of options."""
    made = {}

    def get(*options):
        if options not in made:
            out = tmp_path_factory.mktemp("reference") / "run"
            assert run([*TINY, *options, f"out={out}"]) == 0
            made[options] = out
        return made[options]

    return get


OFTEN = [("backward", 6), ("save", 40), ("rename", 14)]
SELDOM = [("backward", 1), ("backward", 11), ("save", 200), ("rename", 3), ("rename", 15), ("verify", 3), ("log", 7)]


@pytest.mark.faults("C1", "SIGKILL in a step, in a save, before its renaming: the same end to the bit")
@pytest.mark.parametrize("fault", [*OFTEN, *(pytest.param(fault, marks=pytest.mark.slow) for fault in SELDOM)])
def test_killed_anywhere(reference, tmp_path, fault):
    options = ["ema=0.9", *EVALS]
    out = tmp_path / "run"
    words = [*TINY, *options, f"out={out}"]
    assert run(words, fault) == -9
    assert run(words) == 0
    same_end(reference(*options), out)
    assert not [*out.rglob(".*.tmp")]


SMALL = {  # what a method has beside its encoder
    "simclr": ["method.hidden=32"],
    "moco": ["method.head=[32,16]", "method.queue_size=32"],
    "moco_v3": ["method.hidden=32", "method.projection=16", "method.encoder.num_heads=2"],
    "dino": ["method.head.prototypes=32", "method.head.hidden=32", "data.views.local.count=2"],
    "dinov2": ["method.head.prototypes=32", "method.head.hidden=32", "data.views.local.count=2"],
    "ijepa": ["method.predictor.dim=32", "method.predictor.depth=1", "method.predictor.num_heads=2"],
}
ENCODER = [word for word in TINY if "method=" not in word and "method.decoder" not in word]


@pytest.mark.faults("C2", "SIGKILL, each method: the same end to the bit")
@pytest.mark.parametrize("method", SMALL)
def test_every_method_goes_on_with_its_teacher_queue_and_center(tmp_path, method):
    words = [f"method={method}", *ENCODER, *SMALL[method], "duration=8steps"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert run([*words, f"out={whole}"]) == 0
    assert run([*words, f"out={out}"], ("backward", 6)) == -9
    assert run([*words, f"out={out}"]) == 0
    same_end(whole, out)


TEXT = {  # part -> where the network is
    "causal_lm": "decoder",
    "masked_lm": "encoder",
    "span_corruption": "model",
    "seq2seq": "model",
    "text_classification": "encoder",
    "span_qa": "encoder",
}
COMMON = ["data.batch_size=4", "save_steps=2", "trainer.log_every_n_steps=1", "trainer.accelerator=cpu"]


OFTEN_TOO = ("causal_lm", "seq2seq")


@pytest.mark.faults("C2", "SIGKILL, each method: the same end to the bit")
@pytest.mark.parametrize("method", [m if m in OFTEN_TOO else pytest.param(m, marks=pytest.mark.slow) for m in TEXT])
def test_every_method_of_text_goes_on(tmp_path, method):
    network = f"method.{TEXT[method]}"
    sizes = [f"{network}.dim=16", f"{network}.depth=1", f"{network}.num_heads=2"]
    dropout = [] if method == "causal_lm" else [f"{network}.dropout=0.1"]  # whose draws must go on too
    words = [f"method={method}", *sizes, *dropout, *COMMON, "data.rows=40", "duration=8steps"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert run([*words, f"out={whole}"]) == 0
    assert run([*words, f"out={out}"], ("backward", 6)) == -9
    assert run([*words, f"out={out}"]) == 0
    same_end(whole, out)


SOUND = {  # what a method has beside the encoder's width and depth
    "ctc": ["encoder.stem.channels=8"],
    "best_rq": ["encoder.stem.channels=8"],
    "audio_classification": ["encoder.stem.channels=8"],
    "rnnt": ["encoder.stem.channels=8", "predictor.dim=8", "joint_dim=8"],
    "wav2vec2": ["encoder.front.channels=8", "encoder.positions.groups=2"],
}


@pytest.mark.faults("C2", "SIGKILL, each method: the same end to the bit")
@pytest.mark.parametrize("method", [m if m == "ctc" else pytest.param(m, marks=pytest.mark.slow) for m in SOUND])
def test_every_method_of_sound_goes_on(tmp_path, method):
    """Its batch norms, SpecAugment, dropout, masks and draws of codes too."""
    sizes = ("encoder.dim=16", "encoder.depth=1", "encoder.num_heads=2", *SOUND[method])
    network = [f"method.{word}" for word in sizes]
    words = [f"method={method}", *network, *COMMON, "data.rows=40", "duration=8steps"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert run([*words, f"out={whole}"]) == 0
    assert run([*words, f"out={out}"], ("backward", 6)) == -9
    assert run([*words, f"out={out}"]) == 0
    same_end(whole, out)


@pytest.mark.faults("C3", "SIGKILL twice in one epoch: the same end to the bit")
def test_killed_twice_with_workers_accumulation_and_average(reference, tmp_path):
    options = ["data.num_workers=2", "trainer.accumulate_grad_batches=2", "ema=0.9"]
    out = tmp_path / "run"
    words = [*TINY, *options, f"out={out}"]
    assert run(words, ("backward", 5)) == -9
    assert run(words, ("backward", 6)) == -9
    assert run(words) == 0
    same_end(reference(*options), out)


def test_workers_evaluation_and_pictures_do_not_change_training(reference):
    plain, other = (
        checkpoint.read(checkpoint.find(reference(*options)))
        for options in ([], ["data.num_workers=2", "picture_steps=3", *EVALS])
    )
    assert all(torch.equal(other["state_dict"][name], value) for name, value in plain["state_dict"].items())


def test_repeating_a_finished_run_trains_nothing(reference, tmp_path):
    options = ["eval=[knn]", "eval.knn.k=3"]
    out = reference(*options)
    before = (out / "metrics.json").read_text(), (out / "metrics.csv").read_text()
    assert run([*TINY, *options, f"out={out}"], log=tmp_path / "log") == 0
    assert ((out / "metrics.json").read_text(), (out / "metrics.csv").read_text()) == before
    assert "done: 12 steps" in (tmp_path / "log").read_text() and "trained" in (tmp_path / "log").read_text()


@pytest.mark.faults("C2", "SIGKILL with 0 or 2 workers, accumulation, average, early or late: the same end to the bit")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("workers", "accumulate", "ema", "step"), [*itertools.product([0, 2], [1, 2], ["null", "0.9"], [1, 4, 9])]
)
def test_every_combination(reference, tmp_path, workers, accumulate, ema, step):
    options = [f"data.num_workers={workers}", f"trainer.accumulate_grad_batches={accumulate}", f"ema={ema}"]
    out = tmp_path / "run"
    words = [*TINY, *options, f"out={out}"]
    assert run(words, ("backward", step)) == -9  # counted in optimizer steps
    assert run(words) == 0
    same_end(reference(*options), out)


@pytest.mark.faults("C20", "SIGKILL every 0.5 to 3 seconds until done: the same end to the bit")
@pytest.mark.slow
def test_killed_at_random_moments_until_done(reference, tmp_path):
    options = ["duration=60steps", "ema=0.9", *EVALS]
    out = tmp_path / "run"
    draw = random.Random(0)
    for _ in range(12):
        process = start([*TINY, *options, f"out={out}"])
        process.join(draw.uniform(0.5, 3.0))
        process.kill()
        process.join()
    assert run([*TINY, *options, f"out={out}"]) == 0
    same_end(reference(*options), out)
