"""Conversations with two answers to their last question, a better and a worse one: from files, or made of questions."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from ssl_lab.data import conversation_builders as build
from ssl_lab.data.conversation_builders import Kind
from ssl_lab.data.conversation_table import TURNS, cell, marked, message, read_rows
from ssl_lab.data.conversation_text import ConversationEncoder, Message
from ssl_lab.data.conversations import Conversations, Dialogue
from ssl_lab.data.images import EncodedImages
from ssl_lab.errors import UserError
from ssl_lab.rng import fold

_PROMPTS = (*TURNS, "prompt", "question")


def preferences(
    path: str | Path,
    encode: ConversationEncoder,
    *,
    split: str = "train",
    image_folder: str | Path | None = None,
    bad_samples: str | Path | None = None,
) -> Conversations:
    """Rows with `chosen` and `rejected`, and with `image` or `images` if any; see `conversation_table.conversations`.

    What was said before stands in `prompt` or `question` (a text), or in `prompt`, `conversations` or `messages`
    (turns); an answer is a text or a turn. Whole conversations that differ in their last turn bring it themselves:
    of such a column beside them only a system turn is taken.

    Args:
        path: a .json, .jsonl or .parquet file, or a folder of them.
        encode: makes tokens of conversations.
        split: train, or what is held out.
        image_folder: where paths of images begin; None = beside the file.
        bad_samples: a file to list unreadable images in.

    Raises:
        UserError: nothing there, no such columns, a role that is not known, or conversations that differ before their
            last turn.
    """
    rows, store = read_rows(path, split, (*_PROMPTS, "chosen", "rejected"), image_folder)
    for name in ("chosen", "rejected"):
        store.column_of([name])
    before = next((name for name in _PROMPTS if name in store.names), None)
    dialogues = []
    for number, row in enumerate(rows):
        where = f"{path} row {number}"
        asked = [] if before is None else _turns(cell(row, before, where, str, list), "user", where, encode.marker)
        better, worse = (
            _turns(cell(row, name, where, str, list, dict), "assistant", where, encode.marker)
            for name in ("chosen", "rejected")
        )
        if better[0]["role"] != "assistant":
            # whole conversations bring their own beginning
            asked = [x for x in asked if x["role"] == "system" and better[0]["role"] != "system"]
        if asked and asked[-1]["role"] == "assistant":
            raise UserError(f"{where}: {before} ends with an answer, and chosen is another one; leave that answer out")
        if better[:-1] != worse[:-1] or better[-1]["role"] != "assistant" or worse[-1]["role"] != "assistant":
            raise UserError(f"{where}: chosen and rejected are one conversation but for the last answer; mend the row")
        if better[-1]["content"] == worse[-1]["content"]:
            raise UserError(f"{where}: chosen and rejected are the same answer; take the row out")
        images = store.take(row)
        messages = marked([*asked, *better], len(images), encode)
        dialogues.append(Dialogue(images, messages, rejected=worse[-1]["content"]))
    found = EncodedImages(store, str(path), split, bad_samples=bad_samples) if len(store) else None
    return Conversations(found, dialogues, encode, origin=str(path))


def mistaken(source: Conversations, *, seed: int = 0) -> Conversations:
    """Beside every last answer one that is wrong about the image: what the same question is answered elsewhere.

    So the worse answer is what a model would say that knows the questions and does not look. Where all other images
    give a question the same answer, those to questions that begin with the same two words are taken.

    Args:
        source: questions with answers; a conversation for which there is no wrong answer is left out.
        seed: of the draws, which follow how often an answer is given.

    Raises:
        UserError: there is no wrong answer to any question.
    """
    pairs = [_last(one.messages, source.encode.marker) for one in source.dialogues]
    known = defaultdict[str, list[str]](list)
    for question, answer in pairs:
        known[question].append(answer)
        known[_beginning(question)].append(answer)
    dialogues = []
    for row, (one, (question, answer)) in enumerate(zip(source.dialogues, pairs, strict=True)):
        alone = sum(message["role"] == "assistant" for message in one.messages) == 1
        answers = one.answers if alone else ()
        right = {text.strip().lower() for text in (answer, *answers)}
        for told in (known[question], known[_beginning(question)]):
            start, count = fold(seed, 0xD90, row), len(told)
            drawn = (told[(start + i) % count] for i in range(count))
            if (wrong := next((text for text in drawn if text.strip().lower() not in right), None)) is not None:
                dialogues.append(replace(one, answers=answers, rejected=wrong))
                break
    if not dialogues:
        raise UserError("all questions have one and the same answer, so that none is wrong: ask other ones")
    return Conversations(source.images, dialogues, source.encode, origin="the wrong answers")


def shapes(
    split: Literal["train", "test"],
    length: int,
    encode: ConversationEncoder,
    *,
    kinds: Sequence[Kind] = ("shape", "color", "place", "presence"),
    image_size: int = 32,
    seed: int = 0,
    turns: int | None = 1,
) -> Conversations:
    """Questions about generated scenes with a right and a wrong answer; see `conversation_builders.shapes`.

    Args:
        split: train or test.
        length: scenes.
        encode: makes tokens of conversations.
        kinds: what is asked about.
        image_size: side in pixels.
        seed: of the world.
        turns: questions of a scene that are asked in one conversation; the last one has the wrong answer.

    Raises:
        UserError: an unknown kind.
    """
    source = build.shapes(split, length, encode, kinds=kinds, image_size=image_size, seed=seed, turns=turns)
    return mistaken(source, seed=seed)


def _turns(value: Any, role: str, where: str, marker: str) -> list[Message]:
    """A text, a turn, or several, as messages."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    turns = value if isinstance(value, list) else [value]
    if not turns:
        raise UserError(f"{where} has no turns where an answer or a question is to stand; mend or remove the row")
    return [message(turn, where, marker) for turn in turns]


def _last(messages: Sequence[Message], marker: str) -> tuple[str, str]:
    """The last question, without markers, and its answer."""
    asked = next((m["content"] for m in reversed(messages) if m["role"] == "user"), "")
    return asked.replace(marker, "").strip(), messages[-1]["content"]


def _beginning(question: str) -> str:
    return " ".join(question.split()[:2])
