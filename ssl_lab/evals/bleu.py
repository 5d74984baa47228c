"""BLEU of translations (Papineni et al., 2002), in the form that can be compared between papers (arXiv:1804.08771)."""

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch.nn.functional as F
from torch import Tensor

from ssl_lab.errors import UserError
from ssl_lab.evals.base import Common, Round, Skip
from ssl_lab.types import Batch, Translates


@dataclass(frozen=True)
class Bleu(Common):
    """The test split, translated by beam search and scored by sacrebleu against the text of the references.

    Args:
        num_beams: sequences that are followed; 1 = the most likely token at each place.
        alpha: of the length penalty ((5 + length) / 6) ** alpha; 0.6 in the Transformer (arXiv:1706.03762).
        max_tokens: of a translation.
    """

    num_beams: int = 4
    alpha: float = 0.6
    max_tokens: int = 100
    needs: ClassVar[type] = Translates

    @property
    def protocol(self) -> dict[str, Any]:
        """Settings that the values depend on, the signature of sacrebleu among them."""
        metric = _sacrebleu().BLEU()
        metric.corpus_score(["a"], [["a"]])  # it knows the number of references only afterwards
        return {
            "num_beams": self.num_beams,
            "alpha": self.alpha,
            "max_tokens": self.max_tokens,
            "signature": str(metric.get_signature()),
            "limit": self.limit,
        }

    def run(self, round: Round) -> dict[str, float]:
        """`bleu` and `chrf` (0 to 100); as details the brevity penalty and the lengths' ratio.

        Raises:
            Skip: the test data are no translations.
            UserError: sacrebleu is not installed, or the tokenizer has no end-of-text token.
        """
        library = _sacrebleu()
        tokenizer = getattr(round.data, "tokenizer", None)
        references = getattr(getattr(round.data, "test", None), "references", None)
        if tokenizer is None or references is None:
            raise Skip("the test data are no translations: choose e.g. data=multi30k")
        method, (eos,) = cast(Translates, round.method), tokenizer.require("eos")

        def translations(batch: Batch) -> Tensor:
            found = method.translate(batch, eos, num_beams=self.num_beams, alpha=self.alpha, max_tokens=self.max_tokens)
            return F.pad(found, (0, self.max_tokens - found.shape[1]), value=eos)

        found = round.extract(translations, "test", self.limit)
        texts = []
        for row in found.x.long().tolist():
            texts.append(tokenizer.decode(row[: row.index(eos)] if eos in row else row).strip())
        right = [references[row] for row in found.index.tolist()]
        bleu, chrf = library.corpus_bleu(texts, [right]), library.corpus_chrf(texts, [right])
        return {"bleu": bleu.score, "chrf": chrf.score, "length/penalty": bleu.bp, "length/ratio": bleu.ratio}


def _sacrebleu() -> Any:
    try:
        import sacrebleu
        import sacrebleu.metrics
    except ImportError as error:
        raise UserError("eval=[bleu] needs sacrebleu: pip install 'ssl-lab[text]'") from error
    return sacrebleu
