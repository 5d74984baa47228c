"""Checkpoints written beside training: the same files, the same faults."""

import threading

import pytest
import torch
from training import TINY, run, same_end

from ssl_lab.errors import UserError
from ssl_lab.train import checkpoint
from ssl_lab.train.checkpoint import CheckpointFiles, damage, facts, find, read, stored

BESIDE = "save_background=true"


def state(step: int) -> dict:
    net = torch.nn.Linear(64, 64)
    weights = net.state_dict() | {"tied": net.weight.detach(), "row": torch.arange(64.0)[8:16]}
    return {"state_dict": weights, "global_step": step, "loops": [{"done": (step, None)}]}


def test_a_file_holds_the_state_of_its_step_and_is_that_of_a_save_in_front(tmp_path, monkeypatch):
    go, real = threading.Event(), checkpoint.write
    monkeypatch.setattr(checkpoint, "write", lambda *args: go.wait(30) and real(*args))
    files, content = CheckpointFiles(background=True), state(1)
    before = {name: value.clone() for name, value in content["state_dict"].items()}
    go.set()
    CheckpointFiles().save_checkpoint(content, tmp_path / "front" / "step=1.ckpt")
    go.clear()
    files.save_checkpoint(content, tmp_path / "step=1.ckpt")  # returns, since the writing is another's business
    for value in content["state_dict"].values():
        value.zero_()  # training goes on
    content["loops"][0]["done"] = None
    assert find(tmp_path) is None
    go.set()
    files.wait()
    found = read(find(tmp_path))
    assert all(torch.equal(found["state_dict"][name], value) for name, value in before.items())
    assert found["loops"] == [{"done": (1, None)}]
    assert facts(find(tmp_path))["sha256"] == facts(find(tmp_path / "front"))["sha256"]


def test_one_file_at_a_time(tmp_path, monkeypatch):
    under_way, most, real = [0], [0], checkpoint.write

    def write(*args):
        under_way[0] += 1
        most[0] = max(most[0], under_way[0])
        real(*args)
        under_way[0] -= 1

    monkeypatch.setattr(checkpoint, "write", write)
    files = CheckpointFiles(background=True)
    for step in range(5):
        files.save_checkpoint(state(step), tmp_path / f"step={step}.ckpt")
    files.wait()
    assert most == [1] and [path.name for path in stored(tmp_path)] == ["step=3.ckpt", "step=4.ckpt"]


@pytest.mark.parametrize("end", ["next save", "wait"])
def test_an_error_comes_up_once_where_the_file_is_waited_for(tmp_path, end):
    (tmp_path / "file").write_text("in the way of a folder")
    files = CheckpointFiles(background=True)
    files.save_checkpoint(state(1), tmp_path / "file" / "step=1.ckpt")
    with pytest.raises(UserError, match="cannot write"):
        files.wait() if end == "wait" else files.save_checkpoint(state(2), tmp_path / "step=2.ckpt")
    files.save_checkpoint(state(3), tmp_path / "step=3.ckpt")
    files.wait()
    assert find(tmp_path).name == "step=3.ckpt"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was left alone and saved in front."""
    out = tmp_path_factory.mktemp("whole")
    assert run([*TINY, "ema=0.9", f"out={out}"]) == 0
    return out


@pytest.mark.faults("C5", "SIGKILL while a checkpoint is written in the background: the same end to the bit")
def test_killed_while_it_writes(tmp_path, whole):
    """Inside the fifth file or so, some 1,300 writes each."""
    words = [*TINY, "ema=0.9", BESIDE, f"out={tmp_path}"]
    assert run(words, ("save", 6000)) == -9
    left = stored(tmp_path / "checkpoints")
    assert left and not any(damage(path) for path in left)
    assert facts(find(tmp_path))["step"] < 12 and not (tmp_path / "last.safetensors").exists()
    assert run(words) == 0
    same_end(whole, tmp_path)


@pytest.mark.slow
def test_left_alone_it_ends_as_in_front(tmp_path, whole):
    assert run([*TINY, "ema=0.9", BESIDE, f"out={tmp_path}"]) == 0
    same_end(whole, tmp_path)
