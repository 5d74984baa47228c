"""Questions about images (VQA, arXiv:1505.00468): how many answers are right, and how many would be without looking."""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, cast, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_lab.evals.base import Common, Round, Skip
from ssl_lab.types import Answers, Batch

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_DROPPED = re.compile(r"'|(?<=\d),(?=\d)")
_MARKS = re.compile(r"[^\w\s:.]|_|(?<!\d)\.|\.(?!\d)")
_PEOPLE = 10  # who answered each question of the challenge
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {word: str(i) for i, word in enumerate(_WORDS)} | {"none": "0"}


@runtime_checkable
class Asks(Protocol):
    """What the evaluator reads of a source, see `ssl_lab.data.conversations.Conversations`."""

    encode: Any

    def __len__(self) -> int: ...

    def question(self, row: int) -> tuple[str, tuple[str, ...]]:
        """The first question of a row and all answers that count as right, the usual one first."""
        ...


@dataclass(frozen=True)
class VQA(Common):
    """The first question of every test conversation, answered greedily and compared as the VQA challenge compares.

    Upper case, articles and punctuation do not count, and number words are digits. Where several people answered, an
    answer is as right as min(1, how many gave it / 3); of ten people that is the mean over the ten sets of nine.

    Args:
        max_tokens: of an answer.
        shown: so many questions are recorded with their answers as notes.
    """

    max_tokens: int = 16
    shown: int = 0
    needs: ClassVar[type] = Answers

    @property
    def protocol(self) -> dict[str, Any]:
        """Settings that the values depend on."""
        return {"decoding": "greedy", "max_tokens": self.max_tokens, "limit": self.limit}

    def run(self, round: Round) -> dict[str, float]:
        """`accuracy` in percent, `majority` and `question_only` beside it, and of yes and no the details.

        `majority` always says the most frequent answer of training; `question_only` the most frequent one to the same
        question. `yes_no/accuracy` is the mean over questions with the answer yes and those with no, `yes_no/said_yes`
        the share that is answered with yes, and `yes_no/are_yes` the share for which that is right.

        Raises:
            Skip: the test data are no conversations.
        """
        train, test = (getattr(round.data, name, None) for name in ("train", "test"))
        tokenizer = getattr(round.data, "tokenizer", None)
        if not isinstance(test, Asks) or tokenizer is None:
            raise Skip("the test data ask no questions: choose e.g. data=shapes_questions or data=easy_vqa")
        method, end = cast(Answers, round.method), int(test.encode.end)

        def answers(batch: Batch) -> Tensor:
            found = method.answer(batch, end, max_tokens=self.max_tokens)
            return F.pad(found, (0, self.max_tokens - found.shape[1]), value=end)

        found = round.extract(answers, "test", self.limit)
        ids, rows = found.x.long().tolist(), found.index.tolist()
        said = [tokenizer.decode(row[: row.index(end)] if end in row else row).strip() for row in ids]
        asked = [test.question(row) for row in rows]
        always, by_question = usual(train if isinstance(train, Asks) else test)
        for (question, right), answer in list(zip(asked, said, strict=True))[: self.shown]:
            round.notes.append(f"{question!r}: said {answer!r}, right {right[0]!r}")
        guesses = {
            "accuracy": said,
            "majority": [always] * len(asked),
            "question_only": [by_question.get(question, always) for question, _ in asked],
        }
        values = {
            name: 100 * sum(score(x, right) for x, (_, right) in zip(given, asked, strict=True)) / len(asked)
            for name, given in guesses.items()
        }
        return values | balance(said, [right[0] for _, right in asked]) | {"questions/count": len(asked)}


def usual(source: Asks) -> tuple[str, dict[str, str]]:
    """The most frequent answer of a source, and the most frequent one to each question."""
    every, each = Counter[str](), defaultdict[str, Counter[str]](Counter)
    for row in range(len(source)):
        question, answers = source.question(row)
        every[answers[0]] += 1
        each[question][answers[0]] += 1
    return every.most_common(1)[0][0], {question: told.most_common(1)[0][0] for question, told in each.items()}


