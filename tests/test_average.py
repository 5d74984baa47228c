"""The mean of the last checkpoints: kept in training, read for evaluation and export."""

import pytest
import torch
from safetensors.torch import load_file
from training import run

from ssl_lab.cli.main import main
from ssl_lab.errors import UserError
from ssl_lab.evals.results import read as results
from ssl_lab.train import average, checkpoint

SEQ2SEQ = [
    "method=seq2seq", "method.model.dim=16", "method.model.depth=1", "method.model.num_heads=2", "data.batch_size=4",
    "duration=8steps", "save_steps=2", "keep_checkpoints=3", "trainer.accelerator=cpu", "optim.lr=0.01",
]  # fmt: skip


def written(folder, step, state):
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.write({"state_dict": state, "global_step": step, "epoch": step}, folder / f"step={step}.ckpt")


def test_it_is_the_mean_of_the_newest(tmp_path):
    g = torch.Generator().manual_seed(0)
    states = [
        {"w": torch.randn(5, generator=g), "n": torch.tensor(i), "h": torch.full((2,), i).half()} for i in range(4)
    ]
    for i, state in enumerate(states):
        written(tmp_path / "checkpoints", i, state)
    found = average.read(tmp_path, 3)
    expected = (states[1]["w"].double() + states[2]["w"] + states[3]["w"]) / 3
    torch.testing.assert_close(found["state_dict"]["w"], expected.float(), rtol=0, atol=0)
    assert found["state_dict"]["n"] == 3 and found["state_dict"]["h"].dtype == torch.float16
    assert found["state_dict"]["h"][0] == 2 and found["global_step"] == 3
    assert torch.equal(average.read(tmp_path)["state_dict"]["w"], states[3]["w"])
    assert torch.equal(average.read(tmp_path / "checkpoints/step=1.ckpt")["state_dict"]["w"], states[1]["w"])


def test_what_cannot_be_averaged_is_said(tmp_path):
    written(tmp_path / "checkpoints", 1, {"w": torch.zeros(1)})
    with pytest.raises(UserError, match="holds 1 checkpoints: train with keep_checkpoints=2"):
        average.read(tmp_path, 2)
    with pytest.raises(UserError, match="is a file"):
        average.read(tmp_path / "checkpoints/step=1.ckpt", 2)
    written(tmp_path / "checkpoints", 2, {"v": torch.zeros(1)})
    with pytest.raises(UserError, match="different methods"):
        average.read(tmp_path, 2)
    (tmp_path / "checkpoints/step=2.ckpt").write_bytes(b"x")
    with pytest.raises(UserError, match="damaged"):
        average.read(tmp_path, 2)


def test_a_run_keeps_them_and_they_are_evaluated_and_exported(tmp_path):
    pytest.importorskip("sacrebleu", reason="sacrebleu is not installed")
    out = tmp_path / "run"
    assert run([*SEQ2SEQ, f"out={out}"]) == 0
    assert len(checkpoint.stored(out / "checkpoints")) == 3
    words = ["eval=[perplexity,bleu]", "eval.bleu.limit=8", "eval.bleu.max_tokens=8", "pictures=false"]
    for count in (1, 3):
        assert main(["evaluate", f"ckpt={out}", f"average={count}", *words]) == 0
    found = {(r.subject, r.name): r.value for r in results(out / "metrics.json")}
    assert found["mean of 3", "nats"] != found["trained", "nats"]
    assert ("mean of 3", "bleu") in found
    assert main(["export", f"ckpt={out}", "average=3", f"out={tmp_path / 'out'}"]) == 0
    mean = average.read(out, 3)["state_dict"]
    state = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(state["embed.weight"], mean["model.embed.weight"])
