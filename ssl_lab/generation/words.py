"""Text out of tokens that come one by one."""

from collections.abc import Sequence
from typing import Protocol

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what decoders give for bytes that are no complete character


class Decodes(Protocol):
    """A tokenizer, as far as it makes text."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids."""
        ...


class Words:
    """Gives text as soon as it is final: only complete UTF-8 characters, spaces as in the whole text.

    A few tokens before the new ones are decoded with them, since some tokenizers treat the first token of a text in
    a special way; the work for a token does not grow with the text.

    Args:
        tokenizer: makes text of ids.
        before: tokens of the prompt that the text goes on from.
    """

    def __init__(self, tokenizer: Decodes, before: Sequence[int] = ()) -> None:
        self.tokenizer, self.ids = tokenizer, list(before)
        self.told = len(self.ids)  # tokens whose text has been given
        self.first = max(0, self.told - 4)  # from here on they are decoded

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character lacks bytes."""
        self.ids.append(token)
        return self._new(final=False)

    def rest(self) -> str:
        """What is left when no more tokens come."""
        return self._new(final=True)

    def _new(self, *, final: bool) -> str:
        old = self.tokenizer.decode(self.ids[self.first : self.told])
        text = self.tokenizer.decode(self.ids[self.first :])
        if not final and text.endswith(UNFINISHED):
            return ""
        if len(text) <= len(old):
            return ""
        self.first, self.told = self.told, len(self.ids)
        return text[len(old) :]
