"""Decoding of one token with few operations: what the modules of a plain decoder compute, without the modules.

A small model spends most of a token's time on the fixed cost of its operations. Here a layer takes some fourteen: no
mask, no cache object, no module calls, rotation in place. The buffers of all layers are one, so that views are made
once a token.

On a CPU attention runs in float32 also for a bf16 model: torch's bf16 kernel takes four times as long for one query,
and keys are rounded once less.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_lab.backbones.decoder import Decoder
from ssl_lab.generation.layers import Layer, norm_map, product
from ssl_lab.nn.cache import KVCache


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
        self.dtype = torch.promote_types(weight.dtype, torch.float32) if weight.device.type == "cpu" else weight.dtype

    def begin(self, tokens: Tensor, valid: Tensor | None, new: int) -> Tensor:
        """The prompts go through the modules; what they leave in the cache is copied."""
        decoder, (rows, length) = self.decoder, tokens.shape
        self.room = min(length + new, decoder.window or length + new)
        shape = (len(self.layers), rows, 2 * self.groups, self.room, self.width)
        self.kept = torch.empty(shape, dtype=self.dtype, device=tokens.device)
        out = decoder(tokens, valid=valid, cache=_Into(self.kept))
        self.count, self.first = length, length
        at = torch.arange(length, length + new, device=tokens.device)
        self.mask: Tensor | None = None
        if valid is not None:
            at = at - (~valid).sum(1, keepdim=True)
            hidden = torch.cat([~valid, valid.new_zeros(rows, new)], 1)[:, None, None]
            self.mask = torch.zeros_like(hidden, dtype=self.dtype).masked_fill_(hidden, float("-inf"))
        self._tables(at)
        return decoder.logits(out.tokens[:, -1])

    def _tables(self, at: Tensor) -> None:
        """What depends on the position alone, for all steps at once: at (N,) or (B, N)."""
        positions = self.decoder.positions
        added, rope = positions.added(at), positions.rope(at)
        self.at = at
        self.added = None if added is None else added.to(self.decoder.embed.weight.dtype).unbind(-2)
        self.rope = None
        if rope is not None:  # (N, Dh) or (B, 1, N, Dh)
            wide = torch.promote_types(self.dtype, torch.float32)
            self.rope = [table.to(wide).unbind(-2) for table in rope]

    def step(self, tokens: Tensor) -> Tensor:
        n, slot, seen = self.count - self.first, self.count % self.room, min(self.count + 1, self.room)
        heads, groups, width, rope = self.heads, self.groups, self.width, self.rope
        x = F.embedding(tokens, self.decoder.embed.weight)
        if self.added is not None:
            x = x + self.added[n]
        now = self.kept.select(3, slot).unbind(0)
        past = self.kept.narrow(3, 0, seen)
        keys, values = past.narrow(2, 0, groups).unbind(0), past.narrow(2, groups, groups).unbind(0)
        mask = None if self.mask is None else self._mask(seen)
        if rope is not None:
            cos, sin = rope[0][n], rope[1][n]
        rows, kind = len(x), x.dtype
        for i, layer in enumerate(self.layers):
            found = layer.qkv(layer.norm(x)).view(rows, -1, width)
            if rope is not None:
                found = found.to(cos.dtype)
                turning = found.narrow(1, 0, heads + groups)
                turned = turning.roll(width // 2, -1)
                turning.mul_(cos).addcmul_(turned, sin)
            found = found.to(self.dtype)
            now[i].copy_(found.narrow(1, heads, 2 * groups))
            q = found.narrow(1, 0, heads).view(rows, groups, -1, width)
            out = F.scaled_dot_product_attention(q, keys[i], values[i], mask, scale=layer.scale)
            x = x + layer.proj(out.reshape(rows, -1).to(kind))
            x = x + layer.ffn(layer.ffn_norm(x))
        self.count += 1
        return self.head(self.norm(x))

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


class _Into(KVCache):
    """Takes the keys and values of a prompt into the buffers (layers, B, 2 Hkv, room, Dh); gives them as they are."""

    def __init__(self, kept: Tensor) -> None:
        super().__init__()
        self.kept = kept

    def append(self, layer: int, *new: Tensor) -> tuple[Tensor, ...]:
        room, length = self.kept.shape[3], new[0].shape[2]
        both = torch.cat(new, 1)
        if length < room:
            self.kept[layer, :, :, :length] = both
        else:  # position p lies in slot p % room
            self.kept[layer] = both[:, :, length - room :].roll(length % room, 2)
        return new
