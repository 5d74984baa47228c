"""The mean of the last checkpoints of a run, as the Transformer of 2017 was evaluated (arXiv:1706.03762, section 6.1).

An average that is kept during training is `ema`; this one is made afterwards, from files.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssl_lab.errors import UserError
from ssl_lab.train import checkpoint


def read(path: str | Path, count: int = 1) -> dict[str, Any]:
    """A checkpoint whose `state_dict` is the mean of the `count` newest of a run folder; all else is the newest's.

    Floating-point tensors are summed in float64 and come back in their own type; counters are the newest's. With
    count=1, `path` may be a file.

    Raises:
        UserError: fewer checkpoints than `count`, one that is damaged, or of another architecture.
    """
    if count < 1:
        raise UserError(f"average={count}: give the number of checkpoints, 1 = the newest alone")
    folder = Path(path)
    if count == 1:
        found = checkpoint.find(folder)
        if found is None:
            raise UserError(f"there is no checkpoint in {folder}")
        return checkpoint.read(found)
    if not folder.is_dir():
        raise UserError(f"average={count} needs a run folder, and {folder} is a file")
    stored = checkpoint.stored(folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder)
    if len(stored) < count:
        raise UserError(
            f"average={count}, but {folder} holds {len(stored)} checkpoints: train with keep_checkpoints={count} and "
            "a save_steps that gives so many, or give a smaller average"
        )
    for file in stored[-count:]:
        if (problem := checkpoint.damage(file)) is not None:
            raise UserError(f"checkpoint {file} is damaged ({problem}); give a smaller average")
    newest = checkpoint.read(stored[-1])
    sums = {name: value.double() for name, value in newest["state_dict"].items() if _counts(value)}
    for file in stored[-count:-1]:
        state = checkpoint.read(file, lazy=True)["state_dict"]
        if state.keys() != newest["state_dict"].keys():
            raise UserError(f"{file} and {stored[-1].name} are of different methods and have no mean")
        for name in sums:
            sums[name] += state[name]
    means = {name: (value / count).to(newest["state_dict"][name].dtype) for name, value in sums.items()}
    return newest | {"state_dict": {**newest["state_dict"], **means}}


def _counts(value: Any) -> bool:
    return isinstance(value, Tensor) and torch.is_floating_point(value)