def score(said: str, right: Sequence[str]) -> float:
    """How right an answer is, 0 to 1."""
    same, people = sum(normalized(x) == normalized(said) for x in right), len(right)
    if people < _PEOPLE:
        return float(same > 0) if people < 3 else min(1.0, same / 3)
    return (same * min(1.0, (same - 1) / 3) + (people - same) * min(1.0, same / 3)) / people


def normalized(answer: str) -> str:
    """As answers are compared: lower case, digits for number words, no articles, apostrophes and punctuation."""
    words = _ARTICLES.sub(" ", _MARKS.sub(" ", _DROPPED.sub("", answer.lower()))).split()
    return " ".join(_NUMBERS.get(word, word) for word in words)


def balance(said: Sequence[str], right: Sequence[str]) -> dict[str, float]:
    """What a bias for yes or no looks like, in percent; empty where no answer is yes or no."""
    pairs = [(normalized(a), normalized(b)) for a, b in zip(said, right, strict=True)]
    parts = {name: [a for a, b in pairs if b == name] for name in ("yes", "no")}
    total = sum(map(len, parts.values()))
    if not total:
        return {}
    shares = [sum(a == name for a in part) / len(part) for name, part in parts.items() if part]
    return {
        "yes_no/accuracy": 100 * sum(shares) / len(shares),
        "yes_no/said_yes": 100 * sum(a == "yes" for part in parts.values() for a in part) / total,
        "yes_no/are_yes": 100 * len(parts["yes"]) / total,
    }


@dataclass(frozen=True)
class Looks(Common):
    """Does it look? Nats of the answers with the right image, with a different one, and without any.

    The different one is the next of the batch that is not the same picture and belongs to another conversation; several
    questions about one picture stand side by side. A conversation for which there is none does not count.
    """

    needs: ClassVar[type] = Answers

    @property
    def protocol(self) -> dict[str, Any]:
        """Settings that the values depend on."""
        return {
            "shuffled": "the next different picture of the batch",
            "mean over": "scored tokens",
            "limit": self.limit,
        }

    def run(self, round: Round) -> dict[str, float]:
        """`right`, `shuffled` and `none` in nats a token; `gain`: shuffled - right, how much the image tells.

        Raises:
            Skip: the test data have no images.
        """
        test = getattr(round.data, "test", None)
        if not isinstance(test, Asks):
            raise Skip("the test data are no conversations: choose e.g. data=shapes_questions")
        method, marker = cast(Any, round.method), int(test.encode.image)

        def sums(batch: Batch) -> Tensor:
            images, owner = batch["images"], batch["image_rows"]
            marked = batch["tokens"] == marker
            other = different(images, owner)
            seen = marked.any(1).index_fill(0, owner[other < 0], False)
            blind = {**batch, "valid": batch["valid"] & ~marked, "images": images[:0]}
            kinds = [batch, {**batch, "images": images[other.clamp(min=0)]}, blind]
            count = (batch["labels"] != -100).sum(1) * seen
            nats = [method.nll(kind).double().sum(1) * (count > 0) for kind in kinds]
            return torch.stack([*nats, count], 1)

        right, shuffled, none, count = round.extract(sums, "test", self.limit).x.double().sum(0).tolist()
        if not count:
            raise Skip("no test conversation has an image, and another one beside it: set data.batch_size above 1")
        values = {"right": right / count, "shuffled": shuffled / count, "none": none / count}
        return values | {"gain": values["shuffled"] - values["right"]}


def different(images: Tensor, rows: Tensor) -> Tensor:
    """Of each image (N, ...) the number (N,) int64 of the next one, round the end, that is not the same; -1 = none.

    Images of one row (N,) do not count as different from each other.
    """
    flat, at = images.flatten(1), torch.arange(len(images), device=images.device)
    found = torch.full_like(at, -1)
    for step in range(1, len(images)):
        if bool((found >= 0).all()):
            break
        fits = (flat != flat.roll(-step, 0)).any(1) & (rows != rows.roll(-step))
        found = torch.where((found < 0) & fits, at.roll(-step), found)
    return found
