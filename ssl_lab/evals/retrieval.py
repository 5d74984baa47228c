"""Image retrieval: are images of the same class the nearest ones?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_lab.errors import UserError
from ssl_lab.evals.base import Common, Round, Skip, Split
from ssl_lab.types import Embeds

_CELLS = 1 << 22  # similarities ranked at a time: 16 MiB, and a few times that on the way


@dataclass(frozen=True)
class Retrieval(Common):
    """Test images rank a bank by cosine similarity; a row of the bank is relevant if it has the query's class.

    Args:
        bank: "train": the training split, as in hashing benchmarks; "test": all other test images (leave one out), as
            in metric learning (arXiv:1511.06452).
        at: cut-offs k of recall@k.
        max_queries: at most so many test images, evenly spaced, are queries.
    """

    bank: Split = "train"
    at: Sequence[int] = (1, 5, 10)
    max_queries: int = 10_000
    needs: ClassVar[type] = Embeds

    def __post_init__(self) -> None:
        if self.bank not in ("train", "test"):
            raise UserError(f"retrieval.bank={self.bank}: there are train and test")
        if not all(k >= 1 for k in self.at):
            raise UserError(f"retrieval.at={list(self.at)}: recall looks at the first 1 or more")
        if self.max_queries < 1:
            raise UserError(f"retrieval.max_queries={self.max_queries}: at least 1 row asks")

    @property
    def protocol(self) -> dict[str, Any]:
        """Settings that the values depend on."""
        bank = "train" if self.bank == "train" else "the other test rows"
        settings = {"similarity": "cosine", "bank": bank, "at": [int(k) for k in self.at]}
        return settings | {"max_queries": self.max_queries, "limit": self.limit}

    def run(self, round: Round) -> dict[str, float]:
        """Percent: `map` over the whole ranking, `recall_k` = queries with a relevant row among the first k.

        Queries whose class the bank lacks are left out.
        """
        bank, test = round.labelled(self.bank, self.limit), round.labelled("test", self.limit)
        queries = test.spread(self.max_queries)
        own = queries.index if self.bank == "test" else None
        precision, first = ranking(bank.x, bank.y, queries.x, queries.y, bank.index, own)
        known = first > 0
        if not known.any():
            raise Skip(f"no test row has a class that is among the others of the {self.bank} split")
        round.samples["test"] = int(known.sum())
        values = {"map": 100.0 * float(precision[known].mean())}
        return values | {f"recall_{k}": 100.0 * float((first[known] <= k).double().mean()) for k in self.at}


def ranking(
    bank: Tensor, bank_y: Tensor, queries: Tensor, queries_y: Tensor, index: Tensor, own: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """How well each query ranks a bank by cosine similarity, in float32.

    Among equal similarities, to 22 bits, relevant rows come last: a collapsed encoder gains nothing from ties. Memory
    is bounded, since some queries are ranked at a time.

    Args:
        bank: features (N, D).
        bank_y: their classes (N,) int64.
        queries: features (M, D).
        queries_y: their classes (M,) int64.
        index: (N,) int64, which row of the data set each row of the bank is.
        own: (M,) int64, the same of the queries: that row is left out of the query's ranking. None = keep all.

    Returns:
        Average precision (M,) float64, the mean over relevant rows of the precision at their rank, 0 where nothing is
        relevant; and the rank (M,) int64 of the first relevant row, counted from 1, 0 where nothing is relevant.
    """
    bank, queries = F.normalize(bank.float(), dim=1).T.contiguous(), F.normalize(queries.float(), dim=1)
    precisions, firsts = [], []
    chunk = max(1, _CELLS // len(bank_y))
    for start in range(0, len(queries), chunk):
        part = slice(start, start + chunk)
        similarity = queries[part] @ bank
        relevant = bank_y == queries_y[part, None]
        if own is not None:  # at the very end, where it cannot count
            itself = index == own[part, None]
            similarity.masked_fill_(itself, -torch.inf)
            relevant &= ~itself
        row, place = ordered(similarity, relevant).nonzero(as_tuple=True)
        total = relevant.sum(1)
        begin = total.cumsum(0) - total
        hits = torch.arange(1, len(row) + 1, device=row.device) - begin[row]
        share = hits.double() / (place + 1)
        precisions.append(share.new_zeros(len(total)).index_add_(0, row, share) / total.clamp(min=1))
        first = torch.zeros_like(total)
        first[total > 0] = place[begin[total > 0]] + 1
        firsts.append(first)
    return torch.cat(precisions), torch.cat(firsts)


def ordered(similarity: Tensor, relevant: Tensor) -> Tensor:
    """Similarities (M, N) float32 and relevance (M, N) bool -> the relevance by descending similarity, (M, N) bool.

    Sorting numbers alone is many times faster than sorting with places, so relevance takes the last bit of each number:
    the bits of a float32, those below its sign turned over for negative ones, are an integer of the same order.
    """
    key = similarity.view(torch.int32)
    key = (key ^ ((key >> 31) & 0x7FFFFFFF)).bitwise_or_(1).sub_(relevant.int())
    if key.device.type == "cpu":
        key.numpy().sort(1)  # in place, with vector instructions
    else:
        key = key.sort(1).values
    return (key & 1).eq_(0).bool().flip(1)
