"""Questions whose answers are found in a text (SQuAD): windows over the text, and the way back to its characters."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ssl_lab.data.source import Samples
from ssl_lab.data.text_pad import around
from ssl_lab.data.text_rows import Ragged, tokenized
from ssl_lab.data.text_tables import open_rows
from ssl_lab.data.tokenizer import Tokenizer, as_tokenizer
from ssl_lab.errors import UserError


class Question(NamedTuple):
    """A question, the text that holds its answer, and all answers that count as right."""

    question: str
    context: str
    answers: list[str]


class Questions:
    """Questions on texts, one row for each window over a text that is too long for one sequence (Devlin et al., 2019).

    `Samples.data` is (questions, texts, span): two lists of B sequences (Li,) int32 without special tokens, and (B, 2)
    int64 places of the first and last token of the answer in the joined sequence (0, 0 where the window does not hold
    all of it), for `PadQuestions`.

    Args:
        path: a parquet or .jsonl file, a folder of them, a data set of the hub, or `captions`, with the columns
            `context`, `question` and either `answer` and `answer_start` or SQuAD's `answers` (a dict of lists, or a
            list of dicts). A context that is null is an empty one.
        tokenizer: a tokenizer, or the path of one.
        split: train, or what is held out. A file without splits is divided by its contexts.
        max_length: tokens of a joined sequence, special ones included.
        stride: context tokens from the beginning of a window to that of the next.
        max_question: tokens that are kept of a question.

    Raises:
        UserError: nothing at `path`, a missing column or one of another kind, or lengths that leave no room.
    """

    unit = "windows"

    def __init__(
        self,
        path: str,
        tokenizer: Tokenizer | str,
        *,
        split: str = "train",
        max_length: int = 384,
        stride: int = 128,
        max_question: int = 64,
    ):
        self.tokenizer = as_tokenizer(tokenizer)
        self.classes: list[str] = []
        before, after = around(self.tokenizer)
        self._before, self._after = len(before), len(after)
        if stride < 1 or max_question < 1 or max_length - max_question - self._before - 2 * self._after < stride:
            raise UserError(
                f"max_length={max_length} leaves no room for a question of {max_question} tokens and a window that "
                f"moves by {stride}: set max_length higher, or max_question or stride lower"
            )
        rows = open_rows(path, split, key="context")
        names = ["answers"] if "answers" in rows.columns else ["answer", "answer_start"]
        table = rows.read(["context", "question", *names])
        answers = [_answers(values, rows.origin) for values in zip(*(table[name] for name in names), strict=True)]
        right = [[text for text, _ in given] for given in answers]
        texts = [x or "" for x in table["context"]]
        self.questions = [Question(*x) for x in zip(table["question"], texts, right, strict=True)]
        asked = tokenized(table["question"], self.tokenizer, f"{rows.origin} question")
        self._asked = Ragged(ids[:max_question] for ids in asked.take(range(len(asked))))
        if not all(isinstance(x, str) for x in texts):
            raise UserError(f"{rows.origin} context holds other things than texts: mend the column")
        contexts = list(dict.fromkeys(texts))
        number = {context: i for i, context in enumerate(contexts)}
        self._contexts = _encoded(contexts, self.tokenizer)
        windows = []
        for i, question in enumerate(self.questions):
            found = self._contexts[number[question.context]]
            room = max_length - self._first(i) - self._after
            span = _tokens_of(answers[i][0], found[1:]) if answers[i] else None
            windows += [(i, number[question.context], *x) for x in self._cut(i, found.shape[1], room, stride, span)]
        self._windows = np.array(windows, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._windows)

    def read(self, rows: Sequence[int]) -> Samples:
        """Windows with the places of their answers; there are no classes."""
        index = torch.tensor(rows, dtype=torch.int64)
        chosen = self._windows[list(rows)]
        texts = [self._contexts[c][0, start:end] for _, c, start, end, _, _ in chosen]
        span = torch.from_numpy(chosen[:, 4:].copy())
        return Samples((self._asked.take(chosen[:, 0].tolist()), texts, span), torch.full((len(index),), -1), index)

    def question_of(self, row: int) -> int:
        """The number, in `questions`, of the question that window `row` asks."""
        return int(self._windows[row, 0])

    def offsets(self, row: int) -> Tensor:
        """(Lr, 2) int64 for the joined sequence of window `row`: the characters (from, to) of the context.

        -1 where a token may not be part of an answer: it is not of the context, or another window shows it with more
        context on its scarcer side.
        """
        question, context, start, end, _, _ = self._windows[row].tolist()
        offsets = self._contexts[context][1:].T[start:end].astype(np.int64)
        places = np.arange(start, end)
        for _, _, s, e, _, _ in self._windows[self._windows[:, 0] == question].tolist():
            if (s, e) != (start, end):
                mine, theirs = _context(places, start, end), _context(places, s, e)
                offsets[(theirs > mine) | ((theirs == mine) & (s < start))] = -1
        first = self._first(question)
        found = np.full((first + len(offsets) + self._after, 2), -1, dtype=np.int64)
        found[first : first + len(offsets)] = offsets
        return torch.from_numpy(found)

    def _first(self, question: int) -> int:
        """Place of the first context token in a joined sequence."""
        return self._before + int(self._asked.ends[question + 1] - self._asked.ends[question]) + self._after

    def _cut(
        self, question: int, length: int, room: int, stride: int, span: tuple[int, int] | None
    ) -> list[tuple[int, int, int, int]]:
        """(start, end) of each window and the places of the answer's tokens in its sequence."""
        windows, start = [], 0
        while True:
            end = min(start + room, length)
            held = span is not None and start <= span[0] and span[1] < end
            move = self._first(question) - start
            answer = (span[0] + move, span[1] + move) if held and span else (0, 0)
            windows.append((start, end, *answer))
            if end == length:
                return windows
            start += stride


def _answers(values: tuple[Any, ...], origin: str) -> list[tuple[str, int]]:
    """Answers with the characters where they begin; none for a question without an answer."""
    if len(values) == 1:
        given = values[0] or []
        try:
            if isinstance(given, dict):
                return list(zip(given.get("text") or [], given.get("answer_start") or [], strict=True))
            return [(each["text"], each["answer_start"]) for each in given]
        except (KeyError, TypeError, ValueError):
            shape = '{"text": [...], "answer_start": [...]}'
            raise UserError(f"{origin} answers holds {str(given)[:60]!r}, where {shape} is wanted: mend it") from None
    text, start = values
    return [] if not text or start is None or start < 0 else [(text, start)]


def _encoded(contexts: list[str], tokenizer: Tokenizer) -> list[np.ndarray]:
    """Ids of each context and the characters (from, to) that they stand for, (3, N) int32."""
    spans = tokenizer.encode_spans(contexts)
    return [np.array([ids, *zip(*offsets, strict=True)], dtype=np.int32).reshape(3, -1) for ids, offsets in spans]


def _tokens_of(answer: tuple[str, int], offsets: np.ndarray) -> tuple[int, int] | None:
    """First and last token (inclusive) that share a character with the answer; None if there is none."""
    text, start = answer
    touched = np.flatnonzero((offsets[1] > start) & (offsets[0] < start + len(text)))
    return (int(touched[0]), int(touched[-1])) if len(touched) else None


def _context(places: np.ndarray, start: int, end: int) -> np.ndarray:
    """BERT's score of how much context a token has in a window; negative where it is not in it."""
    score = np.minimum(places - start, end - 1 - places) + 0.01 * (end - start)
    return np.where((places >= start) & (places < end), score, -1.0)
