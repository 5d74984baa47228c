"""Decoding of one token with few operations: what the modules of a plain decoder compute, without the modules.

A small model spends most of a token's time on the fixed cost of its operations. Here a layer takes some twenty: no
mask, no cache object, no module calls, rotation and sums in place. The buffers of all layers are one, so that views
are made once a token.

A bf16 model keeps the sum over its blocks in float32, which saves casts around the norms. On a CPU its attention runs
in float32 too: torch's bf16 kernel takes four times as long for one query.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_lab.backbones.decoder import Decoder
from ssl_lab.generation.layers import Layer, norm_map, product
from ssl_lab.nn.attend import attend
from ssl_lab.nn.mask import AttnMask


class Compact:
    """A decoder's steps. With a window only as many keys as it holds are kept, each in the place of the oldest.

    Args:
        decoder: the model; its weights are used where they lie, small gate and up matrices are joined in a copy.
        layers: what `plan` made of it.
    """

    def __init__(self, decoder: Decoder, layers: list[Layer]) -> None:
        self.decoder, self.layers = decoder, layers
        self.norm, self.head = norm_map(decoder.norm), product(decoder.head_weight, None)
        attention = decoder.blocks[0]["attn"].fn  # type: ignore[index]
        self.heads, self.groups, self.width = attention.num_heads, attention.num_kv_heads, attention.head_dim
        weight = decoder.embed.weight
        self.kind, self.wide = weight.dtype, torch.promote_types(weight.dtype, torch.float32)
        self.dtype = self.wide if weight.device.type == "cpu" else self.kind  # of keys and values
        self.views: tuple[Tensor, Tensor, tuple[Tensor, Tensor], Tensor, Tensor] | None = None

    def begin(self, tokens: Tensor, valid: Tensor | None, new: int) -> Tensor:
        rows, length = tokens.shape
        self.room = min(length + new, self.decoder.window or length + new)
        shape = (len(self.layers), rows, 2 * self.groups, self.room, self.width)
        self.kept = torch.empty(shape, dtype=self.dtype, device=tokens.device)
        at = torch.arange(length + new, device=tokens.device)
        self.mask: Tensor | None = None
        if valid is not None:
            hidden = torch.cat([~valid, valid.new_zeros(rows, new)], 1)
            at = (at - hidden.sum(1, keepdim=True)).clamp_(min=0)
            self.mask = torch.zeros_like(hidden, dtype=self.dtype).masked_fill_(hidden, float("-inf"))[:, None, None]
        self._tables(at)
        logits = self._prompt(tokens, AttnMask(causal=True, valid=valid, window=self.decoder.window))
        self.count = length
        return logits

    def _tables(self, at: Tensor) -> None:
        """What depends on the position alone, for all steps at once: at (N,) or (B, N)."""
        positions = self.decoder.positions
        added, rope = positions.added(at), positions.rope(at)  # (N, D) or (B, N, D); (N, Dh) or (B, 1, N, Dh)
        self.at, self.all_added = at, None if added is None else added.to(self.wide)
        self.all_rope = None if rope is None else (rope[0].to(self.wide), rope[1].to(self.wide))
        self.added = None if self.all_added is None else self.all_added.unbind(-2)
        self.rope = None if self.all_rope is None else tuple(zip(*(t.unbind(-2) for t in self.all_rope), strict=True))

    def _prompt(self, tokens: Tensor, mask: AttnMask) -> Tensor:
        (rows, length), width = tokens.shape, self.width
        x = F.embedding(tokens, self.decoder.embed.weight).to(self.wide)
        if self.all_added is not None:
            x += self.all_added[..., :length, :]
        x = x.flatten(0, 1)
        rope = None if self.all_rope is None else tuple(t[..., :length, :] for t in self.all_rope)
        for i, layer in enumerate(self.layers):
            found = layer.qkv(layer.norm(x)).view(rows, length, -1, width).transpose(1, 2)
            q, k, v = self._turned(found, rope).split([self.heads, self.groups, self.groups], 1)
            self._keep(i, torch.cat([k, v], 1))
            out = attend(q, k, v, mask, scale=layer.scale)
            x += layer.proj(out.transpose(1, 2).reshape(rows * length, -1).to(self.kind))
            x += layer.ffn(layer.ffn_norm(x))
        return self.head(self.norm(x.view(rows, length, -1)[:, -1]))

    def _turned(self, found: Tensor, rope: tuple[Tensor, ...] | None) -> Tensor:
        """Queries, keys and values (B, H + 2 Hkv, ..., Dh), the first two rotated, in the dtype of the buffers."""
        if rope is not None:
            found = found.to(self.wide)
            turning = found.narrow(1, 0, self.heads + self.groups)
            swapped = turning.roll(self.width // 2, -1)
            turning.mul_(rope[0]).addcmul_(swapped, rope[1])
        return found.to(self.dtype)

    def _keep(self, layer: int, both: Tensor) -> None:
        """Keys and values (B, 2 Hkv, L, Dh) of a prompt: position p into slot p % room."""
        length = both.shape[2]
        if length < self.room:
            self.kept[layer, :, :, :length] = both
        else:
            self.kept[layer] = both[:, :, length - self.room :].roll(length % self.room, 2)

    def step(self, tokens: Tensor) -> Tensor:
        n, room, groups = self.count, self.room, self.groups
        seen = min(n + 1, room)
        now = self.kept.select(3, n % room).unbind(0)
        past = self.kept.narrow(3, 0, seen)
        keys, values = past.narrow(2, 0, groups).unbind(0), past.narrow(2, groups, groups).unbind(0)
        mask, rope = None if self.mask is None else self._mask(seen), None if self.rope is None else self.rope[n]
        x = F.embedding(tokens, self.decoder.embed.weight).to(self.wide)
        rows = len(x)
        if self.added is not None:
            x += self.added[n]
        found, turning, halves, q, both = self._views(rows)
        for i, layer in enumerate(self.layers):
            found.copy_(layer.qkv(layer.norm(x)))
            if rope is not None:
                swapped = torch.cat(halves, -1)
                turning.mul_(rope[0]).addcmul_(swapped, rope[1])
            now[i].copy_(both)
            out = F.scaled_dot_product_attention(q.to(self.dtype), keys[i], values[i], mask, scale=layer.scale)
            x += layer.proj(out.reshape(rows, -1).to(self.kind))
            x += layer.ffn(layer.ffn_norm(x))
        self.count += 1
        return self.head(self.norm(x))

    def _views(self, rows: int) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor], Tensor, Tensor]:
        """A buffer (B, E) for what a layer projects, and views: what rotates, its halves swapped, queries, the rest."""
        if self.views is None or len(self.views[0]) != rows:
            heads, groups, width = self.heads, self.groups, self.width
            buffer = self.kept.new_empty(rows, heads + 2 * groups, width, dtype=self.wide)
            turning, first, second = buffer[:, : heads + groups], *buffer[:, : heads + groups].chunk(2, -1)
            q = buffer[:, :heads].view(rows, groups, -1, width)  # heads of a group are queries of one head
            self.views = (buffer.flatten(1), turning, (second, first), q, buffer[:, heads:])
        return self.views

    def _mask(self, seen: int) -> Tensor:
        """(B, 1, 1, S) to add; a full ring holds the last positions, rotated."""
        assert self.mask is not None
        if self.count < self.room:
            return self.mask[..., :seen]
        return self.mask[..., self.count + 1 - self.room : self.count + 1].roll((self.count + 1) % self.room, -1)

    def reorder(self, rows: Tensor) -> None:
        seen = min(self.count, self.room)
        kept = self.kept.narrow(3, 0, seen).index_select(1, rows)
        if len(rows) != self.kept.shape[1]:
            layers, _, groups, room, width = self.kept.shape
            self.kept = self.kept.new_empty(layers, len(rows), groups, room, width)
        self.kept.narrow(3, 0, seen).copy_(kept)
        if self.mask is not None and not torch.equal(at := self.at[rows], self.at):  # beams of one prompt share it
            self.mask = self.mask[rows]
            self._tables(at)
