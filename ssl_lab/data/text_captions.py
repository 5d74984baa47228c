"""Sentences about the shapes world: text for every kind of task, made up, so that all can be tried offline."""

import re
from dataclasses import fields
from functools import lru_cache
from typing import Any

import torch

from ssl_lab.data.shapes_layout import SHAPES, Layout, layout
from ssl_lab.data.shapes_words import describe
from ssl_lab.rng import fold

_SCENES = {"train": 5000, "test": 500}
_NOUN_PHRASE = re.compile(rf"\ba ((?:\w+ )+?)({'|'.join([*SHAPES, 'background'])})\b")


@lru_cache(maxsize=2)
def table(split: str) -> dict[str, list[Any]]:
    """One row for each scene of `split` (train | test), as columns. They go by the usual names of such columns.

    `text` and `context`: all that is said about the scene, a document. `sentence`: one of its sentences, `label`: the
    shape of the large object. `noun_first`: the sentence in a language where a noun precedes its adjectives and needs
    no article. `question`, `answer`, `answer_start`: what can be read off the context, from that character on.
    """
    index = torch.arange(_SCENES[split])
    scenes = layout(fold(0, 0x7E87, split == "test"), index, 1)  # pictures of one pixel: only their words are used
    rows = []
    for i in index.tolist():
        one = Layout(**{f.name: getattr(scenes, f.name)[i : i + 1] for f in fields(Layout)})
        scene = describe(one.noise[0], one)
        text = " ".join(f"{caption}." for caption in scene.captions)
        asked = [(q, a, found.start()) for q, a in scene.questions if (found := re.search(rf"\b{a}\b", text))]
        sentence, (question, answer, start) = scene.captions[i % len(scene.captions)], asked[i % len(asked)]
        noun_first = _NOUN_PHRASE.sub(lambda m: " ".join([m[2], *reversed(m[1].split())]), sentence)
        rows.append((text, text, sentence, scene.attributes["shape"], noun_first, question, answer, start))
    names = ("text", "context", "sentence", "label", "noun_first", "question", "answer", "answer_start")
    return {name: list(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
