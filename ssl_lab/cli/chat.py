"""`ssl-lab chat`: questions about pictures, answered by a run of a vision-language model as the words come."""

import sys
import time
from collections.abc import Iterator

from omegaconf import DictConfig

from ssl_lab.cli.partner import Conversation, conversation
from ssl_lab.errors import UserError

_ASK, _CHANGE = "> ", "/image "


def run(cfg: DictConfig) -> None:
    """Write answers to the terminal as they come; with a prompt one, else one to each line that is typed.

    Raises:
        UserError: no such run, one that does not see and speak, a picture that cannot be read, or a prompt without its
            picture.
    """
    talk = conversation(cfg)
    talk.show([str(file) for file in cfg.image])
    if cfg.prompt is not None:
        _answer(talk, str(cfg.prompt))
        return
    for asked in _lines():
        try:
            if asked.startswith(_CHANGE):
                talk.show([asked.removeprefix(_CHANGE).strip()])
            else:
                _answer(talk, asked)
        except UserError as mistake:  # the next line may be a better one
            print(f"ssl-lab: {mistake}", file=sys.stderr)


def _answer(talk: Conversation, asked: str) -> None:
    begin, count = time.perf_counter(), 0
    for piece in talk.ask(asked):
        print(piece, end="", flush=True)
        count += 1
    print(flush=True)
    seconds = time.perf_counter() - begin
    print(f"{count - 1} tokens, {(count - 1) / seconds:,.1f} tokens/s", file=sys.stderr)


def _lines() -> Iterator[str]:
    """What is typed, until an empty line or the end."""
    print(f"ask about the picture; {_CHANGE}FILE shows another one, an empty line ends", file=sys.stderr)
    while True:
        try:
            line = input(_ASK if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if not line:
            return
        yield line
