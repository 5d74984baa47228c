"""Kinds of value that a configuration key takes, and whether a value is one of them."""

from dataclasses import dataclass

from ssl_lab.cli.nearest import did_you_mean

Kinds = frozenset[object]  # of "int", "float", "bool", "str", "none", "any", "other" (lists, objects) and Literals

ANY: Kinds = frozenset({"any"})
NONE: Kinds = frozenset({"none"})
WORDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text", "none": "null"}
NAMES = {name: name for name in ("int", "float", "bool", "str")} | {
    **{name: "any" for name in ("Any", "object", "Self", "Enum")},
    **{name: "str" for name in ("Path", "PathLike", "StrPath")},
    **{
        name: "other"
        for name in ("list", "tuple", "dict", "set", "Sequence", "Iterable", "Mapping", "Callable", "type")
    },
}


@dataclass(frozen=True)
class Literal:
    """One value that is taken as it stands."""

    value: object


def named_kind(name: str) -> Kinds | None:
    """Kind of a type that every module knows by this name."""
    return frozenset({NAMES[name]}) if name in NAMES else None


def kind_of(value: object) -> Kinds:
    """Kind of a default value, for keys that have no annotation."""
    match value:
        case bool():
            return frozenset({"bool"})
        case int():
            return frozenset({"int"})
        case float():
            return frozenset({"float"})
        case str():
            return frozenset({"str"})
    return ANY


def misfit(value: object, kinds: Kinds) -> str | None:
    """None when `value` fits, else what is wanted, in words. Objects and lists are judged only against plain kinds."""
    if "any" in kinds or not kinds or _fits(value, kinds):
        return None
    literals = [str(kind.value) for kind in kinds if isinstance(kind, Literal)]
    if literals and isinstance(value, str):
        return f"{did_you_mean(value, literals)}"
    wanted = [WORDS[name] for name in WORDS if name in kinds and not (name == "int" and "float" in kinds)]
    if literals:
        wanted.insert(0, " | ".join(sorted(literals)))
    if "other" in kinds:
        wanted.append("an object with _target_" if isinstance(value, str) else "a list or an object")
    hint = f" ({int(value)})" if isinstance(value, float) and value.is_integer() else ""
    return f"it takes {' or '.join(wanted)}{hint}"


def _fits(value: object, kinds: Kinds) -> bool:
    match value:
        case None:
            return "none" in kinds
        case bool():
            return "bool" in kinds or Literal(value) in kinds
        case int():
            return bool(kinds & {"int", "float"}) or Literal(value) in kinds
        case float():
            return "float" in kinds or Literal(value) in kinds
        case str():
            plain = kinds & {"int", "float", "bool"} or any(isinstance(kind, Literal) for kind in kinds)
            return "str" in kinds or Literal(value) in kinds or ("other" in kinds and not plain)
    return "other" in kinds
