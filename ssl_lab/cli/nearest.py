"""Which valid name a mistyped one may have meant."""

import difflib
from collections.abc import Iterable


def nearest(word: str, options: Iterable[str], count: int = 3) -> list[str]:
    """Up to `count` options that look like `word`, best first."""
    options = list(dict.fromkeys(options))
    close = difflib.get_close_matches(word, options, count, cutoff=0.6)
    inside = [o for o in options if len(word) > 2 and (word in o or (len(o) > 2 and o in word)) and o not in close]
    return [*close, *inside][:count]


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """The end of a message: the nearest options, or all of them when none is near."""
    options = list(options)
    if close := nearest(word, options):
        return f"did you mean {' or '.join(close)}?"
    if not options:
        return "there is nothing to choose from"
    shown = ", ".join(options[:30])
    return f"there are {shown}{' ...' if len(options) > 30 else ''}"
