"""`ssl-lab chat`: questions about pictures, answered by a run of a vision-language model as the words come."""

import sys
import time
from collections.abc import Iterator

from omegaconf import DictConfig

from ssl_lab.cli.partner import partner, require_pictures
from ssl_lab.data.conversation_text import Message

_ASK, _CHANGE = "> ", "/image "


def run(cfg: DictConfig) -> None:
    """Write answers to the terminal as they come; with a prompt one, else one to each line that is typed.

    Raises:
        UserError: no such run, one that does not see and speak, a picture that cannot be read, or a prompt without its
            picture.
    """
    found, sampling = partner(cfg)
    files = [str(file) for file in cfg.image]
    visual = found.see(files)
    marker, messages = found.encode.marker, list[Message]()
    for asked in [str(cfg.prompt)] if cfg.prompt is not None else _lines():
        if asked.startswith(_CHANGE):
            files, messages = [asked.removeprefix(_CHANGE).strip()], []
            visual = found.see(files)
            continue
        if not messages and marker not in asked:
            asked = f"{marker}\n" * len(files) + asked
        require_pictures(asked, marker, 0 if messages else len(files))
        messages.append({"role": "user", "content": asked})
        said, begin, count = "", time.perf_counter(), 0
        for piece in found.answer(messages, visual, max_new_tokens=cfg.max_new_tokens, sampling=sampling):
            print(piece, end="", flush=True)
            said, count = said + piece, count + 1
        print(flush=True)
        seconds = time.perf_counter() - begin
        print(f"{count - 1} tokens, {(count - 1) / seconds:,.1f} tokens/s", file=sys.stderr)
        messages.append({"role": "assistant", "content": said.strip()})


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
