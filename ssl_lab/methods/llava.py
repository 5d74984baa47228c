"""LLaVA (arXiv:2304.08485, arXiv:2310.03744): an image encoder and a language model, joined by what learns first."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ssl_lab.backbones.vlm import PARTS, Part, VisionLanguage
from ssl_lab.errors import UserError
from ssl_lab.generation.seeing import stream_seen
from ssl_lab.losses.experts import with_experts
from ssl_lab.losses.lm import IGNORE, mean_over_tokens, token_nll
from ssl_lab.methods.base import Method
from ssl_lab.nn.experts import balance_, forget_
from ssl_lab.train import checkpoint
from ssl_lab.train.base import KEY as BASE
from ssl_lab.train.base import checksum
from ssl_lab.types import Batch, Step
from ssl_lab.weights import io
from ssl_lab.weights.sources import read_safetensors

log = logging.getLogger(__name__)

Stage = Literal["align", "instruct"]
LEARNS: dict[Stage, tuple[Part, ...]] = {"align": ("connector",), "instruct": ("connector", "decoder")}


class LLaVA(Method):
    """Mean cross-entropy of the answers' tokens.

    Parts that do not learn hold no gradient and no optimizer state, and drop nothing.

    Args:
        model: image encoder, connector and decoder.
        stage: "align" trains the connector, "instruct" the decoder too.
        train: the parts that learn, instead of what the stage says: vision, connector, decoder.
        weights: begin from a run of this method: its run folder or a checkpoint in it.
        cache_features: keep what the frozen image encoder gives of each training image in memory, from the first pass
            on, and do not read the image again; for images that look the same in every pass.

    Raises:
        UserError: unknown parts, weights of another connector, image encoder or decoder, or `cache_features` of an
            image encoder that learns.
    """

    def __init__(
        self,
        model: VisionLanguage,
        *,
        stage: Stage = "instruct",
        train: Sequence[Part] | None = None,
        weights: str | None = None,
        cache_features: bool = False,
    ) -> None:
        super().__init__()
        if stage not in LEARNS:
            raise UserError(f"stage={stage}: take {' or '.join(LEARNS)}")
        learns = LEARNS[stage] if train is None else tuple(train)
        if not learns or not set(learns) <= set(PARTS):
            raise UserError(f"train={list(learns)}: name some of {', '.join(PARTS)}")
        if cache_features and "vision" in learns:
            raise UserError("cache_features=true is for an image encoder that does not learn: take vision out of train")
        self.model, self.stage, self.cache_features = model, stage, cache_features
        self._kept: dict[int, Tensor] = {}
        self._known: Tensor | None = None
        self._told = False
        if weights is not None:
            load(model, weights)
        model.freeze(*(part for part in PARTS if part not in learns))

    def step(self, batch: Batch, progress: float) -> Step:
        nll, labels = self._nll(batch)
        return with_experts(mean_over_tokens(nll, labels), self.model.decoder)

    def after_step(self, progress: float) -> None:
        balance_(self.model.decoder)

    def after_skip(self) -> None:
        forget_(self.model.decoder)

    def nll(self, batch: Batch) -> Tensor:
        """Nats (B, L') float32 of every label, L' with the tokens of the images; 0 where none is scored."""
        return self._nll(batch)[0]

    def _nll(self, batch: Batch) -> tuple[Tensor, Tensor]:
        patches = self._patches(batch) if self.cache_features and self.training else None
        given: dict[str, Any] = {name: batch.get(name) for name in ("valid", "segments", "labels")}
        if patches is None:
            encoded, labels = self.model(batch["tokens"], batch.get("images"), **given)
        else:
            encoded, labels = self.model.spliced(batch["tokens"], self.model.connector(patches), **given)
        assert labels is not None
        return token_nll(encoded.tokens, self.model.decoder.head_weight, labels), labels

    def known_images(self, count: int) -> Tensor:
        """(count,) bool that processes share: training images whose features are kept from now on, none at first."""
        self._kept.clear()
        self._known = torch.zeros(count, dtype=torch.bool).share_memory_()
        return self._known

    def forget_images(self) -> None:
        """Features that are kept are kept no longer: the next images are those of a first pass."""
        self._kept.clear()
        if self._known is not None:
            self._known.zero_()

    @torch.no_grad()
    def _patches(self, batch: Batch) -> Tensor | None:
        """(N, P, Dv) of the images, None of none. Each goes through the encoder alone, so that no batch matters."""
        if self.model.vision_learns:
            raise UserError(
                "cache_features=true is for an image encoder that does not learn: leave it out of the tuning"
            )
        if not any(len(batch[name]) for name in ("images", "image_ids") if name in batch):
            return None
        if "image_ids" not in batch:
            raise UserError(
                "cache_features=true is for images that look the same in every pass: take views that draw nothing"
            )
        numbers, images = batch["image_ids"].tolist(), iter(batch["images"])
        given = batch["image_given"].tolist() if "image_given" in batch else [True] * len(numbers)
        for number, new in zip(numbers, given, strict=True):
            image = next(images) if new else None
            if image is not None and number not in self._kept:
                self._kept[number] = self.model.patches(image[None])[0]
                if self._known is not None:
                    self._known[number] = True
                if not self._told:
                    self._told = True
                    size = self._kept[number].numel() * self._kept[number].element_size() / 1024
                    log.warning("features of the frozen image encoder are kept in memory, %.0f KiB an image", size)
        return torch.stack([self._kept[number] for number in numbers])

    def answer(self, batch: Batch, end: int, *, max_tokens: int) -> Tensor:
        """(B, T) int64, T <= max_tokens: the likeliest first answer of each row; see `ssl_lab.types.Answers`.

        Raises:
            UserError: a row without an answer to stop at, or packed rows.
        """
        tokens, scored = batch["tokens"], batch["labels"] != IGNORE
        if "segments" in batch:
            raise UserError("answers are asked for row by row: set data.eval_views.pack=null")
        if not bool(scored.any(1).all()):
            raise UserError("a conversation has no answer that is left: set data.max_length higher")
        prompts = [row[: int(first) + 1] for row, first in zip(tokens, scored.long().argmax(1), strict=True)]
        counts = torch.stack([(row == self.model.image_token).sum() for row in tokens]).tolist()
        asked = [int((row == self.model.image_token).sum()) for row in prompts]
        visual = self.model.see(batch["images"]) if sum(asked) else None
        if visual is not None and asked != counts:  # images that come up after the first answer
            starts = [sum(counts[:i]) for i in range(len(counts))]
            visual = visual[[start + k for start, count in zip(starts, asked, strict=True) for k in range(count)]]
        steps = stream_seen(self.model, prompts, visual, max_new_tokens=max_tokens, eos=end, pad=end)
        return torch.stack(list(steps), 1)


def load(model: VisionLanguage, spec: str) -> None:
    """Fill `model` from a run of its method.

    Of a tuned run, whose checkpoints hold what learned alone, the whole is taken from the last.safetensors that it
    wrote at its end; until then the rest must be here already.

    Raises:
        UserError: no such run, parts of another kind or size (the message names the part), or a tuned run that has not
            ended and began with other weights than those of `model`.
    """
    path = Path(spec).expanduser()
    found = checkpoint.find(path) if path.exists() else None
    if found is None:
        raise UserError(f"weights={spec}: no run folder with a checkpoint, and no .ckpt: give a run of llava")
    content = checkpoint.read(found)
    state = {k.removeprefix("model."): v for k, v in content["state_dict"].items() if k.startswith("model.")}
    if BASE in content:
        state = _whole(model, state, content[BASE], found, spec)
    if not any(key.startswith("connector.") for key in state):
        raise UserError(f"{spec} is no run of llava: it has no connector")
    own = model.state_dict()
    for part in (*PARTS, ""):  # at last what belongs to none, such as the embedding of Flamingo's marker
        here, theirs = _of(part, own), _of(part, state)
        if problems := io.differences(here, theirs):
            what = f"another {part}" if part else "another kind of model"
            advice = f"set method.model.{part} as in its config.yaml" if part else "give a run of the same method"
            raise UserError(f"{spec} has {what}: {'; '.join(problems[:3])}; {advice}")
    model.load_state_dict(state)


def _of(part: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What belongs to a part, under names within it; "" = what belongs to none."""
    if part:
        return {key.removeprefix(f"{part}."): v for key, v in state.items() if key.startswith(f"{part}.")}
    return {key: v for key, v in state.items() if key.partition(".")[0] not in PARTS}


def _whole(
    model: VisionLanguage, learned: dict[str, Tensor], base: Mapping[str, Any], file: Path, spec: str
) -> dict[str, Tensor]:
    """All weights of a tuned run, of which the checkpoint `file` holds those that `learned`."""
    ended = file.parent.parent / "last.safetensors"
    if ended.is_file():
        whole = read_safetensors(ended)[0]
        both = [name for name in learned if name in whole]
        same = all(torch.equal(learned[name], whole[name]) for name in both)
        if same if both else ended.stat().st_mtime >= file.stat().st_mtime:
            return whole
    own = model.state_dict()
    rest = {
        f"model.{name}": own[name] for name, _ in model.named_parameters(remove_duplicate=False) if name not in learned
    }
    if set(learned) <= set(own) and checksum(rest) == base.get("sha256"):
        return own | learned
    raise UserError(
        f"{spec} holds what learned alone, beside other weights than are there now: repeat its command until the run "
        "has ended, which writes the whole as last.safetensors"
    )
