"""Which arguments a `_target_` takes, read from its source text.

A mistyped key or value is thus found without importing the target, so in milliseconds and before torch is loaded.
What the text does not settle is left to the call itself.
"""

import ast
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ssl_lab.cli.kinds import ANY, NONE, Kinds, Literal, named_kind

Definition = ast.ClassDef | ast.FunctionDef | ast.Assign | ast.AnnAssign


@dataclass(frozen=True)
class Module:
    """A parsed source file; `package` is what its relative imports start from."""

    package: str
    tree: ast.Module


@dataclass(frozen=True)
class Signature:
    """Arguments with the kinds of value they take; `open` when any other keyword is taken too."""

    arguments: dict[str, Kinds]
    open: bool


@cache
def signature_of(target: str) -> Signature | None:
    """Signature of a dotted path to a class or function; None when the source does not tell."""
    found = _locate(target)
    return None if found is None else _signature(*found)


@cache
def exists(target: str) -> bool:
    """False when the module of `target` is missing, or lacks the name and gives no way to make it."""
    module, names = _split(target)
    if module is None:
        return False
    return bool(not names or {names[0], "__getattr__", "*"} & names_of(module))


def names_of(module: Module) -> set[str]:
    """Names that the top level of a module defines or imports."""
    names: set[str] = set()
    for node in _statements(module.tree.body):
        match node:
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name):
                names.add(name)
            case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
                names.update(alias.asname or alias.name.partition(".")[0] for alias in aliases)
            case ast.Assign(targets=targets):
                names.update(t.id for t in targets if isinstance(t, ast.Name))
            case ast.AnnAssign(target=ast.Name(id=name)):
                names.add(name)
    return names


def _locate(target: str) -> tuple[Module, ast.stmt] | None:
    module, names = _split(target)
    if module is None or not names:
        return None
    found = _find(module, names[0])
    for name in names[1:]:  # a class method
        if found is None or not isinstance(found[1], ast.ClassDef):
            return None
        found = next(((found[0], n) for n in found[1].body if isinstance(n, ast.FunctionDef) and n.name == name), None)
    return found


def _split(target: str) -> tuple[Module | None, list[str]]:
    """The longest leading part of `target` that is a module, and the names after it."""
    parts = target.split(".")
    for end in range(len(parts) - 1, 0, -1):
        if (module := _module(".".join(parts[:end]))) is not None:
            return module, parts[end:]
    return None, parts


