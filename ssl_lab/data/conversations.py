"""Conversations about images, as a source that the one data module reads."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssl_lab.data.conversation_text import ConversationEncoder, Message
from ssl_lab.data.source import Samples, Source
from ssl_lab.data.tokenizer import Tokenizer
from ssl_lab.errors import UserError
from ssl_lab.rng import fold

_TRIES = 16  # conversations that are tried for one whose image is unreadable


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A conversation about images, by their rows in a source; `answers` are all that count for its first question.

    `rejected` is a worse answer than the last one; where there is such, `answers` belong to the last question.
    """

    images: tuple[int, ...]
    messages: tuple[Message, ...]
    answers: tuple[str, ...] = ()
    rejected: str | None = None


@dataclass(slots=True)
class Talks:
    """What the views take: `images` of all conversations in order, as in `Samples`, and which each one has.

    Where some were not read, `given` tells of each whether it is among `images`.
    """

    images: Any
    numbers: list[tuple[int, ...]]
    messages: list[tuple[Message, ...]]
    encode: ConversationEncoder
    rejected: list[str | None]
    given: list[bool] | None = None


class Conversations:
    """Conversations about the images of a source; `Samples.data` is a `Talks`.

    One with an unreadable image is replaced by another one as a whole, which depends on its row alone.

    Args:
        images: where images are read from; None = no conversation has one.
        dialogues: the conversations.
        encode: makes tokens of them.
        origin: names them in messages.

    Raises:
        UserError: no conversation, or one without an answer, with a marker in it, or with more or fewer markers than
            images.
    """

    unit = "conversations"

    def __init__(
        self, images: Source | None, dialogues: Sequence[Dialogue], encode: ConversationEncoder, *, origin: str = "data"
    ) -> None:
        self.images, self.dialogues, self.encode = images, dialogues, encode
        self.known: Tensor | None = None
        self.classes: list[str] = []
        self.sampling_rate: int | None = getattr(images, "sampling_rate", None)  # of a source of sound
        if not dialogues:
            raise UserError(f"{origin} holds no conversation")
        for row, one in enumerate(dialogues):
            answers = [message["content"] for message in one.messages if message["role"] == "assistant"]
            if not answers:
                raise UserError(f"{origin} row {row} has no answer of the assistant to learn: mend or remove the row")
            if any(encode.marker in answer for answer in (*answers, one.rejected or "")):
                raise UserError(f"{origin} row {row}: an answer contains {encode.marker}, which nobody can say")
            marks = sum(message["content"].count(encode.marker) for message in one.messages)
            if marks != len(one.images):
                raise UserError(
                    f"{origin} row {row}: {encode.marker} stands {marks} times in the conversation, which has "
                    f"{len(one.images)} images: write it once for each image"
                )

    @property
    def tokenizer(self) -> Tokenizer:
        """Of all that is said."""
        return self.encode.tokenizer

    def __len__(self) -> int:
        return len(self.dialogues)

    def without(self, known: Callable[[int], Tensor]) -> "Conversations":
        """The same, but images are neither read nor decoded once their reader knows them.

        Args:
            known: given how many images there are, (N,) bool: which of them; looked at anew in every `read`.
        """
        other = copy.copy(self)
        other.known = None if self.images is None else known(len(self.images))
        return other

    @property
    def paired(self) -> bool:
        """Whether each conversation has a worse answer beside its last one."""
        return all(one.rejected is not None for one in self.dialogues)

    def question(self, row: int) -> tuple[str, tuple[str, ...]]:
        """The question that is scored first, without markers, and all answers that count as right."""
        one = self.dialogues[row]
        messages = one.messages if one.rejected is None else one.messages[::-1]
        asked = next((message["content"] for message in messages if message["role"] == "user"), "")
        said = next((message["content"] for message in messages if message["role"] == "assistant"), "")
        return asked.replace(self.encode.marker, "").strip(), one.answers or (said,)

    def read(self, rows: Sequence[int]) -> Samples:
        """Conversations with their images; there are no classes."""
        used = list(rows)
        for attempt in range(_TRIES):
            found, bad, given = self._images(used)
            if not bad:
                break
            used = [fold(row, attempt) % len(self) if row in bad else row for row in used]
        else:
            raise UserError("no conversation was found whose images can be read: check the paths of the images")
        chosen = [self.dialogues[row] for row in used]
        talks = Talks(
            found,
            [one.images for one in chosen],
            [one.messages for one in chosen],
            self.encode,
            [one.rejected for one in chosen],
            given,
        )
        return Samples(talks, torch.full((len(used),), -1), torch.tensor(used, dtype=torch.int64))

    def _images(self, rows: Sequence[int]) -> tuple[Any, set[int], list[bool] | None]:
        """Images of these conversations in order, the conversations of which one is unreadable, and `Talks.given`."""
        pairs = [(row, image) for row in rows for image in self.dialogues[row].images]
        given = None if self.known is None else [not self.known[image] for _, image in pairs]
        wanted = pairs if given is None else [pair for pair, new in zip(pairs, given, strict=True) if new]
        if not wanted:
            return torch.empty(0, 3, 1, 1, dtype=torch.uint8), set(), given
        assert self.images is not None
        samples = self.images.read([image for _, image in wanted])
        good = (samples.rows == torch.tensor([image for _, image in wanted])).tolist()
        return samples.data, {row for (row, _), fine in zip(wanted, good, strict=True) if not fine}, given


def image_rows(counts: Sequence[int]) -> Tensor:
    """(N,) int64: the conversation that each image belongs to."""
    return torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(list(counts), dtype=torch.int64))
