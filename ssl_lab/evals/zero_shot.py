"""Zero-shot classification: is an image nearest to the words for its class?"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_lab.errors import UserError
from ssl_lab.evals.base import Common, Round, Skip, accuracy
from ssl_lab.evals.texts import Encode, embed_texts, encoder_of
from ssl_lab.types import EmbedsPairs

TEMPLATES = (
    "{}",
    "a photo of a {}.",
    "a picture showing a {}.",
    "a close view of a {}.",
    "a {} seen from far away.",
    "a drawing of a {}.",
    "a blurry image of a {}.",
    "an image of one {} in full light.",
)
_TOLD = 10  # templates that are written out in the protocol


@dataclass(frozen=True)
class ZeroShot(Common):
    """Test images go to the class whose prompts are nearest by cosine similarity (Radford et al., 2021).

    A class is the mean of its prompts' unit-length embeddings, brought to unit length again.

    Args:
        templates: texts with {} for the name of a class, or a file with one in each line; None = those of the data set
            if it has its own, else eight of ours.
        names: file with the names of the classes in the order of the targets, one in each line or a JSON list; None =
            those of the data set, with spaces for underscores.
        encode: makes tokens of texts, such as `ssl_lab.data.pairs_text.CaptionEncoder`; None = that of the data's
            captions. Data without captions need it.
    """

    templates: Sequence[str] | str | None = None
    names: str | None = None
    encode: Any = None
    needs: ClassVar[type] = EmbedsPairs

    @property
    def protocol(self) -> dict[str, Any]:
        """Settings that the values depend on."""
        given = None if self.templates is None else _templates(self.templates)
        told: Any = "the data set's, else the default" if given is None else given
        if given is not None and len(given) > _TOLD:
            told = f"{len(given)}, from {given[0]!r} to {given[-1]!r}"
        return {
            "similarity": "cosine",
            "class": "mean of the unit-length embeddings of its prompts",
            "templates": told,
            "names": self.names or "the data set's",
            "limit": self.limit,
        }

    def run(self, round: Round) -> dict[str, float]:
        """Percent of test rows: `top1`, `top5`, and `class_mean`, the mean over classes of their own top1.

        Where training leaves out classes on purpose, `held_out` is the top1 of these and `seen` that of the others, all
        classes being offered to both. Details say what chance gives.

        Raises:
            Skip: no classes, or no tokenizer.
            UserError: names or templates that do not fit.
        """
        if not round.data.classes:
            raise Skip("the data have no classes")
        encode: Encode = self.encode or encoder_of(round)
        source: Any = getattr(round.data, "test", None)
        default = getattr(source, "templates", None) or TEMPLATES
        templates = list(default) if self.templates is None else _templates(self.templates)
        names = [x.replace("_", " ") for x in round.data.classes] if self.names is None else _names(self.names)
        if len(names) != (count := len(round.data.classes)):
            raise UserError(f"eval.zero_shot.names={self.names}: it has {len(names)} names, the data {count} classes")
        test = round.only_labelled(round.image_embeddings("test", self.limit), "test").to(round.device)
        scores = test.x @ class_embeddings(round, names, templates, encode).to(test.x.device).T
        values = accuracy(scores, test.y)
        right = scores.argmax(1) == test.y
        own = [float(right[test.y == c].double().mean()) for c in test.y.unique().tolist()]
        values["class_mean"] = 100.0 * sum(own) / len(own)
        held_out = torch.tensor(getattr(source, "held_out", []), dtype=torch.int64, device=test.y.device)
        unseen = torch.isin(test.y, held_out)
        if unseen.any() and not unseen.all():
            values |= {"held_out": 100.0 * float(right[unseen].double().mean())}
            values |= {"seen": 100.0 * float(right[~unseen].double().mean())}
        chance, largest = 100.0 / len(names), 100.0 * float(test.y.bincount().max()) / len(test.y)
        round.notes.append(f"chance is {chance:.3g} %, always the largest class {largest:.3g} %")
        return values | {"chance/top1": chance, "chance/largest_class": largest}


def class_embeddings(round: Round, names: Sequence[str], templates: Sequence[str], encode: Encode) -> Tensor:
    """(C, E) float32 of unit length: the mean over the templates of unit-length embeddings of each class's prompts."""
    prompts = [template.replace("{}", name) for name in names for template in templates]
    x = F.normalize(embed_texts(round, prompts, encode), dim=1).view(len(names), len(templates), -1)
    return F.normalize(x.mean(1), dim=1)


def _templates(given: Sequence[str] | str) -> list[str]:
    found = _lines("templates", given) if isinstance(given, str) else list(given)
    if not found or (bad := next((x for x in found if "{}" not in x), None)) is not None:
        shown = repr(bad) if found else "there is none"
        raise UserError(f"eval.zero_shot.templates: every template holds {{}} for the name of a class: {shown}")
    return found


def _names(file: str) -> list[str]:
    if not file.endswith(".json"):
        return _lines("names", file)
    try:
        found = json.loads(Path(file).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"eval.zero_shot.names={file}: {error}") from None
    if not isinstance(found, list):
        raise UserError(f"eval.zero_shot.names={file}: it must hold a list of names")
    return [str(x) for x in found]


def _lines(key: str, file: str) -> list[str]:
    try:
        text = Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"eval.zero_shot.{key}={file} cannot be read ({error}): give a text file") from None
    return [line.strip() for line in text.splitlines() if line.strip()]