@cache
def _module(name: str) -> Module | None:
    top, *rest = name.split(".")
    try:
        spec = importlib.util.find_spec(top)  # a top-level name: nothing is imported
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    files = [Path(spec.origin)] if spec.origin else []
    if rest:
        bases = [Path(folder, *rest) for folder in spec.submodule_search_locations or ()]
        files = [f for base in bases for f in (base / "__init__.py", base.parent / f"{base.name}.py")]
    for file in files:
        if file.suffix == ".py" and file.is_file():
            try:
                tree = ast.parse(file.read_text(encoding="utf-8"))
            except (SyntaxError, UnicodeDecodeError):
                return None
            return Module(name if file.name == "__init__.py" else name.rpartition(".")[0], tree)
    return None


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a module, last first (the last definition of a name holds), into `if` and `try`."""
    for node in reversed(body):
        if isinstance(node, ast.If | ast.Try):
            yield from _statements([*node.body, *node.orelse])
        else:
            yield node


def _find(module: Module, name: str, depth: int = 0) -> tuple[Module, Definition] | None:
    """Where `name`, as seen in `module`, is defined; imports are followed, but not into the standard library."""
    if depth > 8:
        return None
    stars: list[ast.ImportFrom] = []
    for node in _statements(module.tree.body):
        match node:
            case ast.ClassDef() | ast.FunctionDef() if node.name == name:
                return module, node
            case ast.Assign(targets=[ast.Name(id=found)]) | ast.AnnAssign(target=ast.Name(id=found)) if found == name:
                return module, node
            case ast.ImportFrom(names=[ast.alias(name="*")]):
                stars.append(node)
            case ast.ImportFrom(names=aliases):
                original = next((alias.name for alias in aliases if (alias.asname or alias.name) == name), None)
                if original is not None:
                    source = _imported(module, node)
                    return None if source is None else _find(source, original, depth + 1)
    sources = (_imported(module, node) for node in stars)
    found_in = (_find(source, name, depth + 1) for source in sources if source is not None)
    return next((place for place in found_in if place is not None), None)


def _imported(module: Module, node: ast.ImportFrom) -> Module | None:
    if node.level == 0:
        name = node.module or ""
        return None if name.partition(".")[0] in sys.stdlib_module_names else _module(name)
    parts = module.package.split(".")
    parts = parts[: len(parts) - node.level + 1]
    return _module(".".join([*parts, *([node.module] if node.module else [])]))


def _signature(module: Module, node: ast.stmt, depth: int = 0) -> Signature | None:
    if depth > 8:
        return None
    match node:
        case ast.FunctionDef(decorator_list=decorators):
            bound = any(isinstance(d, ast.Name) and d.id == "classmethod" for d in decorators)
            return _of_function(module, node, skip=int(bound))
        case ast.ClassDef():
            return _of_class(module, node, depth)
        case ast.Assign(value=ast.Name(id=name)) if (found := _find(module, name)) is not None:
            return _signature(*found, depth + 1)
    return None


def _of_function(module: Module, node: ast.FunctionDef, skip: int) -> Signature:
    args = node.args
    positional = [*args.posonlyargs, *args.args]
    defaults = [None] * (len(positional) - len(args.defaults)) + args.defaults
    pairs = [*list(zip(positional, defaults, strict=True))[skip:], *zip(args.kwonlyargs, args.kw_defaults, strict=True)]
    kinds = {arg.arg: _kinds(module, arg.annotation) | _default_kind(default) for arg, default in pairs}
    return Signature(kinds, open=args.kwarg is not None)


def _of_class(module: Module, node: ast.ClassDef, depth: int) -> Signature | None:
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            return _of_function(module, item, skip=1)
    bases = [found for base in node.bases if (found := _find(module, _last(base))) is not None]
    inherited = [s for found in bases if (s := _signature(*found, depth + 1)) is not None]
    if not any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        return inherited[0] if inherited else None
    fields: dict[str, Kinds] = {}
    for signature in reversed(inherited):
        fields |= signature.arguments
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            words = ast.unparse(item)
            if "ClassVar" not in words and "init=False" not in words:
                fields[item.target.id] = _kinds(module, item.annotation) | _default_kind(item.value)
    return Signature(fields, open=False)


def _default_kind(default: ast.expr | None) -> Kinds:
    return NONE if isinstance(default, ast.Constant) and default.value is None else frozenset()


def _last(node: ast.expr) -> str:
    """`Union` of `typing.Union`, `Base` of `Base[T]`."""
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
        case ast.Subscript(value=value):
            return _last(value)
    return ""


def _kinds(module: Module, node: ast.expr | None, depth: int = 0) -> Kinds:
    """Kinds of value that an annotation admits; ANY when the text does not tell."""
    if depth > 8:
        return ANY
    match node:
        case ast.Constant(value=None):
            return NONE
        case ast.Constant(value=str(text)):
            return _kinds(module, ast.parse(text, mode="eval").body, depth + 1)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _kinds(module, left, depth + 1) | _kinds(module, right, depth + 1)
        case ast.Subscript(value=value, slice=inner):
            parts = inner.elts if isinstance(inner, ast.Tuple) else [inner]
            match _last(value):
                case "Optional" | "Union" as name:
                    union = frozenset[object]().union(*(_kinds(module, part, depth + 1) for part in parts))
                    return union | NONE if name == "Optional" else union
                case "Annotated" | "Final":
                    return _kinds(module, parts[0], depth + 1)
                case "Literal":
                    return frozenset(Literal(p.value) for p in parts if isinstance(p, ast.Constant))
            return named_kind(_last(value)) or frozenset({"other"})
        case ast.Name() | ast.Attribute():
            return named_kind(_last(node)) or _alias(module, _last(node), depth)
    return ANY


def _alias(module: Module, name: str, depth: int) -> Kinds:
    """Kinds of a name that the module defines or imports: an alias of an annotation, or a class."""
    match _find(module, name):
        case (source, ast.Assign(value=value) | ast.AnnAssign(value=ast.expr() as value)):
            return _kinds(source, value, depth + 1)
        case (_, ast.ClassDef(bases=bases)):
            plain = any(_last(base) in ("str", "int", "float", "Enum", "StrEnum", "IntEnum") for base in bases)
            return ANY if plain else frozenset({"other"})
    return ANY
