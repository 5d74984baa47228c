"""Keys and values of the past, for decoding one token at a time."""

import torch
from torch import Tensor


class KVCache:
    """Keys and values per layer, growing by what is appended."""

    def __init__(self) -> None:
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add (B, Hkv, L, Dh) of the new positions; gives all (B, Hkv, S, Dh) so far."""
        if layer in self._layers:
            past_k, past_v = self._layers[layer]
            k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        self._layers[layer] = (k, v)
        return k, v

    def __len__(self) -> int:
        return next(iter(self._layers.values()))[0].shape[2] if self._layers else 0
