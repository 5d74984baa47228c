"""LLaVA's third stage: direct preference optimisation (arXiv:2305.18290) against answers that the image belies."""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_lab.backbones.flamingo import GatedVisionLanguage
from ssl_lab.backbones.vlm import PARTS, Part, VisionLanguage
from ssl_lab.errors import UserError
from ssl_lab.losses.experts import with_experts
from ssl_lab.losses.lm import IGNORE, token_nll
from ssl_lab.losses.preference import dpo, reward_logs
from ssl_lab.methods.llava import LEARNS, LLaVA
from ssl_lab.nn.lora import LoRALinear, without_updates
from ssl_lab.types import Batch, Step

Reference = Literal["copy", "untuned"]


class LLaVADPO(LLaVA):
    """-log sigmoid of how much more the chosen answer has gained on the reference than the rejected one.

    The reference is the model where training began. Of what does not learn there is but one: an image goes through a
    frozen encoder once for both answers and both models. Conversations without images may be mixed in.

    Args:
        model: image encoder, connector and decoder.
        beta: how much a departure from the reference costs.
        nll_weight: of the chosen answers' negative log-likelihood a token, beside that loss (arXiv:2404.19733; Llama 3,
            arXiv:2407.21783, section 4.1.4, takes 0.2). Without it both answers of a pair may become less likely, as
            long as the rejected one does so faster.
        reference: "copy" keeps the start of what learns; "untuned" is the model itself with its low-rank updates
            switched off, for `ssl_lab.nn.lora`, and needs no second language model.
        train: the parts that learn: vision, connector, decoder.
        weights: begin from a run of LLaVA: its run folder or a checkpoint in it.
        cache_features: see `LLaVA`.

    Raises:
        UserError: a model with gated blocks, `beta` not above 0, `nll_weight` below 0, an unknown reference, and as
            `LLaVA`.
    """

    def __init__(
        self,
        model: VisionLanguage,
        *,
        beta: float = 0.1,
        nll_weight: float = 0.0,
        reference: Reference = "copy",
        train: Sequence[Part] = LEARNS["instruct"],
        weights: str | None = None,
        cache_features: bool = False,
    ) -> None:
        if isinstance(model, GatedVisionLanguage):
            raise UserError(
                "llava_dpo keeps the start of whole parts, which a Flamingo's gated blocks are not: take LLaVA"
            )
        super().__init__(model, train=train, weights=weights, cache_features=cache_features)
        if beta <= 0 or reference not in get_args(Reference):
            kinds = " or ".join(get_args(Reference))
            raise UserError(f"beta={beta}, reference={reference}: beta is above 0, and reference {kinds}")
        if nll_weight < 0:
            raise UserError(f"nll_weight={nll_weight}: it is the weight of a loss, 0 or more")
        self.beta, self.nll_weight, self.untuned = beta, nll_weight, reference == "untuned"
        learns = [part for part in PARTS if part not in model.frozen]
        kept = [part for part in learns if part == "connector" or not self.untuned]
        self.reference = _Kept({part: copy.deepcopy(model.get_submodule(part)) for part in kept})

    def step(self, batch: Batch, progress: float) -> Step:
        policy, reference = self.likelihoods(batch)
        loss, rewards = dpo(policy, reference, beta=self.beta)
        if self.nll_weight:
            tokens = (batch["labels"] != IGNORE).sum(1).clamp(min=1)
            loss = loss - self.nll_weight * (policy[0] / tokens).mean()
        step = with_experts(loss, self.model.decoder)
        return Step(step.loss, {**step.logs, **reward_logs(rewards)})

    def rewards(self, batch: Batch) -> Tensor:
        """(B, 2) of the chosen and the rejected answers; see `ssl_lab.types.Prefers`."""
        policy, reference = self.likelihoods(batch)
        return dpo(policy, reference, beta=self.beta)[1].T

    def likelihoods(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Log-likelihoods (2, B) in nats of the chosen and the rejected answers: by the model, by the reference.

        Raises:
            UserError: a batch without rejected answers, or packed; low-rank updates where the reference is a copy; or
                none, or others that learn, where it is untuned.
        """
        if "rejected" not in batch:
            raise UserError("preferences need a worse answer beside each: choose e.g. data=shapes_preferences")
        if "segments" in batch:
            raise UserError("pairs of answers have rows of their own: take views that do not pack")
        self._require_reference()
        other = batch.get("rejected_valid")
        pair: dict[str, Any] = {
            "tokens": _both(batch["tokens"], batch["rejected"], 0),
            "labels": _both(batch["labels"], batch["rejected_labels"], IGNORE),
            "valid": _both(_valid(batch["tokens"], batch.get("valid")), _valid(batch["rejected"], other), False),
        }
        patches = self._seen(batch, self.model)
        with self._begun() as begun:
            same = patches is None or not self.model.vision_learns
            theirs = patches if same else self._seen(batch, begun)
            reference = _sums(begun, batch, theirs, pair)
        return _sums(self.model, batch, patches, pair), reference

    def _seen(self, batch: Batch, model: VisionLanguage) -> Tensor | None:
        """(N, P, Dv) of the images, None of none."""
        if self.cache_features and self.training:
            return self._patches(batch)
        images = batch.get("images")
        if images is None or not len(images):
            return None
        with torch.set_grad_enabled(torch.is_grad_enabled() and model.vision_learns):
            return model.patches(images)

    @contextlib.contextmanager
    def _begun(self) -> Iterator[VisionLanguage]:
        """The model where training began, which drops nothing and takes no gradient."""
        begun, training = self.model.with_parts(dict(self.reference.items())), self.model.training
        with torch.no_grad(), without_updates(self.model):
            if training and self.untuned:
                self.model.eval()
            try:
                yield begun
            finally:
                if training and self.untuned:
                    self.model.train()

    def _require_reference(self) -> None:
        tuned = [m for part in (self.model.vision, self.model.decoder) for m in part.modules()]
        updates = any(isinstance(module, LoRALinear) for module in tuned)
        if updates and not self.untuned:
            raise UserError("tuning=lora needs no copy of the language model to compare with: set reference=untuned")
        if not self.untuned:
            return
        names = [n for n, p in self.model.named_parameters() if p.requires_grad and not n.startswith("connector.")]
        if other := [name for name in names if name.rpartition(".")[2] not in ("lora_a", "lora_b")]:
            raise UserError(
                f"reference=untuned switches low-rank updates off, and {other[0]} learns besides: set tuning=lora "
                "without tuning.also, or reference=copy"
            )


class _Kept(nn.ModuleDict):
    """Parts that stay as they are."""

    def __init__(self, parts: dict[str, nn.Module]) -> None:
        super().__init__(parts)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "_Kept":
        return super().train(False)


def _sums(model: VisionLanguage, batch: Batch, patches: Tensor | None, pair: dict[str, Any]) -> Tensor:
    """(2, B): what both halves of the rows say, in nats."""
    visual = model.nothing(batch.get("images")) if patches is None else model.connector(patches)
    encoded, labels = model.spliced(visual=torch.cat([visual, visual]), **pair)
    assert labels is not None
    return -token_nll(encoded.tokens, model.decoder.head_weight, labels).sum(1).unflatten(0, (2, -1))


def _valid(tokens: Tensor, known: Tensor | None) -> Tensor:
    return torch.ones_like(tokens, dtype=torch.bool) if known is None else known


def _both(chosen: Tensor, rejected: Tensor, fill: int | bool) -> Tensor:
    """(B, Lc) and (B, Lr) -> (2 B, max(Lc, Lr)), filled up on the right."""
    width = max(chosen.shape[1], rejected.shape[1])
    return torch.cat([F.pad(rows, (0, width - rows.shape[1]), value=fill) for rows in (chosen, rejected)])
