"""Conversations made of other data: questions with answers, captions, classes, the shapes world."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from ssl_lab.data.conversation_text import ConversationEncoder, Message
from ssl_lab.data.conversations import Conversations, Dialogue
from ssl_lab.data.images import EncodedImages, HFImages
from ssl_lab.data.pairs import Pairs
from ssl_lab.data.pairs_shapes import ShapesPairs
from ssl_lab.data.tables import open_table
from ssl_lab.errors import UserError
from ssl_lab.rng import fold

Kind = Literal["shape", "color", "texture", "count", "background", "place", "presence", "caption"]
_KINDS: dict[Kind, tuple[str, ...]] = {  # how a question of the shapes world begins or ends
    "shape": ("what shape",),
    "color": ("what color",),
    "texture": ("what is the texture", "striped?"),
    "count": ("how many",),
    "background": ("what is the background",),
    "place": ("where is",),
    "presence": ("is there",),
    "caption": (),
}
_QUESTIONS, _ANSWERS = ("questions", "question"), ("answers", "answer", "multiple_choice_answer")
Asked = tuple[str, str, tuple[str, ...]]  # a question, what is said to it, and all answers that count as right


def questions(
    path: str | Path,
    encode: ConversationEncoder,
    *,
    split: str = "train",
    image_column: str | None = None,
    question_column: str | None = None,
    answer_column: str | None = None,
    turns: int | None = 1,
) -> Conversations:
    """Questions about the images of a table, each row an image with one or several of them (VQA).

    Args:
        path: as `HFImages` takes it.
        encode: makes tokens of conversations.
        split: train, or what is held out.
        image_column: None = found.
        question_column: of a text, or of a list of them; None = found by its usual name.
        answer_column: of the answer, or of a list with one for each question. Beside a single question a list holds
            what several people said: the most frequent answer is taught, and all of them count.
        turns: questions of an image that are asked in one conversation, in an order of its own; None = all of them.

    Raises:
        UserError: no such columns, or lists of unequal length.
    """
    table = open_table(str(path), split, image_column, by_content=True)
    images = EncodedImages(table, str(path), split)
    columns: Any = table.columns
    names = [] if columns is None else list(columns.features)
    asked = _column(names, question_column, _QUESTIONS, "question_column", str(path))
    said = _column(names, answer_column, _ANSWERS, "answer_column", str(path))
    rows = columns.select_columns([asked, said]).with_format(None)[:]
    pairs = [_asked(q, a, f"{path} row {i}") for i, (q, a) in enumerate(zip(rows[asked], rows[said], strict=True))]
    return Conversations(images, dialogues(pairs, encode, turns), encode, origin=str(path))


def captions(
    path: str | Path,
    encode: ConversationEncoder,
    *,
    split: str = "train",
    image_column: str | None = None,
    caption_column: str | Sequence[str] | None = None,
    prompt: str = "Describe the image.",
) -> Conversations:
    """Images and what was written about them; every caption is a conversation.

    Args:
        path: as `Pairs` takes it.
        encode: makes tokens of conversations.
        split: train, or what is held out.
        image_column: None = found.
        caption_column: None = found.
        prompt: the question; empty = the image alone, as LLaVA aligns its connector.
    """
    images = Pairs(path, split=split, image_column=image_column, caption_column=caption_column)
    found = images.captions(range(len(images)))
    pairs = [[(prompt, text, tuple(texts)) for text in texts] for texts in found]
    return Conversations(images, dialogues(pairs, encode, 1), encode, origin=str(path))


def classes(
    path: str | Path,
    encode: ConversationEncoder,
    *,
    split: str = "train",
    image_column: str | None = None,
    label_column: str | None = None,
    prompt: str = "What is in the image?",
) -> Conversations:
    """Images of classes; the answer is the name of the class, with blanks for underscores.

    Args:
        path: as `HFImages` takes it.
        encode: makes tokens of conversations.
        split: train, or what is held out.
        image_column: None = found.
        label_column: None = found.
        prompt: the question.

    Raises:
        UserError: the images have no classes.
    """
    images = HFImages(path, split=split, image_column=image_column, label_column=label_column)
    targets = images.table.labels(torch.arange(len(images))).tolist()
    if not images.classes or max(targets) < 0:
        raise UserError(f"{path} has no classes to speak about: set label_column, or choose data with captions")
    names = [name.replace("_", " ") for name in images.classes]
    pairs: list[list[Asked]] = [[(prompt, names[c], ())] if c >= 0 else [] for c in targets]
    return Conversations(images, dialogues(pairs, encode, 1), encode, origin=str(path))


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
    """Questions about generated scenes, of which training never shows 16 of 64 kinds of object; see `ShapesPairs`.

    Args:
        split: train or test.
        length: scenes.
        encode: makes tokens of conversations.
        kinds: what is asked about; `caption` asks nothing and is answered with a sentence.
        image_size: side in pixels.
        seed: of the world.
        turns: as in `questions`.

    Raises:
        UserError: an unknown kind.
    """
    for kind in kinds:
        if kind not in get_args(Kind):
            raise UserError(f"kinds={kind}: take some of {', '.join(get_args(Kind))}")
    images = ShapesPairs(split, length, image_size=image_size, seed=seed)
    wanted = tuple(words for kind in kinds for words in _KINDS[kind])
    pairs: list[list[Asked]] = [
        [(q, a, ()) for q, a in asked if q.startswith(wanted) or q.endswith(wanted)]
        for asked in images.questions(range(length))
    ]
    if "caption" in kinds:
        for asked, texts in zip(pairs, images.captions(range(length)), strict=True):
            asked += [("", text, ()) for text in texts]
    return Conversations(images, dialogues(pairs, encode, turns), encode, origin="shapes")


def dialogues(pairs: Sequence[Sequence[Asked]], encode: ConversationEncoder, turns: int | None) -> list[Dialogue]:
    """Questions of each image, `turns` of them a conversation; where there are several, in an order of their own."""
    if turns is not None and turns < 1:
        raise UserError(f"turns={turns}: a conversation has at least one question; null = all of an image")
    found = []
    for image, asked in enumerate(pairs):
        count = len(asked) if turns is None else turns
        if count > 1:
            order = torch.randperm(len(asked), generator=torch.Generator().manual_seed(fold(0, image))).tolist()
            asked = [asked[i] for i in order]
        for start in range(0, len(asked), max(1, count)):
            part = asked[start : start + count]
            found.append(Dialogue((image,), tuple(_messages(part, encode.marker)), part[0][2]))
    return found


def _messages(asked: Sequence[Asked], marker: str) -> Iterable[Message]:
    for i, (question, answer, _) in enumerate(asked):
        before = "" if i else f"{marker}\n" if question else marker
        yield {"role": "user", "content": before + question}
        yield {"role": "assistant", "content": answer}


def _asked(question: Any, answer: Any, where: str) -> list[Asked]:
    """Of a row; a question that nobody answered is left out."""
    if question is None:
        return []
    if isinstance(question, str):
        question, answer = [question], [answer]
    if not isinstance(answer, list) or len(answer) != len(question):
        raise UserError(f"{where}: {len(question)} questions, and not as many answers; mend or remove the row")
    told = [(q, _told(a)) for q, a in zip(question, answer, strict=True)]
    return [(q, answers[0], answers) for q, answers in told if answers]


def _told(answer: Any) -> tuple[str, ...]:
    """What one or several people said, the most frequent first."""
    several = answer if isinstance(answer, list) else [answer]
    told = Counter(_text(each) for each in several if each is not None)
    return tuple(text for text, times in told.most_common() for _ in range(times))


def _text(answer: Any) -> str:
    """An answer of VQA is a text, or a mapping with one."""
    return str(answer.get("answer", json.dumps(answer)) if isinstance(answer, dict) else answer)


def _column(names: Sequence[str], given: str | None, usual: Sequence[str], argument: str, path: str) -> str:
    found = next((x for x in ((given,) if given else usual) if x in names), None)
    if found is None:
        raise UserError(f"{path} has no column {given or usual[0]!r}: set {argument} to one of {', '.join(names)}")
    return found
