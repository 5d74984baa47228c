"""From conversations with two answers to what a model is to prefer: images, tokens, labels, and the worse tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ssl_lab.data.conversation_text import ConversationEncoder, Message
from ssl_lab.data.conversation_views import ConversationViews
from ssl_lab.data.conversations import Talks
from ssl_lab.data.text_pad import IGNORE, padded, padding
from ssl_lab.data.views import Views
from ssl_lab.errors import UserError
from ssl_lab.types import Batch


class PreferenceViews(ConversationViews):
    """As `ConversationViews`, each in a row of its own, and with `rejected`, `rejected_labels`, `rejected_valid`.

    The images belong to both. Only the last answer is scored: before it both are the same.

    Args:
        image: views of the images alone, such as `Resize`.
        stats: see `ConversationViews`.

    Raises:
        UserError: see `ConversationViews`; or conversations with one answer.
    """

    def __init__(self, image: Views, *, stats: str | None = None) -> None:
        super().__init__(image, stats=stats)

    def __call__(self, data: Talks, position: Tensor, seed: int) -> Batch:
        batch = super().__call__(data, position, seed)
        tokens, labels = list[list[int]](), list[list[int]]()
        for row, (messages, worse) in enumerate(zip(data.messages, data.rejected, strict=True)):
            if worse is None:
                raise UserError("these conversations have one answer: choose e.g. data=shapes_preferences")
            other = data.encode([*messages[:-1], {"role": "assistant", "content": worse}])
            shared = _shared(messages, data.encode)
            batch["labels"][row, :shared] = IGNORE
            tokens.append(other.tokens)
            labels.append([IGNORE] * min(shared, len(other.labels)) + other.labels[shared:])
        batch["rejected"] = padded(tokens, padding(data.encode.tokenizer))
        batch["rejected_labels"] = padded(labels, IGNORE)
        lengths = torch.tensor([len(row) for row in tokens])
        batch["rejected_valid"] = torch.arange(batch["rejected"].shape[1]) < lengths[:, None]
        return batch


def _shared(messages: Sequence[Message], encode: ConversationEncoder) -> int:
    """Labels before the one of the last answer's first token, where there are answers before it."""
    several = sum(message["role"] == "assistant" for message in messages) > 1
    return len(encode.prompt(messages[:-1])) - 1 if several else 0
