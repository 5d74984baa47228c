"""One description of who may attend to whom, realised by whichever kernel runs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Predicate = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class AttnMask:
    """All conditions hold together: a query attends to a key when every one of them allows it.

    Queries are the last L of S positions, so a causal mask with a key-value cache needs nothing else.

    Args:
        causal: a position sees itself and earlier ones.
        valid: (B, S) bool, False = padding that nobody sees.
        segments: (B, S) integer ids; only positions of one id see each other (packed documents).
        prefix: (B,) length of a leading part that is seen by all even under `causal` (prefix-LM).
        window: number of keys that a causal query sees, itself included (sliding window).
    """

    causal: bool = False
    valid: Tensor | None = None
    segments: Tensor | None = None
    prefix: Tensor | None = None
    window: int | None = None

    @property
    def plain(self) -> bool:
        """Nothing but (non-)causal: every fast kernel can do it."""
        return self.valid is None and self.segments is None and self.prefix is None and self.window is None

    def dense(self, L: int, S: int, device: torch.device | str) -> Tensor | None:
        """(B | 1, 1, L, S) bool, True = may attend; None when all may."""
        if self.plain and not self.causal:
            return None
        q = torch.arange(S - L, S, device=device)[:, None]
        k = torch.arange(S, device=device)[None]
        allowed = torch.ones(1, 1, L, S, dtype=torch.bool, device=device)
        if self.causal:
            ordered = (k <= q)[None, None]
            if self.window is not None:
                ordered = ordered & (q - k < self.window)
            if self.prefix is not None:
                ordered = ordered | (k[None, None] < self.prefix[:, None, None, None])
            allowed = allowed & ordered
        if self.valid is not None:
            allowed = allowed & self.valid[:, None, None, :]
        if self.segments is not None:
            allowed = allowed & (self.segments[:, None, S - L :, None] == self.segments[:, None, None, :])
        return allowed

    def mask_mod(self, L: int, S: int) -> Predicate:
        """The same rule as a FlexAttention predicate (b, h, q_idx, kv_idx) -> bool."""

        def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            q = q + (S - L)
            ok = k == k
            if self.causal:
                ordered = k <= q
                if self.window is not None:
                    ordered = ordered & (q - k < self.window)
                if self.prefix is not None:
                    ordered = ordered | (k < self.prefix[b])
                ok = ok & ordered
            if self.valid is not None:
                ok = ok & self.valid[b, k]
            if self.segments is not None:
                ok = ok & (self.segments[b, q] == self.segments[b, k])
            return ok

        return allowed

    def blocks(self, L: int, S: int, device: torch.device | str) -> "BlockMask | None":
        """BlockMask for FlexAttention, built once and kept on this object; None when all may attend."""
        if self.plain and not self.causal:
            return None
        kept: dict[tuple[int, int, str], BlockMask] = self.__dict__.setdefault("_blocks", {})
        key = (L, S, str(device))
        if key not in kept:
            from torch.nn.attention.flex_attention import create_block_mask

            rows = next((len(t) for t in (self.valid, self.segments, self.prefix) if t is not None), None)
            kept[key] = create_block_mask(self.mask_mod(L, S), rows, None, L, S, device=str(device))
        return kept[key]


FULL, CAUSAL = AttnMask(), AttnMask(causal=True)
