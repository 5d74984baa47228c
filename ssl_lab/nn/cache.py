"""Keys and values of the past, for decoding a few tokens at a time."""

from collections.abc import Callable

import torch
from torch import Tensor


class _Store:
    """Buffers of one layer: positions `start` to `end` of dimension 2 are in use, `seen` were ever appended."""

    __slots__ = ("buffers", "end", "seen", "start")

    def __init__(self) -> None:
        self.buffers: tuple[Tensor, ...] = ()
        self.start = self.end = self.seen = 0

    @property
    def room(self) -> int:
        return self.buffers[0].shape[2] if self.buffers else 0

    def views(self) -> tuple[Tensor, ...]:
        return tuple([b.narrow(2, self.start, self.end - self.start) for b in self.buffers])

    def move(self, kept: tuple[Tensor, ...], room: int) -> None:
        """Into fresh buffers of `room` positions that begin with `kept`."""
        length = kept[0].shape[2]
        self.buffers = tuple([t.new_empty(*t.shape[:2], room, *t.shape[3:]) for t in kept])
        for buffer, part in zip(self.buffers, kept, strict=True):
            buffer.narrow(2, 0, length).copy_(part)
        self.start, self.end = 0, length


class KVCache:
    """What each layer keeps per position; `len` is the number of positions so far, dropped ones included.

    Attention keeps keys and values (B, Hkv, S, Dh), latent attention keeps one tensor (B, 1, S, R): any number of
    tensors whose dimension 2 is the position. What is given back are views of buffers that double when they are full,
    so a step copies its own positions alone; they are valid until the next step. Where keys need a gradient, they are
    concatenated instead.

    Args:
        length: positions to make room for at once, if known.
        window: keep no more than the last `window` - 1 positions beside the new ones, for sliding-window attention
            (Mistral 7B, arXiv:2310.06825, section 2). Positions stay in order (they move to the front of a buffer of
            twice the size when it is full, where the paper writes position p to slot p mod window), so
            `AttnMask(causal=True, window=window)` holds as it is: queries are the last positions, and `valid` and
            `segments` count from the end. A mask's `prefix` counts from the beginning and cannot be used with it.
    """

    def __init__(self, length: int = 0, window: int | None = None) -> None:
        self.length, self.window = length, window
        self._stores: dict[int, _Store] = {}
        self._fixed: dict[int, tuple[Tensor, ...]] = {}
        self._states: dict[int, Tensor] = {}

    def append(self, layer: int, *new: Tensor) -> tuple[Tensor, ...]:
        """Add (B, Hkv, L, Dh) of the new positions; gives all (B, Hkv, S, Dh) that a new one may see, in order."""
        store = self._stores.get(layer)
        if store is None:
            store = self._stores[layer] = _Store()
        added = new[0].shape[2]
        store.seen += added
        if self.window is not None:
            store.start = max(store.start, store.end - self.window + 1)
        if torch.is_grad_enabled() and any(t.requires_grad for t in new):
            joined = zip(store.views(), new, strict=True) if store.buffers else ()
            store.buffers = tuple([torch.cat(pair, 2) for pair in joined]) or new
            store.start, store.end = 0, store.room
            return store.buffers
        if store.end + added > store.room:
            kept = store.views() if store.buffers else tuple([t.narrow(2, 0, 0) for t in new])
            needed = 2 * (kept[0].shape[2] + added)
            store.move(kept, max(needed, 64) if self.window is not None else max(needed, 64, self.length))
        for buffer, part in zip(store.buffers, new, strict=True):
            buffer.narrow(2, store.end, added).copy_(part)
        store.end += added
        return store.views()

    def fixed(self, layer: int, make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Keys and values that do not grow (cross-attention): made at the first step, then kept."""
        if layer not in self._fixed:
            self._fixed[layer] = make()
        return self._fixed[layer]

    def state(self, layer: int) -> Tensor | None:
        """(B, ...) that sums up the past, of layers that keep nothing per position (linear attention)."""
        return self._states.get(layer)

    def keep(self, layer: int, state: Tensor, added: int) -> None:
        """The state after `added` more positions."""
        self._states[layer] = state
        self._stores.setdefault(layer, _Store()).seen += added

    def reorder(self, rows: Tensor) -> None:
        """Row b becomes what row `rows[b]` was, for beam search; rows (B',) int64."""
        for store in self._stores.values():
            if store.buffers:
                store.move(tuple([t.index_select(0, rows) for t in store.views()]), store.room)
        self._states = {layer: state.index_select(0, rows) for layer, state in self._states.items()}
        self._fixed = {layer: tuple([t.index_select(0, rows) for t in kept]) for layer, kept in self._fixed.items()}

    def __len__(self) -> int:
        return next((store.seen for store in self._stores.values()), 0)
