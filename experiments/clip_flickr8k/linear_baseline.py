"""Retrieval by a linear map from pixels to words: what a contrastive model has to beat.

python linear_baseline.py <path of captioned images> [caption column]

Images of 32 x 32 pixels, 256 principal components; captions as tf-idf of their words, 128 singular directions; ridge
regression from the one to the other, its strength chosen on a tenth of the training images.
"""

import json
import re
import sys
from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_lab.data.pairs import Pairs
from ssl_lab.evals.cross_retrieval import first_ranks, relevant

SIDE, COMPONENTS, DIRECTIONS, LEAST = 32, 256, 128, 2
RIDGES = (1e0, 1e1, 1e2, 1e3, 1e4)


def pixels(source: Pairs) -> Tensor:
    """(N, 3 * SIDE * SIDE) float64."""
    rows = []
    for start in range(0, len(source), 64):
        images = source.read(range(start, min(start + 64, len(source)))).data
        small = [F.interpolate(x[None].double() / 255, (SIDE, SIDE), mode="area") for x in images]
        rows.append(torch.cat(small).flatten(1))
    return torch.cat(rows)


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def tf_idf(texts: list[str], index: dict[str, int], weight: Tensor) -> Tensor:
    found = torch.zeros(len(texts), len(index), dtype=torch.float64)
    for row, text in enumerate(texts):
        for word in words(text):
            if word in index:
                found[row, index[word]] += 1
    return F.normalize(found.log1p() * weight)


def recalls(images: Tensor, texts: Tensor, owner: Tensor) -> dict[str, float]:
    ranks = first_ranks(images, texts, *relevant(owner))
    return {f"{name}_{k}": 100 * float((ranks[name] <= k).double().mean()) for name in ranks for k in (1, 5, 10)}


def main(path: str, column: str | None = None) -> None:
    train, test = (Pairs(path, split=split, caption_column=column) for split in ("train", "test"))
    captions = {split: each.captions(range(len(each))) for split, each in (("train", train), ("test", test))}
    texts = {split: [text for of_one in each for text in of_one] for split, each in captions.items()}
    owner = {s: torch.tensor([i for i, of_one in enumerate(c) for _ in of_one]) for s, c in captions.items()}

    counts = Counter(word for text in texts["train"] for word in set(words(text)))
    index = {word: i for i, word in enumerate(w for w, n in counts.items() if n >= LEAST)}
    weight = torch.tensor([len(texts["train"]) / counts[word] for word in index], dtype=torch.float64).log()
    vectors = {split: tf_idf(each, index, weight) for split, each in texts.items()}
    middle = vectors["train"].mean(0)
    directions = torch.linalg.svd(vectors["train"] - middle, full_matrices=False).Vh[:DIRECTIONS].T
    said = {split: F.normalize((each - middle) @ directions) for split, each in vectors.items()}
    goal = torch.zeros(len(train), said["train"].shape[1], dtype=torch.float64)
    goal = goal.index_reduce(0, owner["train"], said["train"], "mean", include_self=False)

    seen = {"train": pixels(train), "test": pixels(test)}
    mean, std = seen["train"].mean(0), seen["train"].std(0) + 1e-6
    seen = {split: (x - mean) / std for split, x in seen.items()}
    basis = torch.linalg.svd(seen["train"], full_matrices=False).Vh[:COMPONENTS].T
    seen = {split: x @ basis for split, x in seen.items()}

    def fit(x: Tensor, y: Tensor, ridge: float) -> Tensor:
        return torch.linalg.solve(x.T @ x + ridge * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y)

    kept = torch.arange(len(train)) % 10 != 0
    own = ~kept[owner["train"]]
    place = torch.cumsum(~kept, 0) - 1

    def judged(ridge: float) -> float:
        guess = seen["train"][~kept] @ fit(seen["train"][kept], goal[kept], ridge)
        found = recalls(guess, said["train"][own], place[owner["train"][own]])
        return found["image_10"] + found["text_10"]

    ridge = max(RIDGES, key=judged)
    found = recalls(seen["test"] @ fit(seen["train"], goal, ridge), said["test"], owner["test"])
    print(json.dumps({"ridge": ridge, **{name: round(value, 2) for name, value in found.items()}}))


if __name__ == "__main__":
    main(*sys.argv[1:])
