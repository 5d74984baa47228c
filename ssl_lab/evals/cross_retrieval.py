"""Retrieval across image, text and sound: does a caption find its image, and an image one of its captions?"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_lab.evals.base import Common, Round
from ssl_lab.evals.texts import Encode, captions_of, embed_texts, encoder_of
from ssl_lab.types import EmbedsPairs

_CELLS = 1 << 22  # similarities at a time: 16 MiB, and a few times that on the way


@dataclass(frozen=True)
class CrossRetrieval(Common):
    """Every test image ranks all test captions, and every caption all images, by cosine similarity.

    A method with more modalities is judged by each two of them: the first spoken caption of each image finds its image
    and one of its written captions, and the other way.

    Args:
        at: cut-offs k of recall@k.
        identical: captions with the same words stand for each other: an image is also found by another image's caption
            if it is one of its own too. Off, only a caption's own image counts, as is usual.
        max_captions: of each image, its first ones; None = all. 5 is usual for Flickr and COCO.
        encode: makes tokens of texts; None = as the data do it.
    """

    at: Sequence[int] = (1, 5, 10)
    identical: bool = False
    max_captions: int | None = None
    encode: Any = None
    needs: ClassVar[type] = EmbedsPairs

    @property
    def protocol(self) -> dict[str, Any]:
        """Settings that the values depend on."""
        return {
            "similarity": "cosine, ties count against",
            "candidates": "all test captions, all test images",
            "identical captions stand for each other": bool(self.identical),
            "max_captions": self.max_captions,
            "at": [int(k) for k in self.at],
            "limit": self.limit,
        }

    def run(self, round: Round) -> dict[str, float]:
        """Percent: `image_k`, captions with their image among the first k; `text_k`, images with one of their captions.

        Of sound `image_by_audio_k` and `audio_by_image_k`, `text_by_audio_k` and `audio_by_text_k`: what is found, by
        what. Details say what chance gives.

        Raises:
            Skip: the test split has no captions.
        """
        encode: Encode = self.encode or encoder_of(round)
        images = round.image_embeddings("test", self.limit)
        captions = [x[: self.max_captions] for x in captions_of(round, images.index.tolist())]
        texts = [text for of_one in captions for text in of_one]
        owner = torch.tensor([i for i, of_one in enumerate(captions) for _ in of_one])
        round.samples["captions"] = len(texts)
        text, image = relevant(owner, texts if self.identical else None)
        embedded = embed_texts(round, texts, encode).to(round.device)
        pictures = images.x.to(round.device)
        values, chance = self._found(pictures, embedded, text, image, ("image", "text"))
        method: Any = round.method
        for name in getattr(method, "others", ()):
            other = round.extract(functools.partial(method.embed_other, name), "test", self.limit)
            assert torch.equal(other.index, images.index)
            heard, own, said = other.x.to(round.device), torch.arange(len(images.y)), None
            if self.identical and (spoken := getattr(getattr(round.data, "test", None), "spoken", None)) is not None:
                said = [of_one[0] for of_one in spoken(images.index.tolist())]
            for first, second, pair, names in (
                (pictures, heard, relevant(own, said), (f"image_by_{name}", f"{name}_by_image")),
                (heard, embedded, (text, image), (f"{name}_by_text", f"text_by_{name}")),
            ):
                more, by_luck = self._found(first, second, *pair, names)
                values |= more
                chance |= by_luck
        told = ", ".join(f"{key.partition('/')[2]} {value:.2g} %" for key, value in chance.items())
        round.notes.append(f"{len(texts):,} captions of {len(images.y):,} images; chance gives {told}")
        return values | chance

    def _found(
        self, images: Tensor, texts: Tensor, text: Tensor, image: Tensor, names: tuple[str, str]
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Recalls by either side, and what chance gives; arguments as `first_ranks`, names of what is found."""
        ranks = first_ranks(images, texts, text, image)
        counts = (text.bincount(minlength=len(texts)), image.bincount(minlength=len(images)))
        values, chance = dict[str, float](), dict[str, float]()
        for name, key, count, among in zip(names, ("image", "text"), counts, (len(images), len(texts)), strict=True):
            for k in self.at:
                values[f"{name}_{k}"] = 100.0 * float((ranks[key] <= k).double().mean())
                chance[f"chance/{name}_{k}"] = 100.0 * by_chance(count.tolist(), among, k)
        return values, chance


def relevant(owner: Tensor, texts: Sequence[str] | None = None) -> tuple[Tensor, Tensor]:
    """The image of each of T texts, (T,) int64 -> what belongs together: texts (P,) and images (P,) int64.

    With the `texts` themselves, those with the same words belong to all the images that one of them belongs to.
    """
    if texts is None:
        return torch.arange(len(owner)), owner
    images: dict[str, dict[int, None]] = {}
    for text, image in zip(texts, owner.tolist(), strict=True):
        images.setdefault(text, {})[image] = None
    pairs = [(t, image) for t, text in enumerate(texts) for image in images[text]]
    return torch.tensor([t for t, _ in pairs]), torch.tensor([image for _, image in pairs])


def first_ranks(images: Tensor, texts: Tensor, text: Tensor, image: Tensor) -> dict[str, Tensor]:
    """Ranks, counted from 1, of the first right answer among all candidates; equal similarities count against it.

    Args:
        images: (I, E), of any length.
        texts: (T, E).
        text: (P,) int64, texts that belong
        image: to these images (P,) int64; every image and every text is among them.

    Returns:
        `image` (T,) int64: of each text's best right image; `text` (I,) int64: of each image's best right text.
    """
    images, texts = F.normalize(images.float(), dim=1), F.normalize(texts.float(), dim=1)
    text, image = text.to(images.device), image.to(images.device)
    return {"image": _ranks(texts, images, text, image), "text": _ranks(images, texts, image, text)}


def by_chance(right: Sequence[int], among: int, k: int) -> float:
    """Share of queries that have one of their right answers among the first k of a random order."""
    k = min(k, among)
    missed = {r: math.comb(among - r, k) / math.comb(among, k) for r in set(right)}
    return 1.0 - sum(missed[r] for r in right) / len(right)


def _ranks(queries: Tensor, bank: Tensor, query: Tensor, answer: Tensor) -> Tensor:
    """(Q,) int64 ranks; `query` (P,) and `answer` (P,) say which rows of the bank are right."""
    order = query.argsort(stable=True)
    query, answer = query[order], answer[order]
    found = []
    for start in range(0, len(queries), chunk := max(1, _CELLS // len(bank))):
        similarity = queries[start : start + chunk] @ bank.T
        ends = torch.tensor([start, start + len(similarity)], device=query.device)
        first, last = torch.searchsorted(query, ends).tolist()
        right = torch.zeros_like(similarity, dtype=torch.bool)
        right[query[first:last] - start, answer[first:last]] = True
        best = similarity.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        found.append(1 + ((similarity >= best) & ~right).sum(1))
    return torch.cat(found)
