"""What goes wrong with pictures in a text is said in one line, with the part that is wrong and what to do."""

import json

import pytest
import torch
from parity import images
from test_conversations import bare
from test_llava import TINY
from test_vlm import MARK, small
from torchvision.transforms.v2.functional import to_pil_image

from ssl_lab.cli.main import main
from ssl_lab.data.conversation_tokenizer import with_marker
from ssl_lab.data.shapes import Shapes
from ssl_lab.errors import UserError

RUN = [*(word for word in TINY if not word.startswith("eval")), "eval=[]", "duration=1steps"]
TABLE = ["method=llava", *(word for word in RUN if not word.startswith(("data.t", "experiment")))]
ASKED = 'prompt="what shape?"'


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A run in `run`, a picture in scene.png, and files that are none."""
    folder = tmp_path_factory.mktemp("mistakes")
    assert main([*RUN, f"out={folder / 'run'}"]) == 0
    picture = to_pil_image(Shapes("test", 1).read([0]).data[0])
    picture.save(folder / "scene.png")
    whole = (folder / "scene.png").read_bytes()
    (folder / "half.png").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("no picture")
    return folder


@pytest.fixture
def says(home, monkeypatch, capsys):
    """Run a command line that has to be refused with one line; gives the line."""
    monkeypatch.chdir(home)

    def refused(*words):
        capsys.readouterr()
        assert main(list(words)) == 2
        told = capsys.readouterr().err.strip()
        assert told.startswith("ssl-lab: ") and "\n" not in told and "Traceback" not in told
        return told

    return refused


def test_a_prompt_without_its_picture(says):
    told = says("chat", "ckpt=run", 'prompt="<image> what shape?"')
    assert "mentions 1 pictures (<image>), and there are 0" in told and "image=<file>" in told
    told = says("chat", "ckpt=run", "image=scene.png", 'prompt="<image> or <image>?"')
    assert "mentions 2 pictures" in told and "there are 1" in told
    model = small()
    with pytest.raises(UserError, match=r"a prompt without its image: 2 image markers .* there are 1 images"):
        model(torch.tensor([[1, MARK, MARK]]), images(batch=1))
    with pytest.raises(UserError, match="a prompt without its image"):
        model(torch.tensor([[1, MARK]]))
    with pytest.raises(UserError, match="an image that no prompt mentions"):
        model(torch.tensor([[1, 2]]), images(batch=1))


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("none.png", "does not exist"),
        ("half.png", "cannot be read"),
        ("empty.png", "it is empty"),
        ("text.png", "it is no image"),
        (".", "does not exist"),
    ],
)
def test_an_unreadable_picture(says, name, why):
    told = says("chat", "ckpt=run", f"image={name}", ASKED)
    assert f"image={name}" in told and why in told


def conversation(home, picture, text="<image>\nwhat?"):
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "a ring"}]
    rows = [{"id": i, "conversations": turns, **({"image": picture.format(i)} if picture else {})} for i in range(30)]
    (home / "talk.json").write_text(json.dumps(rows))
    return [*TABLE, "data=conversations", "data.path=talk.json", "data.image_size=32", "out=other"]


def test_pictures_of_training_that_are_missing_or_no_pictures(says, home):
    told = says(*conversation(home, None))
    assert "row 0: <image> stands 1 times" in told and "has 0 images" in told
    told = says(*conversation(home, "none.png"))  # all of them about one image, which is held out
    assert "too few images to hold a tenth out: nothing is left for train" in told
    told = says(*conversation(home, "scene{}.png", "<image> and <image>?"))
    assert "<image> stands 2 times" in told and "write it once for each image" in told
    for i in range(30):
        (home / f"text{i}.png").write_text("no picture")
    for name in ("text{}.png", "none{}.png"):
        told = says(*conversation(home, name))
        assert "images of talk.json are unreadable" in told and name.split("{")[0] in told


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"id": 3}, "has nothing in conversations"),
        ({"conversations": "what?"}, "has str in conversations"),
        ({"conversations": [{"role": "user", "content": [{"type": "image_url"}]}]}, "a turn of 'user' with list"),
    ],
)
def test_a_row_that_is_no_conversation(says, home, row, why):
    words = conversation(home, None, "what?")
    rows = json.loads((home / "talk.json").read_text())
    (home / "talk.json").write_text(json.dumps([*rows, *[row] * 30]))
    told = says(*words)
    assert why in told and "talk.json row" in told


def test_a_mistake_does_not_end_a_conversation(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    lines = iter(["<image> what shape?", "/image none.png", "what shape?", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    assert main(["chat", "ckpt=run", "image=scene.png", "max_new_tokens=64"]) == 0  # of 128, twice
    told = capsys.readouterr().err
    assert "ssl-lab: image=none.png does not exist" in told and told.count("tokens/s") == 2


def test_a_tokenizer_without_the_marker(says, home):
    bare().save(home / "words")
    told = says(*RUN, "data.tokenizer=words", "out=other")
    assert "no token <image> to stand for an image" in told and "with_marker" in told
    (home / "lost").mkdir(exist_ok=True)
    for file in (home / "run").rglob("*"):
        if file.is_file():
            other = home / "lost" / file.relative_to(home / "run")
            other.parent.mkdir(exist_ok=True)
            other.write_bytes(file.read_bytes())
    bare().save(home / "lost")
    for words in (["chat", "image=scene.png", ASKED], ["export", "to=hf"]):
        told = says(*words, "ckpt=lost")
        assert "no token <image>" in told
    with_marker(bare()).save(home / "lost")  # another vocabulary than the model's
    for words in (["chat", ASKED], ["export", "to=hf"]):
        assert "put back the tokenizer of the run" in says(*words, "ckpt=lost")


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (["connector@method.model.connector=linear"], "connector"),
        (["connector@method.model.connector=resampler"], "connector"),
        (["method.model.connector.merge=2"], "connector"),
        (["method.model.vision.dim=32"], "vision"),
        (["method.model.decoder.depth=2"], "decoder"),
    ],
)
def test_a_checkpoint_of_another_connector(says, change, part):
    kept = [w for w in RUN if not any(w.split("=")[0] == x.split("=")[0] for x in change)]
    pooled = [] if "resampler" not in change[0] else ["~method.model.connector.pool"]
    told = says(*kept, *change, *pooled, "method.weights=run", "out=other")
    assert f"has another {part}" in told and f"set method.model.{part} as in its config.yaml" in told


def test_a_run_that_is_none_or_that_does_not_see(says, home):
    assert "no run folder" in says("chat", "ckpt=nowhere", ASKED)
    assert main([
        "method=mae", "data.train.length=8", "data.test.length=4", "data.batch_size=4", "eval=[]", "duration=1steps",
        "method.encoder.depth=1", "method.encoder.dim=16", "method.encoder.num_heads=2", "out=mae",
        "trainer.accelerator=cpu", "trainer.enable_progress_bar=false",
    ]) == 0  # fmt: skip
    assert "sees no pictures in a text" in says("chat", "ckpt=mae", ASKED)
    text = (home / "run/config.yaml").read_text()
    try:
        (home / "run/config.yaml").write_text(text.replace("MLPConnector", "LinearConnector"))
        told = says("chat", "ckpt=run", "image=scene.png", ASKED)
    finally:
        (home / "run/config.yaml").write_text(text)
    assert "does not fit the method in" in told and "connector" in told
