"""Every command in README and docs is run, in the order of its page, at toy size and offline."""

import re
import shlex
import wave
from importlib.util import find_spec
from pathlib import Path

import pytest
from torchvision.transforms.v2.functional import to_pil_image

from ssl_lab.cli.main import main
from ssl_lab.data.shapes import Shapes

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "data/README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```bash\n(.*?)^```", re.M | re.S)
VERBS = (
    "train",
    "evaluate",
    "generate",
    "chat",
    "demo",
    "plan",
    "scaling",
    "transcribe",
    "export",
    "bench",
    "tokenizer",
    "shards",
    "list",
    "doctor",
)
TOY = {
    "duration": "2steps",
    "data.batch_size": "8",
    "data.num_workers": "0",
    "trainer.enable_progress_bar": "false",
    "eval": "[collapse]",
}
VIT = {"method.encoder.depth": "1", "method.encoder.dim": "32", "method.encoder.num_heads": "2"}
BACKBONE = {name.replace("encoder", "backbone").removeprefix("method."): value for name, value in VIT.items()}
DECODER = {"method.decoder.depth": "1", "method.decoder.dim": "32", "method.decoder.num_heads": "2"}
PAIR = {f"method.{tower}.{name}": value for tower in ("image", "text") for name, value in BACKBONE.items()}
MODEL = {f"method.model.{name.rpartition('.')[2]}": value for name, value in VIT.items()}
SEEING = {
    **{name.replace("encoder", "model.vision"): value for name, value in VIT.items()},
    **{name.replace("decoder", "model.decoder"): value for name, value in DECODER.items()},
    "eval": "[vqa]",
}
TEXT = r"(method=(masked_lm|seq2seq|span_\w+|text_class\w+)|experiment=(bert|t5)_)"
OWN = r"encoder=timm|backbone=resnet|llava|llama_|flamingo|method=(causal_lm|seq2seq|span_cor)|t5_"  # no VIT there
HEADS = {  # of methods: what they have beside the encoder, small
    **dict.fromkeys(("causal_lm", "llama"), DECODER),
    **{name: {"eval": "[wer]"} for name in ("ctc", "conformer")},
    **dict.fromkeys(("seq2seq", "span_corruption", "t5"), MODEL),
    "flamingo": SEEING,
    "llava": SEEING | {"method.model.layer": "-1"},
    "simclr": {"method.hidden": "32"},
    "moco": {"method.queue_size": "32"},
    "moco_v3": {"method.hidden": "32"},
    "dino": {"method.head.prototypes": "32", "method.head.hidden": "32", "data.views.local.count": "2"},
    "dinov2": {"method.head.prototypes": "32", "method.head.hidden": "32", "data.views.local.count": "2"},
    "ijepa": {"method.predictor.depth": "1", "method.predictor.dim": "32", "method.predictor.num_heads": "2"},
}
SHAPES = {"data.train.length": "64", "data.test.length": "32"}
SPOKEN = {key.replace(".length", ".source.length"): value for key, value in SHAPES.items()}
NETWORK = re.compile(
    r"clip:|timm:|hf:|gguf:|logger\.wandb\.mode=online|data=(cifar|stl|imagenet)|(cifar10(_r18)?|_in1k)\b|bench suite="
)
EXTRAS = {"spoken": "espeakng_loader"}  # what a command needs, where its name has this word
ELSEWHERE = ("pip install", "git clone", "cd ", "tensorboard", "torchrun", "wandb", "python", ".venv/bin/python")


def commands(page: Path) -> list[str]:
    """The lines of a page's bash fences, continued lines joined, comments dropped."""
    lines = "".join(BLOCK.findall(page.read_text())).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


def toy(words: list[str]) -> list[str]:
    """The same command, made small wherever it does not say otherwise."""
    verb = next((w for w in words if w in VERBS), "train")
    text = " ".join(words)
    if verb not in ("train", "bench", "plan", "evaluate") or "--help" in words:
        return words
    more: dict[str, str] = {}
    if verb != "evaluate":
        more |= {k: v for k, v in TOY.items() if verb == "train" or k.startswith("data.")}
        if not re.search(OWN, text):
            more |= PAIR if re.search(r"(experiment|method)=(clip|siglip)", text) else VIT
        chosen = re.search(r"(?:experiment|method)=(\w+)", text)
        names = [name for name in HEADS if chosen and re.fullmatch(rf"{name}(_(?!v3)\w+)?", chosen[1])]
        more |= HEADS[names[0]] if names else {}
        if re.search(r"(experiment=(mae|quickstart)|method=mae)", text):
            more |= DECODER
    if not re.search(rf"folder|ckpt=|data\.path=|{TEXT}", text):
        more |= SPOKEN if "spoken" in text else SHAPES
    words = ["duration=4steps" if w.startswith("duration=") else w for w in words]
    given = {w.split("=")[0].lstrip("+") for w in words}
    return [*words, *(f"{k}={v}" for k, v in more.items() if k not in given)]


def photos(folder: Path) -> None:
    """Two classes of twelve small pictures, and a table of captions for them."""
    samples = Shapes("train", 24).read(range(24))
    for i, image in enumerate(samples.data):
        path = folder / ("cats", "dogs")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        to_pil_image(image).resize((40, 40)).save(path)
    rows = (
        f"photos/{('cats', 'dogs')[i % 2]}/{i}.png,picture {i} of one of the {('cats', 'dogs')[i % 2]}"
        for i in range(24)
    )
    (folder.parent / "captions.csv").write_text("\n".join(["image,caption", *rows]))


def recordings(folder: Path) -> None:
    """A recording, a folder of two, transcripts of them, and an n-gram of words."""
    (folder / "recordings").mkdir()
    for name in ("recording.wav", "recordings/1.wav", "recordings/2.wav"):
        with wave.open(str(folder / name), "wb") as file:
            file.setparams((1, 2, 16000, 0, "NONE", ""))
            file.writeframes(bytes(i * i % 251 for i in range(16000)))
    rows = (f"recordings/{1 + i % 2}.wav,hum and rise" for i in range(24))
    (folder / "transcripts.csv").write_text("\n".join(["audio,transcript", *rows]))
    (folder / "words.arpa").write_text("\\1-grams:\n-1\t<unk>\n-1\thum\n-1\trise\n\\end\\\n")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_command_of_a_page_works(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "photos")
    recordings(tmp_path)
    lines = (f"{i} small red circles stand left of a square.\n" for i in range(9999))
    (tmp_path / "corpus.txt").write_text("".join(lines))
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    for command in commands(page):
        words = shlex.split(command)
        if words[0] == "make":
            assert words[1] in targets, command
            continue
        if words[0] != "ssl-lab":
            assert command.startswith(ELSEWHERE), f"{page.name}: no test knows how to run {command!r}"
            continue
        if re.search(r"transcribe|data=speech", command) and not find_spec("soundfile"):
            continue
        argv = toy(words[1:])
        lacking = [name for name, package in EXTRAS.items() if name in command and not find_spec(package)]
        if lacking or words[1] == "scaling" or (NETWORK.search(command) and "list" not in words):
            argv = [*words[1:], "--cfg", "job"]
        else:
            for name, seed in re.findall(r"runs/(\w+)/(\d+)", command):
                if not Path(f"runs/{name}/{seed}").exists() and (ROOT / f"conf/experiment/{name}.yaml").exists():
                    path = ["data.path=photos"] if "folder" in name else []
                    assert main(toy([f"experiment={name}", f"seed={seed}", *path])) == 0
        code = main(argv)
        assert code == 0, f"{page.name}: {command}\nrun as {argv}\n{capsys.readouterr().err}"
