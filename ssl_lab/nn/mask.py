"""One description of who may attend to whom, realised by whichever kernel runs."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_lab.errors import UserError

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Predicate = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class AttnMask:
    """All conditions hold together: a query attends to a key when every one of them allows it.

    Queries are the last L of S positions, so a causal mask with a key-value cache needs nothing else. Where a cache has
    dropped old positions, the last S columns of `valid`, `segments` and `everyone` count.

    Args:
        causal: a position sees itself and earlier ones.
        valid: (B, S) bool, False = padding that nobody sees.
        segments: (B, S) integer ids; only positions of one id see each other (packed documents).
        prefix: (B,) length of a leading part that is seen by all even under `causal` (prefix-LM).
        window: |query - key| < window: a causal query sees so many keys, itself included, another one so many to each
            side. Longformer's (arXiv:2004.05150) attention window w is 1 + w // 2.
        everyone: (B, S) bool, positions outside of the window's rule: they see all and all see them (Longformer's
            global attention), as far as the other conditions allow.
        chunk: under `causal`, positions stand in groups of so many that see each other whole: a position sees its own
            group and earlier ones (streaming speech recognition, arXiv:2012.05481).
        asked: (B, L) integer ids of queries, where these are other positions than the keys (cross-attention): a query
            sees the keys whose `segments` have its id, which may be none.
        free: so many positions at the very beginning are seen by all (under `causal` by those that follow), whatever
            else holds; see `after`.
    """

    causal: bool = False
    valid: Tensor | None = None
    segments: Tensor | None = None
    prefix: Tensor | None = None
    window: int | None = None
    everyone: Tensor | None = None
    chunk: int | None = None
    asked: Tensor | None = None
    free: int = 0

    def after(self, count: int) -> "AttnMask":
        """The mask of the same positions behind `count` learned ones that all see (prefixes, prompts).

        Made once and kept on this object.
        """
        made: tuple[int, AttnMask] | None = self.__dict__.get("_after")
        if made is None or made[0] != count:
            made = self.__dict__["_after"] = (
                count,
                replace(
                    self,
                    valid=None if self.valid is None else F.pad(self.valid, (count, 0), value=True),
                    segments=None if self.segments is None else F.pad(self.segments, (count, 0), value=-2),
                    everyone=None if self.everyone is None else F.pad(self.everyone, (count, 0), value=False),
                    prefix=None if self.prefix is None else self.prefix + count,
                    free=self.free + count,
                ),
            )
        return made[1]

    @property
    def plain(self) -> bool:
        """Nothing but (non-)causal: every fast kernel can do it."""
        return all(t is None for t in (self.valid, self.segments, self.prefix, self.window, self.chunk))

    @property
    def may_be_empty(self) -> bool:
        """A query may see nobody: only padding hides a position from itself."""
        return self.valid is not None or self.asked is not None

    def dense(self, L: int, S: int, device: torch.device | str) -> Tensor | None:
        """(B | 1, 1, 1 | L, S) bool, True = may attend; None when all may.

        Built once for all layers and kept on this object where it is not trivial.
        """
        windowed = self.window is not None and self.window < S
        if self.valid is None and self.segments is None and not windowed and (L == 1 or not self.causal):
            return None
        if self.plain or torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
            return self._dense(L, S, device)
        kept: tuple[object, Tensor] | None = self.__dict__.get("_kept")
        key = (L, S, str(device))
        if kept is None or kept[0] != key:
            kept = self.__dict__["_kept"] = (key, self._dense(L, S, device))
        return kept[1]

    def _dense(self, L: int, S: int, device: torch.device | str) -> Tensor:
        q = torch.arange(S - L, S, device=device)[:, None]
        k = torch.arange(S, device=device)[None]
        conditions = []
        if self.window is not None:
            near = ((q - k).abs() < self.window)[None, None]
            if self.everyone is not None:
                near = near | self.everyone[:, None, -S:][:, :, -L:, None] | self.everyone[:, None, None, -S:]
            conditions.append(near)
        if self.causal and L > 1:
            conditions.append((self._group(k) <= self._group(q))[None, None])
        if self.causal and self.prefix is not None and conditions:
            ordered = _all(conditions) | (k < self.prefix[:, None, None, None])
            conditions = [ordered]
        if self.valid is not None:
            conditions.append(self.valid[:, None, None, -S:])
        if self.segments is not None:
            seen = self.segments[:, -S:]
            own = seen[:, -L:] if self.asked is None else self.asked
            conditions.append(own[:, None, :, None] == seen[:, None, None])
        if self.free:
            return _all(conditions) | self._first(q, k)[None, None]
        return _all(conditions)

    def _first(self, q: Tensor, k: Tensor) -> Tensor:
        """Whether a key is one of the free ones, which under `causal` come before or are the query itself."""
        return (k < self.free) & (k <= q) if self.causal else (k < self.free) & (q == q)

    def _group(self, position: Tensor) -> Tensor:
        """What the causal rule compares: positions, or their chunks."""
        return position if self.chunk is None else (position - self.free).div(self.chunk, rounding_mode="floor")

    def mask_mod(self, L: int, S: int) -> Predicate:
        """The same rule as a FlexAttention predicate (b, h, q_idx, kv_idx) -> bool."""
        valid, segments, everyone = (
            None if t is None else t[:, -S:] for t in (self.valid, self.segments, self.everyone)
        )

        def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            q = q + (S - L)
            ok = k == k
            if self.window is not None:
                near = (q - k).abs() < self.window
                if everyone is not None:
                    near = near | everyone[b, q] | everyone[b, k]
                ok = ok & near
            if self.causal:
                ok = ok & (self._group(k) <= self._group(q))
                if self.prefix is not None:
                    ok = ok | (k < self.prefix[b])
            if valid is not None:
                ok = ok & valid[b, k]
            if segments is not None:
                own = segments[b, q] if self.asked is None else self.asked[b, q - (S - L)]
                ok = ok & (own == segments[b, k])
            return ok | self._first(q, k) if self.free else ok

        return allowed

    def blocks(self, L: int, S: int, device: torch.device | str) -> "BlockMask | None":
        """BlockMask for FlexAttention, built once and kept on this object; None when all may attend."""
        if self.plain and not self.causal:
            return None
        kept: dict[tuple[int, int, str], BlockMask] = self.__dict__.setdefault("_blocks", {})
        key = (L, S, str(device))
        if key not in kept:
            from torch.nn.attention.flex_attention import create_block_mask

            per_row = (self.valid, self.segments, self.prefix, self.everyone)
            rows = next((len(t) for t in per_row if t is not None), None)
            kept[key] = create_block_mask(self.mask_mod(L, S), rows, None, L, S, device=str(device))
        return kept[key]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def cu_seqlens(self) -> tuple[Tensor, int]:
        """Where the documents of the B rows laid end to end begin, and the end: (N + 1,) int32, and the longest length.

        A document is a run of one id within a row, be it that of padding. Built once for all layers and kept on this
        object: on an accelerator the host waits for it.

        Raises:
            UserError: an id comes back after another one within a row.
        """
        kept: tuple[Tensor, int] | None = self.__dict__.get("_cu_seqlens")
        if kept is None:
            assert self.segments is not None
            begins = _begins(self.segments)
            if int(begins.sum()) != int(_begins(self.segments.sort(1).values).sum()):
                raise UserError("a document of a packed row comes in two pieces: attention=flex and sdpa can take that")
            first = begins.flatten().nonzero()[:, 0]
            bounds = torch.cat([first, first.new_tensor([begins.numel()])])
            kept = bounds.int(), int(bounds.diff().max())
            if not torch.is_inference_mode_enabled():
                self.__dict__["_cu_seqlens"] = kept
        return kept


def _begins(ids: Tensor) -> Tensor:
    """(B, S) -> (B, S) bool, where an id differs from the one before it in the row."""
    begins = torch.ones_like(ids, dtype=torch.bool)
    begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
    return begins


def _all(conditions: list[Tensor]) -> Tensor:
    first, *rest = conditions
    for condition in rest:
        first = first & condition
    return first


FULL, CAUSAL = AttnMask(), AttnMask(causal=True)
