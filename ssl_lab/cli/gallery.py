"""The page of pictures that `ssl-lab evaluate` leaves behind: what an encoder has learned, to look at."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssl_lab.analysis.attention import attention_maps, heat
from ssl_lab.analysis.embedding import Projection, projected, scatter, thumbnails
from ssl_lab.analysis.neighbours import nearest, neighbour_grid
from ssl_lab.analysis.page import Picture, write_page
from ssl_lab.analysis.pairs import caption_grid, similarity_matrix
from ssl_lab.analysis.pictures import feature_maps
from ssl_lab.data.views import STATS
from ssl_lab.errors import UserError
from ssl_lab.evals.base import Precision, Round, Skip, moved
from ssl_lab.evals.features import Features
from ssl_lab.evals.texts import captions_of, embed_texts, encoder_of
from ssl_lab.nn.mode import evaluating
from ssl_lab.pictures import save_png, side_by_side, unnormalize
from ssl_lab.types import Embeds, EmbedsPairs

_SHOWN, _NEIGHBOURS = 8, 8  # images with features, attention, neighbours; and neighbours of each
_POINTS, _SMALL = 2000, 400  # test images on the map, and small images tried there
_BANK = 2000  # rows to search where no evaluator asked for all of them
_PAIRS = 10  # images with captions that are compared with each other


class Gallery:
    """Draws one method in one round, whose features it shares.

    Args:
        round: after the evaluators have run.
        projection: of the map, "pca" or "umap".
        seed: of UMAP.
    """

    def __init__(self, round: Round, projection: Projection = "pca", seed: int = 0) -> None:
        self.round, self.data, self.projection, self.seed = round, round.data, projection, seed
        self.encoder = getattr(round.method, "encoder", None)
        self.notes: list[str] = []

    def write(self, folder: Path, title: str, table: Sequence[Sequence[str]] = ()) -> Path:
        """Draw into `folder`; gives the page that shows it all, and says there what could not be drawn.

        Raises:
            UserError: UMAP is asked for and not installed.
        """
        pictures = []
        with evaluating(self.round.method), torch.no_grad():
            for part in (self._pairs, self._neighbours, self._map, self._attention, self._features):
                for drawn, picture in part():
                    save_png(folder / picture.file, drawn)
                    pictures.append(picture)
        return write_page(folder, title, pictures, notes=self.notes, table=table)

    def _pairs(self) -> Iterator[tuple[Tensor, Picture]]:
        if not isinstance(self.round.method, EmbedsPairs):
            return
        try:
            encode = encoder_of(self.round)
            bank = self.round.image_embeddings("test", self.round.images_at_hand("test"))
            some = bank.spread(_PAIRS)
            captions = [x[0] for x in captions_of(self.round, some.index.tolist())]
        except Skip as reason:
            self.notes.append(f"No captions: {reason}.")
            return
        texts = embed_texts(self.round, captions, encode)
        best = nearest(bank.x, texts, _NEIGHBOURS)
        found = self._images("test", bank.index[best.flatten()]).unflatten(0, best.shape)
        yield (
            caption_grid(captions, found, bank.index[best] == some.index[:, None]),
            Picture(
                "captions.png",
                "Best images for a caption",
                f"First captions of test images and the nearest of {len(bank.y):,} test images, best first. Green: the "
                "image that the caption was written for.",
            ),
        )
        yield (
            similarity_matrix(texts @ some.x.T, self._images("test", some.index), captions),
            Picture(
                "similarity.png",
                "Captions and images",
                "Cosine similarity of some captions with some images; framed where they belong together.",
            ),
        )

    def _neighbours(self) -> Iterator[tuple[Tensor, Picture]]:
        if not isinstance(self.round.method, Embeds):
            self.notes.append(f"No neighbours and no map: {type(self.round.method).__name__} does not embed.")
            return
        bank, test = (self.round.at_hand(split, _BANK) for split in ("train", "test"))
        queries = test.spread(_SHOWN)
        rows = nearest(bank.x, queries.x, _NEIGHBOURS)
        found = self._images("train", bank.index[rows.flatten()]).unflatten(0, rows.shape)
        labelled = bool((queries.y >= 0).any() and (bank.y >= 0).any())
        colours = " Green: the class of the query. Red: another class." if labelled else ""
        yield (
            neighbour_grid(self._images("test", queries.index), found, queries.y, bank.y[rows]),
            Picture(
                "neighbours.png",
                "Nearest neighbours",
                f"Test images and the nearest of {len(bank.y):,} training images by cosine similarity of the features, "
                f"best first.{colours}",
            ),
        )

    def _map(self) -> Iterator[tuple[Tensor, Picture]]:
        if not isinstance(self.round.method, Embeds):
            return
        test: Features = self.round.at_hand("test", _BANK).spread(_POINTS)
        points, axes = projected(test.x, self.projection, self.seed)
        labelled = bool((test.y >= 0).any())
        by = "coloured by class" if labelled else "without labels"
        yield (
            scatter(points, test.y, self.data.classes if labelled else ()),
            Picture("map.png", "Map of the embedding", f"{len(test.y):,} test images, {by}: {axes}."),
        )
        some = torch.arange(len(points))[: _SMALL * max(1, len(points) // _SMALL) : max(1, len(points) // _SMALL)]
        yield (
            thumbnails(points[some], self._images("test", test.index[some])),
            Picture("map_images.png", "The same map in images", "Where images would overlap, one is shown."),
        )

    def _attention(self) -> Iterator[tuple[Tensor, Picture]]:
        if not isinstance(self.encoder, nn.Module):
            self.notes.append(f"No attention maps: {type(self.round.method).__name__} has no encoder.")
            return
        batch = self._batch()
        try:
            with self._precision():
                maps = attention_maps(self.encoder, batch)
        except UserError as error:
            self.notes.append(f"No attention maps: {error}.")
            return
        drawn = heat(maps, batch.shape[-2:]).cpu()
        columns = {"input": self._pixels(batch)} | {f"head {i + 1}": drawn[:, i] for i in range(maps.shape[1])}
        asks = "class token" if getattr(self.encoder, "cls_token", None) is not None else "mean over all patches"
        yield (
            side_by_side(columns),
            Picture(
                "attention.png",
                "Attention of the last block",
                f"How much the {asks} attends to each patch, for each head; light = the head's largest weight.",
            ),
        )

    def _features(self) -> Iterator[tuple[Tensor, Picture]]:
        if not isinstance(self.encoder, nn.Module):
            return
        batch = self._batch()
        try:
            with self._precision():
                maps = feature_maps(self.encoder, batch)
        except UserError as error:
            self.notes.append(f"No feature map: {error}.")
            return
        yield (
            side_by_side({"input": self._pixels(batch), "features": maps.cpu()}),
            Picture(
                "features.png",
                "Patch features as colours",
                "The first three principal components of all patch features: like colours mean like features.",
            ),
        )

    def _precision(self) -> AbstractContextManager[Any]:
        precision: Precision = self.round.precision
        return precision()

    def _batch(self) -> Tensor:
        """A few test images as the encoder sees them, (B, C, H, W) on its device."""
        batch = next(iter(self.data.eval_loader("test", _SHOWN)))
        return moved(batch, self.round.device, self.round.dtype)["image"][:_SHOWN]

    def _images(self, split: str, rows: Tensor) -> Tensor:
        """Images at these rows of a split as a person sees them, (B, 3, H, W) uint8."""
        data: Any = self.data
        source = data.train if split == "train" else data.test
        parts = [data.eval_views(source.read(part.tolist()).data, part, 0)["image"] for part in rows.split(64)]
        return self._pixels(torch.cat(parts))

    def _pixels(self, image: Tensor) -> Tensor:
        data: Any = self.data
        return unnormalize(image, *STATS[data.eval_views.stats]).cpu()
