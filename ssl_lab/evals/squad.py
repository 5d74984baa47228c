"""Exact match and F1 of answers that are spans of a text (SQuAD, Rajpurkar et al., 2016, arXiv:1606.05250)."""

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, cast, runtime_checkable

import torch
from torch import Tensor
from torchmetrics.functional.text import squad

from ssl_lab.evals.base import Common, Round, Skip
from ssl_lab.types import Batch, Locates


class Asked(Protocol):
    """A question, its text, and the answers that count as right."""

    context: str
    answers: list[str]


@runtime_checkable
class Windows(Protocol):
    """What the evaluator reads of a test source: windows over texts, see `ssl_lab.data.text_questions.Questions`."""

    questions: list[Any]

    def question_of(self, row: int) -> int:
        """Number of the question that a window asks."""
        ...

    def offsets(self, row: int) -> Tensor:
        """(Lr, 2) int64 characters (from, to) of each token, -1 where it may not be part of an answer."""
        ...


@dataclass(frozen=True)
class Squad(Common):
    """The span with the largest sum of start and end score, over all windows of a question, against its answers.

    Answers are compared as the official script does: lower case, without punctuation and English articles.

    Args:
        max_tokens: of an answer.
    """

    max_tokens: int = 30
    needs: ClassVar[type] = Locates

    @property
    def protocol(self) -> dict[str, Any]:
        """Settings that the values depend on."""
        return {"span": "best of all", "windows": "best of all", "max_tokens": self.max_tokens, "limit": self.limit}

    def run(self, round: Round) -> dict[str, float]:
        """`exact_match` and `f1` in percent of the questions that have an answer.

        Raises:
            Skip: the test data are no questions on texts, or none has an answer.
        """
        source = getattr(round.data, "test", None)
        if not isinstance(source, Windows):
            raise Skip("the test data are no questions on texts: choose e.g. data=xquad")
        method = cast(Locates, round.method)

        def spans(batch: Batch) -> Tensor:
            logits = method.locate(batch).float()
            places = torch.full((*logits.shape[:2], 2), -1)
            for target, row in zip(places, batch["index"].tolist(), strict=True):
                found = source.offsets(row)
                target[: len(found)] = found
            places = places.to(logits.device)
            score, first, last = best_span(logits, places[..., 0] >= 0, self.max_tokens)
            rows = torch.arange(len(places), device=places.device)
            characters = torch.stack([places[rows, first, 0], places[rows, last, 1]], 1)
            none = score.isinf()  # a window whose every token another window shows better
            return torch.cat([score.masked_fill(none, -1e9)[:, None], characters.masked_fill(none[:, None], 0)], 1)

        found = round.extract(spans, "test", self.limit)
        best: dict[int, tuple[float, str]] = {}
        for (score, start, end), row in zip(found.x.tolist(), found.index.tolist(), strict=True):
            number = source.question_of(row)
            if number not in best or score > best[number][0]:
                best[number] = score, source.questions[number].context[int(start) : int(end)]
        guesses: list[dict[str, str]] = []
        answers: list[dict[str, str | dict[str, list[str] | list[int]]]] = []
        for number, (_, text) in best.items():
            right = source.questions[number].answers
            if right:
                guesses.append({"prediction_text": text, "id": str(number)})
                answers.append({"answers": {"text": right, "answer_start": [0] * len(right)}, "id": str(number)})
        if not guesses:
            raise Skip("no question of the test split has an answer")
        values = squad(guesses, answers)
        return {"exact_match": float(values["exact_match"]), "f1": float(values["f1"]), "questions/count": len(guesses)}


def best_span(logits: Tensor, allowed: Tensor, max_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best first and last token of each row: the largest sum of both scores over all spans that are possible.

    Lists of the n best starts and ends approximate this; as answers have at most `max_tokens` tokens, all pairs can be
    compared.

    Args:
        logits: (B, L, 2) scores of first and last tokens.
        allowed: (B, L) bool, tokens that may begin or end an answer.
        max_tokens: of an answer.

    Returns:
        Scores (B,), first and last tokens (B,) int64; the score is -inf where nothing is allowed.
    """
    start, end = logits.masked_fill(~allowed.unsqueeze(-1), -torch.inf).unbind(-1)
    length = start.shape[1]
    last = torch.arange(length, device=start.device)[:, None] + torch.arange(max_tokens, device=start.device)
    ends = end[:, last.clamp(max=length - 1)].masked_fill(last >= length, -torch.inf)  # (B, L, max_tokens)
    score, place = (start.unsqueeze(-1) + ends).flatten(1).max(1)
    first = place // max_tokens
    return score, first, (first + place % max_tokens).clamp(max=length - 1)
