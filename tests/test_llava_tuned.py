"""Tuned runs of what sees and speaks, whose checkpoints hold what learned alone, as beginnings of other runs."""

import os

import pytest
import torch
from test_flamingo import made
from test_vlm import small

from ssl_lab.errors import UserError
from ssl_lab.methods.flamingo import Flamingo
from ssl_lab.methods.llava import LLaVA, load
from ssl_lab.nn.lora import LoRA, fuse_
from ssl_lab.nn.tuning import Partial
from ssl_lab.train import checkpoint
from ssl_lab.train.base import Base
from ssl_lab.weights import io


def tuned(folder, make, tune):
    """A tuned run in `folder`: its method after some training, and what its checkpoint holds."""
    method = make()
    parts = tune(method)
    base = Base(method, parts)
    for p in method.parameters():
        if p.requires_grad:
            p.data.add_(0.1)
    content = base.left_out({"state_dict": method.state_dict(), "global_step": 1})
    checkpoint.write(content, folder / "checkpoints/step=1.ckpt")
    return method, content


@pytest.mark.parametrize("kind", ["llava", "flamingo"])
def test_a_run_whose_checkpoints_hold_what_learned_alone_is_a_beginning_too(tmp_path, kind):
    make = (lambda **more: LLaVA(small(), **more)) if kind == "llava" else (lambda **more: Flamingo(made(), **more))
    names = make().named_parameters()
    tune = Partial(parts=["model.vision", "model.decoder"], also=["*look*"] if kind == "flamingo" else ["*norm*"])
    method, content = tuned(tmp_path, make, tune)
    assert 0 < len(content["state_dict"]) < len(list(names)) / 2
    want = method.state_dict()
    again = make(weights=str(tmp_path)).state_dict()  # not ended, and the rest is here already
    assert want.keys() == again.keys() and all(torch.equal(again[name], value) for name, value in want.items())

    def other(**more):
        method = make(**more)
        method.model.vision.cls_token.data.add_(1)
        return method

    strange = other()
    with pytest.raises(UserError, match=r"holds what learned alone, .* until the run has ended"):
        load(strange.model, str(tmp_path))
    io.save(method.model, tmp_path / "last.safetensors")
    load(strange.model, str(tmp_path))  # ended: all of it is there
    found = strange.state_dict()
    assert all(torch.equal(found[name], value) for name, value in want.items())
    newer = {name: value + 1 for name, value in content["state_dict"].items()}
    checkpoint.write(content | {"state_dict": newer, "global_step": 2}, tmp_path / "checkpoints/step=2.ckpt")
    with pytest.raises(UserError, match="holds what learned alone"):  # the run went on since
        load(other().model, str(tmp_path))


def test_low_rank_updates_of_a_run_that_has_ended_are_a_beginning(tmp_path):
    method, _ = tuned(tmp_path, lambda: LLaVA(small(), train=["decoder"]), LoRA(rank=2, parts=["model.decoder"]))
    with pytest.raises(UserError, match="holds what learned alone"):
        load(small(), str(tmp_path))
    io.save(fuse_(method.model), tmp_path / "last.safetensors")
    found = LLaVA(small(), weights=str(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), method.parameters(), strict=True))
    stamp = (tmp_path / "last.safetensors").stat().st_mtime
    os.utime(tmp_path / "checkpoints/step=1.ckpt", (stamp + 9, stamp + 9))
    with pytest.raises(UserError, match="holds what learned alone"):  # nothing else tells that the run went on
        load(small(), str(tmp_path))
