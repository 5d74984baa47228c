"""Targets and names of classes, from a column of a table."""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ssl_lab.errors import UserError

if TYPE_CHECKING:
    import datasets

log = logging.getLogger(__name__)

_NAMES = ("label", "labels", "target", "class")
_KINDS = ("int", "uint", "bool", "float", "string", "large_string", "null")
_MOST = 1 << 24  # classes; a larger number is that of something else


class _NoClasses(UserError):
    pass


def labels_of(
    rows: "datasets.Dataset",
    given: str | None,
    values: Callable[[str], list[Any]],
    names: list[str] | None,
    origin: str,
) -> tuple[Tensor, list[str]]:
    """Targets (N,) int64, -1 = unlabelled, and the names of the classes.

    Classes are words or whole numbers; a negative number is no label. A column that is found by its type or name and
    holds something else is passed over, with a warning.

    Args:
        rows: of the table.
        given: the column; None = found, if there is one.
        values: what a column holds over all splits.
        names: of the classes, where the table states them.
        origin: of the rows, for messages.

    Raises:
        UserError: the given column holds no classes, or a column holds more of them than there are names.
    """
    from datasets import ClassLabel

    typed = [x for x, feature in rows.features.items() if isinstance(feature, ClassLabel)]
    for label in [given] if given else dict.fromkeys(x for x in (*typed, *_NAMES) if x in rows.features):
        try:
            return _labels(rows, label, values, names, f"{origin}: column {label!r}")
        except _NoClasses as error:
            if given:
                raise
            log.warning("%s; it is passed over", error)
    return torch.full((len(rows),), -1), []


def kind_of(rows: "datasets.Dataset", column: str) -> str:
    """What a column holds, in words for a message."""
    kind = str(rows.features.arrow_schema.field(column).type)
    return kind if len(kind) <= 60 else f"{kind[:57]}..."


def _labels(
    rows: "datasets.Dataset", label: str, values: Callable[[str], list[Any]], names: list[str] | None, where: str
) -> tuple[Tensor, list[str]]:
    from datasets import ClassLabel, Value

    feature = rows.features[label]
    if not isinstance(feature, ClassLabel) and not (isinstance(feature, Value) and feature.dtype.startswith(_KINDS)):
        raise _NoClasses(f"{where} holds {kind_of(rows, label)}, where classes are words or whole numbers")
    column = _plain(rows.with_format("arrow")[:][label].to_pylist())
    known = set(_plain(values(label))) - {None}
    if known and all(isinstance(x, str) for x in known):
        names = sorted(known)
        number = {x: i for i, x in enumerate(names)}
        return torch.tensor([-1 if x is None else number[x] for x in column]), names
    if wrong := [x for x in known if not isinstance(x, int)]:
        raise _NoClasses(f"{where} holds {wrong[0]!r:.60}, where classes are all words or all whole numbers")
    most = max(known, default=-1)
    names = names or getattr(feature, "names", None)
    if names and most >= len(names):
        raise UserError(f"{where} holds class {most}, but only {len(names)} classes are named")
    if most >= _MOST:
        raise _NoClasses(f"{where} holds {most}, which is no number of a class")
    targets = torch.tensor([-1 if x is None else max(x, -1) for x in column])
    return targets, list(names or map(str, range(most + 1)))


def _plain(values: list[Any]) -> list[Any]:
    """Booleans, and numbers that pandas made fractions of beside an empty cell, as whole numbers."""
    return [
        None if x != x else int(x) if isinstance(x, bool) or (isinstance(x, float) and x.is_integer()) else x
        for x in values
    ]
