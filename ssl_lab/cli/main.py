"""`ssl-lab <verb> [overrides]`: read the command line, compose the configuration, call the verb.

Nothing here imports torch: help, lists and mistakes are answered at once. Exit codes: 0 done, 1 failed, 2 the user's
mistake, 130 interrupted.
"""

import argparse
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from ssl_lab.cli import catalog
from ssl_lab.cli.usage import help_text, verb_of
from ssl_lab.errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

FLAGS = ["--help", "--version", "--multirun", "--config-dir", "--cfg"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: this process's own) and return its exit code."""
    try:
        return _dispatch(sys.argv[1:] if argv is None else list(argv))
    except UserError as error:
        print(f"ssl-lab: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ssl-lab: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader went away: `ssl-lab list | head`
        sys.stderr.close()
        return 0


def _dispatch(argv: list[str]) -> int:
    args = _parse(argv)
    folders = [catalog.conf_folder(), *([] if args.config_dir is None else [_user_folder(args.config_dir)])]
    verb, words = verb_of(args.words, folders)
    if verb == "bench" and any(word.startswith("suite=") for word in words):
        verb, words = "bench_suite", [re.sub("^suite=", "name=", word) for word in words]
    if args.version:
        from ssl_lab import __version__

        print(f"ssl-lab {__version__}")
    elif args.help or not argv:
        print(help_text(verb, folders))
    elif verb == "list":
        from ssl_lab.cli.list import run

        run(words, folders)
    else:
        return _configured(verb or "train", words, folders, args)
    return 0


def _configured(verb: str, overrides: list[str], folders: list[Path], args: argparse.Namespace) -> int:
    """A verb that has a configuration: print it, sweep over it, or run with it."""
    from ssl_lab.cli.compose import compose

    if args.multirun:
        if args.cfg is not None:
            raise UserError("--cfg job prints the configuration of one run: leave out -m, and give each key one value")
        from ssl_lab.cli.sweep import sweep

        return sweep(verb, overrides, folders)
    for word in overrides:
        if re.match(r"(launcher|sweeper)[=.]", word):
            raise UserError(f"{word} is for several runs: add -m, or leave it out")
    cfg = compose(verb, overrides, folders)
    if args.cfg is not None:
        from omegaconf import OmegaConf

        print(OmegaConf.to_yaml(cfg), end="")
        return 0
    return performed(verb, cfg)


def performed(verb: str, cfg: "DictConfig") -> int:
    """Run the body of a verb; gives its exit code, after the traceback of what it did not expect."""
    from ssl_lab.cli.allocator import keep_memory
    from ssl_lab.cli.compose import perform

    keep_memory()
    if cfg.get("trust"):  # code of one's own lies where `--config-dir` found it in training
        sys.path.append(str(Path.cwd()))
    try:
        perform(verb, cfg)
    except SystemExit as leaving:
        if isinstance(leaving.__context__, KeyboardInterrupt):  # Lightning saved what it could, then asked to leave
            return 130
        raise
    except (UserError, BrokenPipeError):
        raise
    except Exception:
        traceback.print_exc()
        where = f"; what was written is in {cfg.out}" if cfg.get("out") else ""
        print(f"ssl-lab: {verb} failed, see the traceback above{where}", file=sys.stderr)
        return 1
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; flags are {', '.join(FLAGS)}, everything else is key=value")


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = _Parser(prog="ssl-lab", add_help=False, allow_abbrev=False)
    parser.add_argument("words", nargs="*")
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--version", action="store_true")
    parser.add_argument("-m", "--multirun", action="store_true")
    parser.add_argument("--config-dir", type=Path)
    parser.add_argument("--cfg", choices=["job"])
    return parser.parse_intermixed_args(argv)


def _user_folder(folder: Path) -> Path:
    """The user's own YAML files. Code they name is looked for in the working directory too."""
    if not folder.is_dir():
        raise UserError(f"--config-dir {folder}: there is no such folder")
    shipped = catalog.conf_folder()
    for file in sorted(folder.rglob("*.yaml")):
        if (shipped / file.relative_to(folder)).is_file():
            raise UserError(f"{file} has the name of a file that ssl-lab ships and would be ignored: rename it")
    sys.path.append(str(Path.cwd()))
    return folder.resolve()
