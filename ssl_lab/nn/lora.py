"""Low-rank adaptation (LoRA, Hu et al., 2021, arXiv:2106.09685): W x + s B A x, where W is frozen and B starts at 0."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from ssl_lab.errors import UserError
from ssl_lab.nn.attention import Attention
from ssl_lab.nn.dropout import Dropout
from ssl_lab.nn.linear import Linear, linear
from ssl_lab.nn.tuning import Tuning, fits, require_fit

M = TypeVar("M", bound=nn.Module)


@dataclass(kw_only=True)
class LoRA(Tuning):
    """Low-rank updates beside linear layers; nothing changes until the first step.

    Layers are named as in the network, from any dot on: `proj`, `attn.fn.qkv`, `blocks.1?.*`. Where a layer packs
    several projections, `q`, `k` and `v` name the parts, each with matrices of its own, and `qkv` (`kv`) the whole with
    one pair, as peft does with such layers.

    Args:
        rank: inner width r.
        alpha: the update counts alpha / r times.
        rslora: alpha / sqrt(r) times instead, which keeps its size as r grows (arXiv:2312.03732).
        dropout: of the update's input.
        targets: which layers, by pattern. The paper takes queries and values.
    """

    rank: int = 16
    alpha: float = 32.0
    rslora: bool = False
    dropout: float = 0.0
    targets: Sequence[str] = ("q", "v")

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0 <= self.dropout < 1:
            raise UserError(f"tuning.rank={self.rank} is at least 1, and tuning.dropout={self.dropout} in [0, 1)")

    def change(self, network: nn.Module, path: str) -> None:
        """Put a `LoRALinear` in the place of every layer that is named.

        Raises:
            UserError: a name that fits no layer, or a layer whose weight another one has, too.
        """
        scale = self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)
        found = {name: (parent, parts) for name, parent, parts in _layers(network)}
        parts_of = {name: [_part_name(name, part) for part in parts] for name, (_, parts) in found.items()}
        require_fit(self.targets, [n for name, parts in parts_of.items() for n in (name, *parts)], "tuning.targets")
        for name, (parent, parts) in found.items():
            base: nn.Linear = getattr(parent, child := name.rpartition(".")[2])
            spans = [(0, base.out_features)] if fits(name, self.targets) else []
            spans = spans or [span for part, span in parts.items() if fits(_part_name(name, part), self.targets)]
            if spans:
                if sum(p is base.weight for _, p in network.named_parameters(remove_duplicate=False)) > 1:
                    raise UserError(
                        f"tuning.targets: {name} shares its weight with another layer, which would change too"
                    )
                layer = LoRALinear(base, self.rank, spans)
                layer.scale, layer.dropout = scale, Dropout(self.dropout)
                setattr(parent, child, layer)


class LoRALinear(Linear):
    """A linear layer (..., D) -> (..., E) and its update of rank r; weight and bias keep their names in a state dict.

    `weight` reads as W + s B A, for whoever uses it without calling the layer; the frozen W is in `named_parameters`.
    Dropout acts when the layer is called, or asked for `rows`.

    Args:
        base: the layer, whose parameters become this one's.
        rank: r.
        spans: outputs (from, to) that are updated, each span with a pair of its own; they do not overlap.

    Attributes:
        lora_a: (n r, D), normal-like uniform as torch begins a layer, of n spans one below the other.
        lora_b: (rows of all spans, r), 0.
        scale: s.
    """

    beside = "low-rank updates"

    def __init__(self, base: nn.Linear, rank: int, spans: Sequence[tuple[int, int]]) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self._parameters["weight"], self._parameters["bias"] = base._parameters["weight"], base._parameters["bias"]
        self.kind, self.rank, self.spans, self.scale = type(base), rank, list(spans), 1.0
        self.dropout: nn.Module = nn.Identity()
        self.off = False  # see `without_updates`
        like = base.weight
        self.lora_a = nn.Parameter(like.new_empty(rank * len(spans), base.in_features))
        self.lora_b = nn.Parameter(like.new_zeros(sum(stop - start for start, stop in spans), rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        self._before: Tensor | None = None  # W, while the update is merged into it
        self.train(base.training)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """(E, D): W + s B A."""
        base = self._base
        return base if self.merged or self.off else base + self.update().to(base.dtype)

    @property
    def merged(self) -> bool:
        """Whether W holds the update."""
        return self._before is not None

    def update(self) -> Tensor:
        """(E, D): s B A; in float32 at least, since merged weights are rounded but once."""
        wide = torch.promote_types(self.lora_a.dtype, torch.float32)
        return self._second().to(wide) @ self.lora_a.to(wide)

    def forward(self, x: Tensor) -> Tensor:
        return self.rows(x)

    def rows(self, x: Tensor, start: int = 0, stop: int | None = None, add: Tensor | None = None) -> Tensor:
        """See `Linear.rows`."""
        bias = None if self.bias is None else self.bias[start:stop]
        bias = add if bias is None else bias if add is None else bias + add
        out = linear(x, self._base[start:stop], bias)
        if self.merged or self.off:
            return out
        return out + linear(linear(self.dropout(x), self.lora_a), self._second()[start:stop])

    @torch.no_grad()
    def merge_(self) -> None:
        """Add the update to W. Until `unmerge_`, which puts W back to the bit, the former W is kept."""
        if not self.merged:
            base = self._base
            self._before = base.detach().clone()
            base.copy_(base.to(torch.promote_types(base.dtype, torch.float32)) + self.update())

    @torch.no_grad()
    def unmerge_(self) -> None:
        """Undo `merge_`."""
        if self._before is not None:
            self._base.copy_(self._before)
            self._before = None

    def fused(self) -> nn.Linear:
        """A layer of the kind that was there before, with W + s B A."""
        self.merge_()
        plain = self.kind.__new__(self.kind)
        nn.Module.__init__(plain)
        plain.in_features, plain.out_features = self.in_features, self.out_features
        plain._parameters["weight"] = nn.Parameter(self._base.detach().clone())
        plain._parameters["bias"] = self._parameters["bias"]
        self.unmerge_()
        return plain.train(self.training)

    @property
    def _base(self) -> Tensor:
        weight = self._parameters.get("weight")
        if weight is None:
            raise AttributeError("weight")  # while a module is made, torch asks whether the name is free
        return weight

    def _second(self) -> Tensor:
        """(E, n r): s B, of several spans in blocks."""
        if self.spans == [(0, self.out_features)]:
            return self.lora_b * self.scale
        rows = self.lora_b.split([stop - start for start, stop in self.spans])
        whole = self.lora_b.new_zeros(self.out_features, self.rank * len(rows))
        for i, ((start, stop), part) in enumerate(zip(self.spans, rows, strict=True)):
            whole[start:stop, i * self.rank : (i + 1) * self.rank] = part * self.scale
        return whole


def merge_(network: nn.Module) -> None:
    """Add every update to its weight: the network then costs what it cost before.

    The same up to rounding: W x + s B (A x) and (W + s B A) x are sums in another order, so outputs differ by a few
    units in the last place of the layer's dtype, and in half precision by the rounding of W + s B A to it.
    """
    for layer in _lora(network):
        layer.merge_()


def unmerge_(network: nn.Module) -> None:
    """Undo `merge_`, to the bit."""
    for layer in _lora(network):
        layer.unmerge_()


@contextlib.contextmanager
def without_updates(network: nn.Module) -> Iterator[None]:
    """Inside, every layer is what it was before the tuning; nothing is computed or copied for that.

    Raises:
        UserError: an update that is merged into its weight.
    """
    layers = list(_lora(network))
    if any(layer.merged for layer in layers):
        raise UserError("low-rank updates that are merged cannot be switched off: call unmerge_ first")
    for layer in layers:
        layer.off = True
    try:
        yield
    finally:
        for layer in layers:
            layer.off = False


def fuse_(network: M) -> M:
    """Put plain layers with merged weights in the place of every `LoRALinear`; gives the network, changed in place."""
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LoRALinear):
                setattr(parent, name, child.fused())
    return network


def _lora(network: nn.Module) -> Iterator[LoRALinear]:
    return (module for module in network.modules() if isinstance(module, LoRALinear))


def _layers(network: nn.Module) -> Iterator[tuple[str, nn.Module, dict[str, tuple[int, int]]]]:
    """Name, parent and parts of every linear layer that is called as one."""
    for name, module in network.named_modules():
        if type(module) not in (Linear, nn.Linear) or not name:
            continue
        parent = network.get_submodule(name.rpartition(".")[0])
        if not isinstance(parent, nn.MultiheadAttention):  # it reads its weights without calling the layers
            yield name, parent, _parts(parent, name.rpartition(".")[2], module.out_features)


def _parts(parent: nn.Module, child: str, width: int) -> dict[str, tuple[int, int]]:
    """Outputs (from, to) of the projections that a layer packs, by name; empty where it does not."""
    if child not in ("qkv", "kv"):
        return {}
    if isinstance(parent, Attention):
        sizes = {name: parent.head_dim * (parent.num_heads if name == "q" else parent.num_kv_heads) for name in child}
    elif child == "qkv" and type(parent).__name__ == "Attention" and width % 3 == 0:  # timm's
        sizes = dict.fromkeys("qkv", width // 3)
    else:
        return {}
    starts = [sum(list(sizes.values())[:i]) for i in range(len(sizes))]
    return {name: (start, start + size) for start, (name, size) in zip(starts, sizes.items(), strict=True)}


def _part_name(name: str, part: str) -> str:
    """`blocks.0.attn.fn.q` of `blocks.0.attn.fn.qkv`."""
    return f"{name.rpartition('.')[0]}.{part}".lstrip(".")
