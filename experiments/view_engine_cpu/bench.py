"""Time the views of a recipe beside torchvision and kornia: same images, same probabilities, same blur, one thread.

The processor time of the process counts, not the clock on the wall: other processes may run beside it.

python experiments/view_engine_cpu/bench.py --case simclr_224 --rounds 7 --out results.jsonl
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision.transforms.v2 as T
from PIL import ImageFilter
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F

from ssl_lab.cli import catalog
from ssl_lab.cli.compose import build, compose
from ssl_lab.data.draws import View
from ssl_lab.data.views import STATS, MultiView

NO_BLUR = ("first", "second", "local")
CASES: dict[str, tuple[str, tuple[int, int], int, int, list[str]]] = {  # recipe, image, side, images a round, overrides
    "simclr_224": ("simclr", (375, 500), 224, 16, []),
    "dino_globals_224": ("dino", (375, 500), 224, 16, ["data.views.local.count=0"]),
    "dino_224": ("dino", (375, 500), 224, 8, []),
    "simclr_32": ("simclr", (32, 32), 32, 128, ["data.views.both.blur_p=0"]),
    "dino_32": ("dino", (32, 32), 32, 64, [f"data.views.{name}.blur_p=0" for name in NO_BLUR]),
}


def pictures(count: int, height: int, width: int) -> Tensor:
    """(count, 3, height, width) uint8: coarse noise, enlarged, so that neighbours are alike as in a photograph."""
    torch.manual_seed(0)
    coarse = torch.rand(count, 3, max(4, height // 8), max(4, width // 8)) * 255
    return F.resize(coarse, [height, width], antialias=True).clamp(0, 255).byte()


class PilBlur(nn.Module):
    """PIL's own blur, whose radius is the standard deviation: what the code of DINO and MoCo uses."""

    def __init__(self, sigma: tuple[float, float]):
        super().__init__()
        self.sigma = sigma

    def forward(self, image):  # type: ignore[no-untyped-def]
        radius = self.sigma[0] + (self.sigma[1] - self.sigma[0]) * float(torch.rand(()))
        return image.filter(ImageFilter.GaussianBlur(radius))


def torchvision_view(view: View, size: int, kind: str, taps: int, stats: str) -> nn.Module:
    """One view as a chain of torchvision v2; `kind`: uint8, float (from after the crop on) or pil."""
    low, high = view.blur_sigma
    chain: list[nn.Module] = [
        T.RandomResizedCrop(size, tuple(view.scale), interpolation=T.InterpolationMode.BICUBIC, antialias=True),
        T.RandomHorizontalFlip(view.hflip),
    ]
    if kind == "float":
        chain.append(T.ToDtype(torch.float32, scale=True))
    chain.append(T.RandomApply([T.ColorJitter(*view.jitter)], view.jitter_p))
    chain.append(T.RandomGrayscale(view.grey_p))
    if view.blur_p:
        blur = PilBlur((low, high)) if kind == "pil" else T.GaussianBlur(taps, (low, high))
        chain.append(T.RandomApply([blur], view.blur_p))
    if view.solarize_p:
        chain.append(T.RandomSolarize(128 / 255 if kind == "float" else 128, view.solarize_p))
    if kind == "pil":
        chain.append(T.PILToTensor())
    if kind != "float":
        chain.append(T.ToDtype(torch.float32, scale=True))
    return T.Compose([*chain, T.Normalize(*STATS[stats])])


def kornia_view(view: View, size: int, taps: int, stats: str) -> nn.Module:
    """One view as a chain of kornia's augmentations of a float batch, each sample with its own draws."""
    import kornia.augmentation as K

    b, c, s, h = view.jitter
    chain: list[nn.Module] = [
        K.RandomResizedCrop((size, size), tuple(view.scale), resample="bicubic"),
        K.RandomHorizontalFlip(p=view.hflip),
        K.ColorJitter(b, c, s, h, p=view.jitter_p),
        K.RandomGrayscale(p=view.grey_p),
    ]
    if view.blur_p:
        chain.append(K.RandomGaussianBlur((taps, taps), tuple(view.blur_sigma), p=view.blur_p))
    if view.solarize_p:
        chain.append(K.RandomSolarize(0.0, 0.0, p=view.solarize_p))
    return nn.Sequential(*chain, K.Normalize(*map(list, STATS[stats])))


def pipelines(views: MultiView, images: Tensor) -> dict[str, Callable[[int], list[Tensor]]]:
    """Name -> a function of the round that makes all views of all images."""
    count = len(images)
    kinds = [(view, size) for view, size in views.kinds for _ in range(view.count)]
    planes, pixels = list(images), [x.permute(1, 2, 0).contiguous().permute(2, 0, 1) for x in images]
    made: dict[str, Callable[[int], list[Tensor]]] = {
        "ours": lambda n: views(images, torch.arange(n * count, (n + 1) * count), 0)["views"],
        "ours, list": lambda n: views(planes, torch.arange(n * count, (n + 1) * count), 0)["views"],
        "ours, list of interleaved": lambda n: views(pixels, torch.arange(n * count, (n + 1) * count), 0)["views"],
    }

    def one_by_one(kind: str, samples: list) -> Callable[[int], list[Tensor]]:  # type: ignore[type-arg]
        chains = [torchvision_view(view, size, kind, 2 * view.radius(size) + 1, views.stats) for view, size in kinds]
        return lambda n: [torch.stack([chain(sample) for sample in samples]) for chain in chains]

    for kind in ("uint8", "float"):
        made[f"torchvision {kind}"] = one_by_one(kind, planes)
        made[f"torchvision {kind}, interleaved"] = one_by_one(kind, pixels)
    made["torchvision on PIL, PIL blur"] = one_by_one("pil", [F.to_pil_image(x) for x in images])
    try:
        chains = [kornia_view(view, size, 2 * view.radius(size) + 1, views.stats) for view, size in kinds]
        made["kornia"] = lambda n: [chain(images.float().div_(255)) for chain in chains]
    except ImportError:
        print("kornia is not installed: left out")
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=list(CASES), required=True)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help="names that contain this")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    recipe, (height, width), side, count, overrides = CASES[args.case]
    words = ["method=mae", f"views@data.views={recipe}", f"data.image_size={side}", *overrides]
    views = build(compose("train", words, [catalog.conf_folder()]).data.views)
    made = {k: f for k, f in pipelines(views, pictures(count, height, width)).items() if args.only in k}
    times: dict[str, list[float]] = {name: [] for name in made}
    for turn in range(args.rounds + 1):
        for name, make in made.items():
            torch.manual_seed(turn)
            start = time.process_time()
            make(turn)
            if turn:  # the first round warms up
                times[name].append((time.process_time() - start) / count * 1e3)
    middle = {name: statistics.median(values) for name, values in times.items()}
    for name, value in middle.items():
        print(f"{args.case:18s} {name:32s} {value:8.3f} ms per image   {value / middle[next(iter(made))]:6.2f} x")
    if args.out:
        shown = {name: [round(value, 4) for value in values] for name, values in times.items()}
        record = {"case": args.case, "sizes": views.sizes, "images": count, "ms_per_image": shown}
        with args.out.open("a") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
