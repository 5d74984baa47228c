"""`ssl-lab list`: what there is to choose from, read from the head comments of conf/."""

from pathlib import Path

from rich.console import Console
from rich.text import Text

from ssl_lab.cli import catalog
from ssl_lab.cli.nearest import did_you_mean
from ssl_lab.cli.screen import screen
from ssl_lab.errors import UserError

GROUPS = {"method": "Methods", "backbone": "Backbones", "data": "Data sets", "eval": "Evaluators", "suite": "Suites"}


def run(words: list[str], folders: list[Path]) -> None:
    """Print experiments (those that mention every one of `words`), then the choices of the main groups."""
    found = catalog.experiments(folders)
    chosen = [e for e in found if all(w.lower() in f"{e.name} {e.summary} {e.fields}".lower() for w in words)]
    if not chosen and words:
        raise UserError(f"no experiment mentions {' '.join(words)}; {did_you_mean(words[0], [e.name for e in found])}")
    console = screen()
    console.print(Text("Experiments", style="bold"), Text("  ssl-lab experiment=NAME", style="dim"))
    for experiment in chosen:
        console.print(Text(f"  {experiment.name}", style="cyan"), Text(f"  {experiment.summary}"), soft_wrap=True)
        for field, text in experiment.fields.items():
            console.print(Text(f"    {field:<10}", style="dim"), Text(text), soft_wrap=True)
    if not words:
        for group, title in GROUPS.items():
            _print_choices(console, group, title, folders)


def _print_choices(console: Console, group: str, title: str, folders: list[Path]) -> None:
    console.print()
    console.print(Text(title, style="bold"), Text(f"  {group}=NAME", style="dim"))
    names = catalog.choices(group, folders)
    width = max((len(name) for name in names), default=0)
    for name in names:
        file = next(f for base in folders if (f := base / group / f"{name}.yaml").is_file())
        lines = catalog.head(file)
        console.print(Text(f"  {name:<{width}}", style="cyan"), Text(f"  {lines[0]}" if lines else ""), soft_wrap=True)
