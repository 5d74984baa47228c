import json
from functools import partial

import pytest
import torch
from torch import nn

from ssl_lab.backbones.vit import ViT
from ssl_lab.bench import peers
from ssl_lab.bench.flops import count
from ssl_lab.bench.harness import make, make_rotary, make_unplaced
from ssl_lab.bench.loop import data_wait
from ssl_lab.bench.report import Report, Row
from ssl_lab.bench.step import MethodStep
from ssl_lab.bench.timing import Timing, interleave, matmul_peak
from ssl_lab.cli.catalog import conf_folder
from ssl_lab.cli.compose import compose
from ssl_lab.cli.rehearsal import rehearsal
from ssl_lab.errors import UserError
from ssl_lab.methods.mae import MAE, Decoder
from ssl_lab.methods.supervised import Supervised
from ssl_lab.nn.block import encoder_block
from ssl_lab.types import Batch

CPU = torch.device("cpu")
DIM, DEPTH, PATCH, SIDE, CLASSES = 32, 2, 8, 32, 10
N = (SIDE // PATCH) ** 2


def encoder(kernel="auto", **more):
    return ViT(DIM, DEPTH, 4, image_size=SIDE, patch_size=PATCH, block=partial(encoder_block, kernel=kernel), **more)


def supervised(**more):
    return Supervised(encoder(**more), CLASSES, pooling="mean")


def mae():
    return MAE(encoder(positions="sincos"), decoder=partial(Decoder, dim=16, depth=1, num_heads=2))


def batch(size=4):
    generator = torch.Generator().manual_seed(0)
    return Batch(image=torch.randn(size, 3, SIDE, SIDE, generator=generator), target=torch.arange(size) % CLASSES)


def block_flops(tokens, dim):
    """Forward: qkv, output and a 4x MLP are 12 dim^2 multiplications a token; scores and their sum over values."""
    return 2 * tokens * 12 * dim**2 + 2 * 2 * tokens**2 * dim


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_counted_flops_are_the_formula(kernel):
    method = supervised(kernel=kernel)
    step = MethodStep(method, batch(), device=CPU, precision="32-true")
    patch_embed = 2 * N * 3 * PATCH**2 * DIM  # its input needs no gradient: forward and weights alone
    expected = 3 * (DEPTH * block_flops(N + 1, DIM) + 2 * DIM * CLASSES) + 2 * patch_embed
    assert count(step.forward_backward, method) == 4 * expected
    assert {b["attn"].fn.kernel for b in method.encoder.blocks} == {kernel}


@pytest.mark.parametrize(
    ("layer", "forward"),
    [
        (nn.Conv1d(16, 16, 31, padding=15, groups=16), 2 * 2 * 50 * 16 * 31),
        (nn.Conv1d(16, 32, 3, padding=1, groups=4), 2 * 2 * 50 * 32 * 4 * 3),
        (nn.Conv1d(16, 8, 2, stride=2), 2 * 2 * 25 * 8 * 16 * 2),
        (nn.ConvTranspose1d(16, 8, 2, stride=2, groups=2), 2 * 2 * 50 * 16 * 4 * 2),
    ],
)
@pytest.mark.parametrize("first", [False, True])
def test_convolutions_cost_backward_what_they_cost_forward(layer, forward, first):
    """Twice, or once where the input needs no gradient."""
    x = torch.randn(2, 16, 50).requires_grad_(not first)
    assert count(lambda: layer(x).sum().backward(), layer) == forward * (2 if first else 3)


def test_a_step_trains():
    torch.manual_seed(0)
    method = supervised()
    method.optim.lr = 3e-3
    step = MethodStep(method, batch(), device=CPU, precision="32-true")
    losses = [step().item() for _ in range(20)]
    assert losses[-1] < 0.7 * losses[0]
    assert step.params == sum(p.numel() for p in method.parameters())


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-mixed"])
def test_every_precision_runs(precision):
    step = MethodStep(supervised(), batch(), device=CPU, precision=precision)
    assert torch.isfinite(step())
    weights = next(step.model.parameters()).dtype
    assert weights == (torch.bfloat16 if precision == "bf16-true" else torch.float32)


def test_an_unknown_precision_names_those_there_are():
    with pytest.raises(UserError, match="bf16-mixed"):
        MethodStep(supervised(), batch(), device=CPU, precision="8-mixed")


def test_rounds_are_interleaved():
    calls = []
    steps = {name: partial(calls.append, name) for name in "ab"}
    timings = interleave(steps, CPU, rounds=3, warmup=1)
    assert "".join(calls) == "ab" + "ababab"
    assert [len(t.seconds) for t in timings.values()] == [3, 3]


def test_median_and_quartiles():
    timing = Timing((5.0, 1.0, 2.0, 3.0, 4.0))
    assert timing.median == 3.0 and timing.quartiles == (2.0, 4.0)
    assert Timing((7.0,)).quartiles == (7.0, 7.0)


def test_the_peak_is_positive():
    assert matmul_peak(CPU, torch.float32, repeats=1) > 0


def test_data_wait_is_a_share():
    from itertools import repeat

    assert 0 <= data_wait(repeat(batch()), lambda: sum(range(10**4)), CPU, batches=2) < 0.5


@pytest.mark.parametrize(
    ("name", "build"), [("timm", supervised), ("transformers", supervised), ("transformers", mae), ("lightly", mae)]
)
@pytest.mark.parametrize("variant", [peers.SHIPPED, peers.STRENGTHENED[1]])
def test_peers_do_the_same_work(name, build, variant):
    pytest.importorskip(name)
    method = build()
    ours = MethodStep(method, batch(), device=CPU, precision="32-true")
    step = peers.peer_step(name, method, batch(), variant, device=CPU, precision="32-true")
    assert torch.isfinite(step())
    assert step.params == pytest.approx(ours.params, rel=0.05)
    if variant.matmul:  # the counter charges SDPA for its recomputation; some project or predict patches for nothing
        assert 0.98 < count(step.forward_backward, step.model) / count(ours.forward_backward, method) < 1.4


def test_peers_that_cannot_be_timed_are_told_apart():
    with pytest.raises(UserError, match="transformers, timm, lightly"):
        peers.missing("keras", mae())
    assert "nothing that does the work of MAE" in peers.missing("timm", mae())
    assert peers.missing("timm", supervised()) is None


def test_a_missing_peer_names_the_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "ssl-lab[peers]" in peers.missing("transformers", mae())


def test_a_network_without_a_peer_is_refused():
    with pytest.raises(UserError, match="registers"):
        peers.encoder_of(supervised(num_registers=2))


CFG = {
    "img": SIDE, "patch": PATCH, "dim": DIM, "depth": DEPTH, "heads": 4, "classes": CLASSES, "dec_dim": 16,
    "dec_depth": 1, "dec_heads": 2, "mask": 0.75, "n_global": 2, "hidden": 32, "bottleneck": 16, "protos": 32,
    "out": 16, "T": 0.2, "device": "cpu", "precision": "bf16", "lr": 1e-4,
    "tdim": 16, "tdepth": 1, "theads": 2, "ctx": 6, "vocab": 40, "emb": 8, "ffn": 24, "seq": 6, "prompt": 4, "new": 3,
    "kernel": 5,
}  # fmt: skip


@pytest.mark.parametrize("family", ["mae", "dino", "moco", "vit", "vit_infer", "clip", "llama", "conformer"])
def test_the_harness_gets_a_step(family):
    image = batch()["image"]
    inputs = {"images": image, "labels": batch()["target"], "views": [image, image.flip(-1)]}
    tokens = torch.randint(1, 39, (len(image), 6), generator=torch.Generator().manual_seed(0))
    tokens[:, -1] = 39
    inputs |= {"global": inputs["views"], "local": [image[..., :PATCH, :PATCH]], "text": tokens, "ids": tokens}
    inputs["x"] = torch.randn(2, 9, DIM, generator=torch.Generator().manual_seed(0))
    step = make(family, CFG, inputs)
    assert step.params > 1000
    assert torch.isfinite(step()) and torch.isfinite(step())
    for other in (make_rotary(family, CFG, inputs), make_unplaced(family, CFG, inputs)):
        assert (other is None) == (family != "conformer")
        assert other is None or (torch.isfinite(other()) and other.params < step.params)  # no waves to project


def test_the_harness_gets_none_for_what_we_do_not_have():
    assert make("rwkv", CFG, {}) is None


def test_a_report_is_json_and_a_table(tmp_path):
    from rich.console import Console

    row = Row("ssl_lab", 0.1, (0.09, 0.12), 40.0, 0.5, 1000, 2**20)
    report = Report("tiny", "32-true", 4, {"device": "x"}, 10**9, 2e10, 3, [row], 0.25, None, ["a note"])
    report.write(tmp_path / "figures" / "bench.json")
    assert json.loads((tmp_path / "figures/bench.json").read_text())["rows"][0]["median_s"] == 0.1
    console = Console(record=True, width=120)
    report.show(console)
    text = console.export_text()
    assert "100.0" in text and "25.0%" in text and "a note" in text
    assert "samples/s" in text and "images/s" not in text


TINY = ["method=supervised", "data=shapes", "backbone=vit", "data.batch_size=8", "trainer.accelerator=cpu"]
TINY += [f"method.encoder.{size}" for size in ("dim=16", "depth=1", "num_heads=2")]


def bench(*words):
    from ssl_lab.cli.main import main

    return main(["bench", *TINY, "rounds=2", *words])


def test_the_verb_measures_and_writes_json(tmp_path):
    out = tmp_path / "bench.json"
    assert bench("against=[timm,lightly]", "memory=false", f"out={out}") == 0
    figures = json.loads(out.read_text())
    assert [row["name"] for row in figures["rows"]] == ["ssl_lab", "timm, as shipped"]
    assert all(row["median_s"] > 0 and row["peak_bytes"] is None for row in figures["rows"])
    assert figures["flops"] > 0 and 0 <= figures["data_wait"] < 1 and figures["loop_share"] > 0
    assert len(figures["notes"]) == 1 and "lightly" in figures["notes"][0]


def test_a_rehearsal_waits_for_no_other_machine(tmp_path):
    cfg = compose("bench", [*TINY, "strategy=ddp", "trainer.num_nodes=4"], [conf_folder()])
    assert rehearsal(cfg, str(tmp_path), 1).trainer.num_nodes == 1 and cfg.trainer.num_nodes == 4


@pytest.mark.slow
def test_memory_is_that_of_a_fresh_process(tmp_path):
    out = tmp_path / "bench.json"
    assert bench("loop=false", f"out={out}") == 0
    figures = json.loads(out.read_text())
    assert figures["rows"][0]["peak_bytes"] > 2**20 and figures["loop_share"] is None


def test_an_unknown_peer_is_a_mistake_of_the_user(capsys):
    assert bench("against=[keras]") == 2
    assert "transformers, timm, lightly" in capsys.readouterr().err


@pytest.mark.parametrize("verb", [["bench"], ["bench", "suite=small"], ["plan"]], ids=" ".join)
@pytest.mark.parametrize("count", [-1, 0])
def test_threads_that_cannot_be_are_a_mistake_of_the_user(verb, count, capsys):
    from ssl_lab.cli.main import main

    assert main([*verb, *([] if len(verb) > 1 else TINY), f"threads={count}"]) == 2
    assert f"threads={count}" in capsys.readouterr().err
