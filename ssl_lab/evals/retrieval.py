"""Image retrieval: are images of the same class the nearest ones?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_lab.evals.base import Common, Round, Skip, Split
from ssl_lab.types import Embeds

_CELLS = 1 << 23  # similarities ranked at a time: 32 MiB, and twice that for their order


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
    """How well each query ranks a bank by cosine similarity.

    Equal similarities rank in the order of the bank. Memory is bounded: some queries are ranked at a time.

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
    bank, queries = F.normalize(bank, dim=1).T.contiguous(), F.normalize(queries, dim=1)
    rank = torch.arange(1, len(bank_y) + 1, device=bank.device)
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
        found = relevant.gather(1, similarity.argsort(stable=True, dim=1, descending=True))
        hits = found.cumsum(1)
        total = hits[:, -1]
        precision = (hits / rank).mul_(found).sum(1, dtype=torch.float64) / total.clamp(min=1)
        precisions.append(precision)
        firsts.append(torch.where(total > 0, found.int().argmax(1) + 1, 0))
    return torch.cat(precisions), torch.cat(firsts)
