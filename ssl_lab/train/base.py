"""Weights that a run starts from and never changes: its checkpoints name them by a checksum and hold what learns."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssl_lab.errors import UserError

KEY = "base"  # of the entry in a checkpoint
_STATES = ("state_dict", "current_model_state")  # the second beside an average


class Base:
    """The frozen parameters of some networks of a method.

    Args:
        method: with its starting weights, its networks tuned.
        parts: path of a network -> path of the one whose parameters tell which of its are frozen; see
            `ssl_lab.nn.tuning.Tuning`.
        weights: where they came from, for people.
    """

    def __init__(self, method: nn.Module, parts: Mapping[str, str], weights: Sequence[str] = ()) -> None:
        state = method.state_dict()
        self.tensors: dict[str, Tensor] = {}
        for part, model in parts.items():
            for name, value in method.get_submodule(model).named_parameters(remove_duplicate=False):
                if not value.requires_grad:
                    self.tensors[f"{part}.{name}"] = state[f"{part}.{name}"]
        self.weights, self.sha256 = list(weights), checksum(self.tensors)

    def left_out(self, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
        """A checkpoint without these parameters, and with what tells whether others are the same."""
        lean = dict(checkpoint)
        for state in _STATES:
            if state in lean:
                lean[state] = {name: value for name, value in lean[state].items() if name not in self.tensors}
        return lean | {KEY: {"sha256": self.sha256, "weights": self.weights, "tensors": len(self.tensors)}}

    def put_back(self, checkpoint: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
        """The whole of a checkpoint that `left_out` made lean; one that is whole stays as it is.

        Raises:
            UserError: it belongs to other starting weights.
        """
        known = checkpoint.get(KEY)
        if known is None:
            return dict(checkpoint)
        if known["sha256"] != self.sha256:
            told = ", ".join(known["weights"]) or "those of its seed"
            raise UserError(
                f"{path} was tuned from other starting weights ({told}) than are there now: restore them, since the "
                "checkpoint holds what learned alone"
            )
        whole = dict(checkpoint)
        for state in _STATES:
            if state in whole:
                whole[state] = {**{name: value.cpu() for name, value in self.tensors.items()}, **whole[state]}
        return whole


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes, types and bits, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].cpu().contiguous()
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
