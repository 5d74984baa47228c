"""Tokenizers that know a picture: a marker stands for it in a text, and a template lays out who speaks."""

from pathlib import Path

import tokenizers

from ssl_lab.data.tokenizer import Tokenizer, as_tokenizer
from ssl_lab.errors import UserError

MARKER = "<image>"
PLAIN = (  # for tokenizers without a template: <image>, line end, answer, end of text
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\n' }}{% endif %}{% endfor %}"
)
TEMPLATES = {"plain": PLAIN}


def with_marker(tokenizer: Tokenizer | str | Path, *, marker: str = MARKER, template: str | None = None) -> Tokenizer:
    """The same tokenizer with a special token that stands for an image, and with a chat template.

    Args:
        tokenizer: or its path, see `ssl_lab.data.tokenizer.load`.
        marker: text of the token. It comes last, so that a language model needs no row for it.
        template: a Jinja text, or `plain`; None = that of the tokenizer, and `plain` where it has none.

    Raises:
        UserError: `plain` for a tokenizer without an end token.
    """
    known = as_tokenizer(tokenizer)
    backend = tokenizers.Tokenizer.from_str(known.backend.to_str())
    if backend.token_to_id(marker) is None:
        backend.add_special_tokens([tokenizers.AddedToken(marker, special=True, normalized=False)])
    template = TEMPLATES.get(template or "", template) or known.config.get("chat_template") or PLAIN
    if template == PLAIN:
        known.require("eos")
    return Tokenizer(backend, known.config | {"image_token": marker, "chat_template": template})


def marker_of(tokenizer: Tokenizer) -> int:
    """The id of the token that stands for an image.

    Raises:
        UserError: there is none.
    """
    name = str(tokenizer.config.get("image_token", MARKER))
    found = tokenizer.backend.token_to_id(name)
    if found is None:
        raise UserError(
            f"the tokenizer has no token {name} to stand for an image: give it one with data.tokenizer.tokenizer=<its "
            "path>, which leaves data.tokenizer._target_ as ssl_lab.data.conversation_tokenizer.with_marker"
        )
    return int(found)


def spoken(tokenizer: Tokenizer) -> int:
    """How many ids a language model needs rows for: a marker at the end of the vocabulary is never looked up."""
    last = tokenizer.backend.id_to_token(tokenizer.vocab_size - 1)
    return tokenizer.vocab_size - (last is not None and last == tokenizer.config.get("image_token"))
