"""Conversations as tokens: the template of the tokenizer, and labels for what the assistant says, and no more."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ssl_lab.data.conversation_tokenizer import TEMPLATES, marker_of
from ssl_lab.data.text_pad import IGNORE
from ssl_lab.data.tokenizer import Tokenizer, as_tokenizer
from ssl_lab.errors import UserError
from ssl_lab.generation.prompts import chat

log = logging.getLogger(__name__)


Message = dict[str, str]  # one turn: `role` is system, user or assistant, `content` what is said


@dataclass(frozen=True, slots=True)
class Encoded:
    """A conversation: `tokens`, the id that follows each where it is scored (`labels`, else -100), and images in it."""

    tokens: list[int]
    labels: list[int]
    images: int


class ConversationEncoder:
    """Messages -> token ids and labels.

    Every stretch between an assistant's first and last word is tokenized by itself, as it is when the model speaks: the
    tokens of prompts and answers never merge. The answer is scored, and the token that ends it (the first special token
    behind it in the template, or all that the template writes there if none is special).

    Args:
        tokenizer: with a marker for images, see `with_marker`; or its path.
        max_length: tokens of a conversation, a marker counted as one; longer ones lose their end.
        template: a Jinja text or `plain` instead of the tokenizer's own.
        system: what is said to the model beforehand where the conversation itself does not; None = as the template has
            it, many of which then bring a text of their own.

    Attributes:
        image: id of the marker.
        end: id that ends an answer.
        cut: conversations that were too long so far, in this process.

    Raises:
        UserError: no marker, no template, or a template whose text for a part of a conversation is not the beginning of
            its text for the whole.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | str,
        *,
        max_length: int = 512,
        template: str | None = None,
        system: str | None = None,
    ) -> None:
        self.tokenizer = as_tokenizer(tokenizer)
        self.image = marker_of(self.tokenizer)
        self.marker = str(self.tokenizer.backend.id_to_token(self.image))
        if max_length < 2:
            raise UserError(f"max_length={max_length}: a conversation has at least 2 tokens")
        self.max_length, self.system, self.cut = max_length, system, 0
        chosen = {} if template is None else {"chat_template": TEMPLATES.get(template, template)}
        self._config = self.tokenizer.config | chosen
        self.end: int = self([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]).labels[-1]
        self.cut = 0

    @property
    def settings(self) -> dict[str, Any]:
        """What stands in the tokenizer_config.json of the tokenizer, with the template that was chosen."""
        return dict(self._config)

    def __call__(self, messages: Sequence[Message]) -> Encoded:
        """Of a whole conversation.

        Raises:
            UserError: see above; or an image in an answer.
        """
        pieces = self._pieces(self._told(messages))
        ids, scored = list[int](), list[bool]()
        for tokens, counts in zip(self.tokenizer.encode_batch([text for text, _ in pieces]), pieces, strict=True):
            ids += tokens
            scored += [counts[1]] * len(tokens)
        last = len(scored) - scored[::-1].index(True)  # what the template writes behind the last answer is of no use
        ids, scored = ids[:last], scored[:last]
        labels = [new if counts else IGNORE for new, counts in zip(ids[1:], scored[1:], strict=True)]
        if self.image in labels:
            raise UserError(f"an answer contains {self.marker}, which nobody can say: take it out of the data")
        if len(labels) > self.max_length:
            if not self.cut:
                log.warning(
                    "a conversation has %d tokens and loses what is beyond max_length=%d", len(ids), self.max_length
                )
            self.cut += 1
        tokens, labels = ids[:-1][: self.max_length], labels[: self.max_length]
        return Encoded(tokens, labels, tokens.count(self.image))

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids up to where the answer to the last message begins."""
        told = self._told(messages)
        spoken = [i for i, message in enumerate(told) if message["role"] == "assistant"]
        done = spoken[-1] + 1 if spoken else 0
        pieces = self._pieces(told[:done]) if done else []
        before = "".join(text for text, _ in pieces)
        whole = chat(told, self._config, answer=True)
        pieces = [*pieces, (self._after(before, whole), False)]
        return [token for ids in self.tokenizer.encode_batch([text for text, _ in pieces]) for token in ids]

    def _told(self, messages: Sequence[Message]) -> list[Message]:
        if self.system is None or (messages and messages[0]["role"] == "system"):
            return list(messages)
        return [{"role": "system", "content": self.system}, *messages]

    def _pieces(self, messages: list[Message]) -> list[tuple[str, bool]]:
        """The text of a conversation in stretches, and whether each is scored."""
        pieces = list[tuple[str, bool]]()
        done = ""
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            asked = chat(messages[:i], self._config, answer=True)
            whole = chat(messages[: i + 1], self._config, answer=False)
            pieces.append((self._after(done, asked), False))
            said, rest = self._split(self._after(asked, whole), message["content"])
            pieces += [(said, True), (rest, False)]
            done = whole
        if not done:
            raise UserError("a conversation without an answer teaches nothing: check its roles")
        return [piece for piece in pieces if piece[0]]

    def _split(self, text: str, content: str) -> tuple[str, str]:
        """An answer with the token that ends it, and what the template writes behind that."""
        known = next((x for x in (content, content.strip()) if text.startswith(x)), None)
        if known is None:
            raise UserError("the chat template changes what the assistant says: give template=plain, or another one")
        special, length = set(self.tokenizer.special), len(text)
        for ids, (start, end) in zip(*self._spans(text[len(known) :]), strict=True):
            if ids in special and end > start:
                length = len(known) + end
                break
        return text[:length], text[length:]

    def _spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        return self.tokenizer.encode_spans([text])[0]

    def _after(self, begin: str, whole: str) -> str:
        if not whole.startswith(begin):
            raise UserError(
                "the chat template writes a conversation differently once it goes on, so that its answers cannot be "
                "told apart: give template=plain, or another one"
            )
        return whole[len(begin) :]
