"""Tuning with few parameters: a trained network stays as it is, and a part of it, or something beside it, learns.

What all kinds share stands here; `ssl_lab.nn.lora`, `adapters`, `prefix` and `prompt` hold those that add something.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

from ssl_lab.errors import UserError
from ssl_lab.nn.teacher import follower


@dataclass(kw_only=True)
class Tuning:
    """Called with a method that holds its weights, it freezes the method's networks and lets little of them learn.

    What stands beside the networks, such as a new head, learns as before. A network that follows a tuned one (a
    teacher) becomes a copy of it again.

    Args:
        parts: networks by their path in the method; None = see `networks`.
        also: parameters of these networks that learn too, by pattern: `*.norm.weight`, `blocks.11.*`.
    """

    parts: Sequence[str] | None = None
    also: Sequence[str] = ()

    def __call__(self, method: nn.Module) -> dict[str, str]:
        """Change `method` in place.

        Gives the paths of what keeps its starting weights, each with the path of the network whose parameters say
        which: those that were tuned themselves, for a follower the network that it follows, and frozen neighbours
        inside of the same whole, such as the image encoder beside a tuned decoder.

        Raises:
            UserError: no such part, or a pattern that fits nothing.
        """
        done: dict[str, str] = {}
        paths = networks(method) if self.parts is None else _several(self.parts)
        names = [name for path in paths for name, _ in _part(method, path).named_parameters()]
        for setting in ("also", "learn"):
            require_fit(getattr(self, setting, ()), names, f"tuning.{setting}")
        for path in paths:
            network = _part(method, path)
            twins = [name for name, other in method.named_modules() if _follows(other, network)]
            network.requires_grad_(False)
            for parameter in _named(network, self.also):
                parameter.requires_grad_()
            self.change(network, path)
            done[path] = path
            for name in twins:
                parent, _, child = name.rpartition(".")
                setattr(method.get_submodule(parent), child, follower(network))
                done[name] = path
        for path in list(done):
            if whole := path.rpartition(".")[0]:
                around = [f"{whole}.{name}" for name, _ in method.get_submodule(whole).named_children()]
                done |= {name: name for name in around if name not in done and _frozen(method.get_submodule(name))}
        return done

    def change(self, network: nn.Module, path: str) -> None:
        """Let a part of the frozen `network` learn, in place."""
        raise TypeError(f"{type(self).__name__} must define change(network, path)")


@dataclass(kw_only=True)
class Partial(Tuning):
    """Some of the network's own parameters learn: biases (BitFit, arXiv:2106.10199), norms, the last blocks.

    Args:
        learn: which, by pattern: `*bias`, `*norm*`.
        last_blocks: so many blocks at the end learn whole, and what follows them.
    """

    learn: Sequence[str] = ()
    last_blocks: int = 0

    def change(self, network: nn.Module, path: str) -> None:
        """See `Tuning.change`.

        Raises:
            UserError: more blocks than there are.
        """
        for parameter in _named(network, self.learn):
            parameter.requires_grad_()
        if not self.last_blocks:
            return
        blocks = getattr(network, "blocks", getattr(getattr(network, "decoder", None), "blocks", ()))
        if not 0 < self.last_blocks <= len(blocks):
            raise UserError(f"tuning.last_blocks={self.last_blocks}: {path} has {len(blocks)} blocks of its own")
        for module in (*blocks[-self.last_blocks :], getattr(network, "norm", None)):
            if isinstance(module, nn.Module):
                module.requires_grad_(True)


def networks(method: nn.Module) -> list[str]:
    """Paths of the networks that a method trains: each tower that is not frozen, else its one network.

    Of a language model that sees it is the decoder.

    Raises:
        UserError: there is none.
    """
    towers = getattr(method, "towers", None)
    if isinstance(towers, nn.ModuleDict):
        return [f"towers.{name}.backbone" for name, tower in towers.items() if not getattr(tower, "frozen", False)]
    for name in ("student", "encoder", "decoder", "model"):
        if (network := method._modules.get(name)) is not None:
            return [f"{name}.decoder" if hasattr(network, "vision") else name]
    raise UserError(f"{type(method).__name__} does not say what to tune: set tuning.parts=[<path of a network>]")


def added(network: nn.Module) -> list[str]:
    """What stands beside the layers of a network, such as `low-rank updates`; empty for a plain network."""
    return sorted({kind for module in network.modules() if (kind := getattr(type(module), "beside", None))})


def share(module: nn.Module) -> str:
    """How much of a module learns, in words."""
    whole = sum(p.numel() for p in module.parameters())
    learns = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return f"trains {_millions(learns)} of {_millions(whole)} parameters, {100 * learns / max(1, whole):.2g} %"


def fits(name: str, patterns: Iterable[str]) -> bool:
    """Whether a dotted name, or an end of it that begins after a dot, fits one of the shell patterns."""
    return any(fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}") for pattern in _several(patterns))


def require_fit(patterns: Iterable[str], names: Sequence[str], what: str) -> None:
    """Every pattern must fit one of `names` at least.

    Raises:
        UserError: with the words that the names are made of.
    """
    for pattern in _several(patterns):
        if not any(fits(name, [pattern]) for name in names):
            ends = dict.fromkeys(re.sub(r"\b\d+\b", "*", name).split("blocks.*.")[-1] for name in names)
            there = ", ".join(list(ends)[:24]) or "none"
            raise UserError(f"{what}: nothing fits {pattern!r}; there are {there}")


def _several(words: Iterable[str]) -> list[str]:
    """A single word, typed without brackets, is one of them and not its letters."""
    return [words] if isinstance(words, str) else list(words)


def _named(network: nn.Module, patterns: Sequence[str]) -> list[nn.Parameter]:
    """Parameters that fit."""
    return [parameter for name, parameter in network.named_parameters() if fits(name, patterns)]


def _part(method: nn.Module, path: str) -> nn.Module:
    try:
        return method.get_submodule(path)
    except AttributeError:
        there = ", ".join(name for name, _ in method.named_children())
        raise UserError(f"tuning.parts: {type(method).__name__} has no {path}; its parts: {there}") from None


def _frozen(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    return bool(parameters) and not any(p.requires_grad for p in parameters)


def _follows(other: nn.Module, network: nn.Module) -> bool:
    """A network of the same make and, since nothing has moved yet, the same weights, which takes no gradient."""
    if other is network or type(other) is not type(network) or any(p.requires_grad for p in other.parameters()):
        return False
    here, there = (dict(module.named_parameters()) for module in (network, other))
    if not here or {n: p.shape for n, p in here.items()} != {n: p.shape for n, p in there.items()}:
        return False
    return all(torch.equal(value, there[name]) for name, value in here.items())


def _millions(count: int) -> str:
    return f"{count / 1e6:.3g} M"
