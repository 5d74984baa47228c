"""Two-way renaming of state dicts: one table serves import, export and the test of both."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ssl_lab.errors import UserError

State = dict[str, Tensor]


@dataclass(frozen=True)
class Fuse:
    """Several of their tensors are one of ours, stacked on dim 0: q, k and v.

    `shares` are the relative sizes of the parts, (H, Hkv, Hkv) under grouped-query attention; equal by default.
    """

    ours: str
    theirs: tuple[str, ...]
    shares: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Transposed:
    """A matrix that they hold as (in, out): GPT-2's Conv1D."""

    ours: str
    theirs: str


@dataclass(frozen=True)
class Drop:
    """A tensor of theirs that we knowingly leave behind: a classification head, a pooler."""

    theirs: str


Row = tuple[str, str] | Fuse | Transposed | Drop
Table = Sequence[Row]


def rename(state: Mapping[str, Tensor], table: Table, *, back: bool = False) -> State:
    """Their names to ours, or ours to theirs with `back`; tensors are not copied unless they are fused.

    In a pattern `#` stands for a layer number and `*` for the rest of the name (at most one each). Every key must match
    exactly one row, so that nothing is lost silently.

    Raises:
        UserError: a key that no row, or more than one row, knows; two keys with one new name; an incomplete fusion.
    """
    out: State = {}
    parts: dict[str, dict[int, Tensor]] = {}
    rules = _backward(table) if back else _forward(table)
    for key, value in state.items():
        found = [(rule, match) for rule in rules if (match := rule.source.fullmatch(key))]
        if len(found) != 1:
            raise UserError(_unmatched(key, len(found), state, rules))
        rule, match = found[0]
        names = [_fill(target, match) for target in rule.targets]
        if rule.transpose:
            value = value.t()
        if rule.part is not None:
            parts.setdefault(names[0], {})[rule.part] = value
            continue
        for name, piece in zip(names, _split(key, value, rule.shares), strict=True):
            if name in out:
                raise UserError(
                    f"weights: two tensors would be called {name!r}; the table is wrong for this checkpoint"
                )
            out[name] = piece
    for name, pieces in parts.items():
        wanted = next(r.of for r in rules if r.part is not None and _regex(r.targets[0]).fullmatch(name))
        if len(pieces) != wanted or name in out:
            raise UserError(f"weights: {name!r} needs {wanted} tensors but only {len(pieces)} are there")
        out[name] = torch.cat([pieces[i] for i in range(wanted)])
    return out


def prefixed(table: Table, ours: str, theirs: str) -> list[Row]:
    """The same table for a part that lives under `ours` in our model and under `theirs` in theirs."""

    def lift(row: Row) -> Row:
        if isinstance(row, Drop):
            return Drop(theirs + row.theirs)
        if isinstance(row, Fuse):
            return Fuse(ours + row.ours, tuple(theirs + name for name in row.theirs), row.shares)
        if isinstance(row, Transposed):
            return Transposed(ours + row.ours, theirs + row.theirs)
        return ours + row[0], theirs + row[1]

    return [lift(row) for row in table]


@dataclass(frozen=True)
class _Rule:
    source: re.Pattern[str]
    targets: tuple[str, ...]  # empty = drop; several = split
    part: int | None = None  # this source is part number `part`
    of: int = 1  # of so many
    shares: tuple[int, ...] = (1,)  # relative sizes of the pieces that go to the targets
    transpose: bool = False


def _forward(table: Table) -> list[_Rule]:
    rules = []
    for row in table:
        if isinstance(row, Drop):
            rules.append(_Rule(_regex(row.theirs), (), shares=()))
        elif isinstance(row, Fuse):
            count = len(row.theirs)
            rules += [_Rule(_regex(name), (row.ours,), i, count) for i, name in enumerate(row.theirs)]
        elif isinstance(row, Transposed):
            rules.append(_Rule(_regex(row.theirs), (row.ours,), transpose=True))
        else:
            rules.append(_Rule(_regex(row[1]), (row[0],)))
    return rules


def _backward(table: Table) -> list[_Rule]:
    rules = []
    for row in table:
        if isinstance(row, Fuse):
            shares = row.shares or (1,) * len(row.theirs)
            rules.append(_Rule(_regex(row.ours), row.theirs, shares=shares))
        elif isinstance(row, Transposed):
            rules.append(_Rule(_regex(row.ours), (row.theirs,), transpose=True))
        elif not isinstance(row, Drop):
            rules.append(_Rule(_regex(row[0]), (row[1],)))
    return rules


def _regex(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\#", r"(?P<layer>\d+)").replace(r"\*", r"(?P<tail>.+)"))


def _fill(target: str, match: re.Match[str]) -> str:
    for mark, value in (("#", "layer"), ("*", "tail")):
        if mark in target:
            target = target.replace(mark, match[value])
    return target


def _split(key: str, value: Tensor, shares: Sequence[int]) -> Sequence[Tensor]:
    if len(shares) <= 1:
        return [value] * len(shares)
    rows, whole = value.shape[0], sum(shares)
    if rows % whole:
        equal = f"{whole} equal parts" if whole == len(shares) else f"parts in proportion {':'.join(map(str, shares))}"
        raise UserError(f"weights: {key!r} has {rows} rows, which do not split into {equal}")
    return value.split([rows // whole * share for share in shares])


def _unmatched(key: str, rows: int, state: Mapping[str, Tensor], rules: list[_Rule]) -> str:
    if rows:
        return f"weights: {key!r} matches {rows} rows of the table; it must match one"
    others = sum(not any(rule.source.fullmatch(k) for rule in rules) for k in state) - 1
    more = f" (and {others} more)" if others else ""
    return f"weights: {key!r}{more} has no place in this architecture; is it another kind of model?"
