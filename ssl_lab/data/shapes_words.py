"""What can be said and asked about a scene of the shapes world."""

from dataclasses import dataclass

from torch import Tensor

from ssl_lab.data.shapes_layout import BACKGROUNDS, COLORS, NUM_OBJECTS, SHAPES, TEXTURES, Layout

_SIDES = {(0, 1): "to the right of", (0, -1): "to the left of", (1, 1): "below", (1, -1): "above"}


@dataclass(slots=True)
class Thing:
    """One object in words; `side` is where it lies as seen from the main object (empty for the main object)."""

    shape: str
    color: str
    texture: str
    side: str = ""

    @property
    def words(self) -> str:
        """For example: striped red star."""
        return f"{self.color} {self.shape}" if self.texture == "plain" else f"{self.texture} {self.color} {self.shape}"


@dataclass(slots=True)
class Scene:
    """One scene: `image` (3, S, S) uint8, its attributes, sentences that describe it, and (question, answer) pairs."""

    image: Tensor
    attributes: dict[str, str]
    objects: list[Thing]
    captions: list[str]
    questions: list[tuple[str, str]]


def describe(image: Tensor, scene: Layout) -> Scene:
    """The words for a layout of one scene."""
    things = _things(scene)
    main, others = things[0], things[1:]
    ground = BACKGROUNDS[int(scene.ground[0])]
    attributes = {"shape": main.shape, "color": main.color, "texture": main.texture, "background": ground}
    attributes["count"] = str(len(things))
    return Scene(image, attributes, things, _captions(main, others, ground), _questions(main, others, ground))


def _things(scene: Layout) -> list[Thing]:
    things = []
    for i in range(NUM_OBJECTS):
        if not scene.present[0, i]:
            continue
        way = scene.center[0, i] - scene.center[0, 0]
        axis = int(way.abs().argmax())
        side = _SIDES[axis, 1 if way[axis] > 0 else -1] if i else ""
        names = SHAPES[int(scene.shape[0, i])], list(COLORS)[int(scene.color[0, i])], TEXTURES[int(scene.texture[0, i])]
        things.append(Thing(*names, side))
    return things


def _small(thing: Thing) -> str:
    return f"a small {thing.color} {thing.shape}"


def _captions(main: Thing, others: list[Thing], ground: str) -> list[str]:
    captions = [
        f"a large {main.words} on a {ground} background",
        f"there is a big {main.color} {main.shape} in the picture",
        " and ".join([f"a large {main.words}", *map(_small, others)]),
    ]
    captions += [f"{_small(x)} {x.side} a large {main.color} {main.shape}" for x in others]
    return captions


def _questions(main: Thing, others: list[Thing], ground: str) -> list[tuple[str, str]]:
    questions = [
        ("what shape is the largest object?", main.shape),
        (f"what color is the large {main.shape}?", main.color),
        (f"is the large {main.shape} striped?", "yes" if main.texture == "striped" else "no"),
        ("what is the texture of the largest object?", main.texture),
        ("how many objects are there?", str(1 + len(others))),
        ("what is the background like?", ground),
    ]
    smalls = [_small(x) for x in others]
    for x in others:
        if smalls.count(_small(x)) == 1:
            questions.append((f"where is the small {x.color} {x.shape}?", f"{x.side} the large {main.shape}"))
    named = [x.shape for x in (main, *others)]
    absent = [x for x in SHAPES if x not in named]
    asked = (named[-1], absent[len(main.color) % len(absent)])
    questions += [(f"is there a {x} in the picture?", "yes" if x in named else "no") for x in asked]
    return questions
