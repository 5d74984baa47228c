"""States to be saved: nested dicts and lists of tensors and plain values."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def copied(state: Any) -> Any:
    """A state that stays as it is while training goes on: nested dicts and lists, tensors on the CPU.

    Tensors that share memory, such as tied weights, share that of the copy, so a file of it has the same size.
    """
    return _copied(state, {})


def _copied(value: Any, known: dict[int, torch.UntypedStorage]) -> Any:
    if isinstance(value, Tensor):
        storage = value.untyped_storage()
        if storage._cdata not in known:
            known[storage._cdata] = storage.clone() if storage.device.type == "cpu" else storage.cpu()
        empty = torch.empty(0, dtype=value.dtype)
        return empty.set_(known[storage._cdata], value.storage_offset(), value.size(), value.stride())
    if isinstance(value, dict):
        held = copy.copy(value)  # a state_dict has attributes of its own
        held.update({key: _copied(each, known) for key, each in value.items()})
        return held
    if type(value) in (list, tuple):
        return type(value)(_copied(each, known) for each in value)
    return copy.deepcopy(value)


def num_bytes(value: Any) -> int:
    """Bytes of all tensors in nested dicts and lists."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(map(num_bytes, value.values()))
    return sum(map(num_bytes, value)) if isinstance(value, list | tuple) else 0
