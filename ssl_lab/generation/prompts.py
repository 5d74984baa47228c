"""Prompts: examples before a question, and conversations."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ssl_lab.errors import UserError
from ssl_lab.weights.sources import first_line

SHOT = "Input: {input}\nOutput: {output}"


def few_shot(
    examples: Sequence[tuple[str, str]],
    query: str,
    *,
    instruction: str = "",
    separator: str = "\n\n",
    shot: str = SHOT,
) -> str:
    """An instruction, solved examples and a question, up to where its answer begins (arXiv:2005.14165, section 2).

    Args:
        examples: pairs of input and output.
        query: the input to be answered.
        instruction: stands first, if any.
        separator: between instruction, examples and question.
        shot: one example, with {input} and {output}; the question is what stands before {output}, without trailing
            spaces, since most tokenizers join a space to the word that follows.

    Raises:
        UserError: `shot` lacks {input}, or {output} behind it.
    """
    if "{input}" not in shot.partition("{output}")[0] or "{output}" not in shot:
        raise UserError(f"shot={shot!r} must contain {{input}} and behind it {{output}}")
    solved = [_fill(shot, question, answer) for question, answer in examples]
    asked = _fill(shot.partition("{output}")[0], query, "").rstrip(" ")
    return separator.join([*([instruction] if instruction else []), *solved, asked])


def _fill(shot: str, question: str, answer: str) -> str:
    head, _, tail = shot.partition("{input}")
    return head + question + tail.replace("{output}", answer)


def chat(messages: Sequence[Mapping[str, str]], config: Mapping[str, Any], *, answer: bool = True) -> str:
    """A conversation as the text that a model was tuned on, by the Jinja template of its tokenizer.

    Templates run in a sandbox: they come with weights from anywhere.

    Args:
        messages: each with `role` (system, user, assistant) and `content`.
        config: of the tokenizer: `chat_template`, a text or a list of named ones, and `bos_token`, `eos_token`.
        answer: end where the answer of the model begins.

    Raises:
        UserError: there is no template, or it does not take these messages.
    """
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    if not template:
        raise UserError("the tokenizer has no chat_template: give chat=false, or weights that were tuned for chat")
    tokens = {name: _text(config.get(name)) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    try:
        return _compiled(template).render(
            messages=list(messages),
            add_generation_prompt=answer,
            raise_exception=_refuse,
            strftime_now=lambda how: datetime.now().strftime(how),
            **{name: text for name, text in tokens.items() if text is not None},
        )
    except jinja2.TemplateError as error:
        raise UserError(f"the chat template of the tokenizer fails: {first_line(error)}") from None


@lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda x, indent=None: json.dumps(x, ensure_ascii=False, indent=indent)
    return environment.from_string(template)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _text(token: Any) -> str | None:
    """The text of a special token, which files write as a text or as a mapping."""
    return token.get("content") if isinstance(token, Mapping) else token
