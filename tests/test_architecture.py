"""The house rules that a reader relies on: imports go down, files stay small, methods stay closed."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "ssl_lab"
FILES = sorted(ROOT.rglob("*.py"))
RANKS = {
    **dict.fromkeys(("types", "dist", "schedules", "rng", "errors", "files", "pictures", "spread", "subsets"), 0),
    **dict.fromkeys(("nn", "losses"), 1),
    **dict.fromkeys(("backbones", "weights"), 2),
    **dict.fromkeys(("train", "generation"), 3),
    **dict.fromkeys(("methods", "evals", "data", "analysis"), 4),
    "bench": 5,
    "cli": 6,
}
SIDEWAYS = ("methods", "evals", "data", "analysis")  # these do not know each other
BASE_HOOKS = {"step", "after_step", "param_groups"}


def part(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Parts of ssl_lab that a file imports at run time; imports for annotations alone do not count."""
    found = set()
    tree = ast.parse(path.read_text())
    annotations = {
        id(n)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for n in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in annotations:
            continue
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [a.name for a in node.names] if isinstance(node, ast.Import) else []
        found |= {n.split(".")[1] for n in names if n.startswith("ssl_lab.")}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    me = part(path)
    if me not in RANKS:
        assert me in ("__init__", "__main__"), f"{me}: give the new part a rank here"
        return
    for other in imports(path):
        lazy = (path.name, other) in {("types.py", "nn")}  # Encoded.pooled, inside the method
        assert lazy or RANKS[other] <= RANKS[me], f"{path.name} ({me}) imports upward from {other}"
        assert not (me in SIDEWAYS and other in SIDEWAYS and me != other), f"{me} imports sideways from {other}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_readable(path):
    assert len(path.read_text().splitlines()) <= 400
    assert path.name != "utils.py"
    assert path.read_text().isascii()


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_config_object_below_the_command_line(path):
    if part(path) != "cli":
        assert "omegaconf" not in path.read_text() and "import hydra" not in path.read_text()


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_constructors_take_parts_not_flags(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            assert len(node.args.args) - 1 + len(node.args.kwonlyargs) <= 12, f"line {node.lineno}"


def test_the_base_class_stays_thin():
    assert len((ROOT / "methods/base.py").read_text().splitlines()) <= 150


@pytest.mark.parametrize(
    "path", [p for p in FILES if part(p) == "methods" and p.name != "base.py"], ids=lambda p: p.stem
)
def test_methods_stay_closed(path):
    """A method overrides no Lightning hook, logs nothing and never touches the trainer."""
    import lightning as L

    hooks = {n for n in dir(L.LightningModule) if not n.startswith("_")} - BASE_HOOKS - {"forward"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
            assert node.attr not in ("log", "log_dict", "trainer", "global_step", "current_epoch"), (
                f"line {node.lineno}"
            )
        if isinstance(node, ast.ClassDef) and "Method" in [ast.unparse(b) for b in node.bases]:
            for item in node.body:
                if isinstance(item, ast.FunctionDef):
                    assert item.name not in hooks, f"{node.name} overrides {item.name}"
