"""Conversations about images: exactly the answers are scored, however rows are cut, padded or packed."""

import csv
import json

import pytest
import torch
from parity import gap
from test_vlm import small
from torchvision.transforms.v2.functional import to_pil_image

from ssl_lab.data import conversation_builders as build
from ssl_lab.data.conversation_table import conversations
from ssl_lab.data.conversation_text import ConversationEncoder
from ssl_lab.data.conversation_tokenizer import MARKER, marker_of, spoken, with_marker
from ssl_lab.data.conversation_views import ConversationViews, packed
from ssl_lab.data.conversations import Conversations, Dialogue
from ssl_lab.data.tokenizer import Tokenizer
from ssl_lab.data.tokenizer_train import train
from ssl_lab.data.views import Crop, Resize
from ssl_lab.errors import UserError
from ssl_lab.losses.lm import mean_over_tokens, token_nll
from ssl_lab.nn.positions import Learned

SMOL = (  # as SmolLM2-Instruct has it
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant.<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TALK = [
    {"role": "user", "content": f"{MARKER}\nwhat color is it?"},
    {"role": "assistant", "content": "red"},
    {"role": "user", "content": "sure?"},
    {"role": "assistant", "content": "yes, a red one"},
]
TEXTS = ["what color is it? red, blue", "is it a circle? yes, a red one", "sure?"] * 9


def bare(template=None):
    special = ["<pad>", "<eos>", "<|im_start|>", "<|im_end|>"]
    known = Tokenizer(train(TEXTS, "bpe", 330, special))
    return known if template is None else Tokenizer(known.backend, known.config | {"chat_template": template})


def encoder(chat=None, **more):
    return ConversationEncoder(with_marker(bare(chat)), **more)


def test_the_answers_and_their_ends_are_scored_and_nothing_else():
    encode = encoder(SMOL)
    one, known = encode(TALK), encode.tokenizer
    assert len(one.tokens) == len(one.labels) and one.images == 1
    scored = [label for label in one.labels if label != -100]
    assert known.decode(scored, special=True).replace(" ", "") == "red<|im_end|>yes,aredone<|im_end|>"
    assert all(label in (-100, token) for token, label in zip(one.tokens[1:], one.labels, strict=False))
    assert encode.end == known.backend.token_to_id("<|im_end|>") == scored[-1]
    first = next(i for i, label in enumerate(one.labels) if label != -100)
    assert encode.prompt(TALK[:1]) == one.tokens[: first + 1]  # training and speaking see the same tokens
    assert encode.prompt(TALK[:3]) == one.tokens[: len(encode.prompt(TALK[:3]))]
    text = known.decode(one.tokens, special=True)
    assert "You are" in text and text.count("<|im_start|>") == 5
    told = encoder(SMOL, system="")
    assert "You are" not in known.decode(told(TALK).tokens)


def test_a_tokenizer_without_a_template_has_a_plain_one():
    encode = encoder()
    one = encode(TALK)
    assert encode.tokenizer.decode(one.tokens, special=True).replace(" ", "") == (
        f"{MARKER}\nwhatcolorisit?\nred<eos>sure?\nyes,aredone"
    )
    assert encode.end == encode.tokenizer.eos and one.labels.count(encode.end) == 2
    assert encoder(SMOL, template="plain")(TALK).tokens == one.tokens


def test_a_long_conversation_loses_its_end_and_keeps_its_labels():
    whole = encoder()(TALK)
    for room in range(2, len(whole.tokens)):
        encode = encoder(max_length=room)
        one = encode(TALK)
        assert one.tokens == whole.tokens[:room] and one.labels == whole.labels[:room] and encode.cut == 1


def test_mistakes_of_templates_and_tokenizers():
    with pytest.raises(UserError, match="no token <image>"):
        ConversationEncoder(bare(SMOL))
    with pytest.raises(UserError, match="changes what the assistant says"):
        encoder("{% for m in messages %}{{ m['content'] | upper }}<eos>{% endfor %}")
    with pytest.raises(UserError, match="told apart"):
        encoder("{{ messages | length }}{% for m in messages %}{{ m['content'] }}<eos>{% endfor %}")
    with pytest.raises(UserError, match="nobody can say"):
        encoder()([{"role": "user", "content": "a"}, {"role": "assistant", "content": MARKER}])
    with pytest.raises(UserError, match="without an answer"):
        encoder()(TALK[:1])


def test_the_marker_needs_no_row_of_the_language_model():
    known = with_marker(bare())
    assert marker_of(known) == bare().vocab_size and spoken(known) == bare().vocab_size == known.vocab_size - 1
    assert spoken(bare()) == bare().vocab_size
    again = with_marker(known)
    assert again.vocab_size == known.vocab_size
    assert known.encode(f"a{MARKER}b").count(marker_of(known)) == 1


class Pictures:
    """Some of one colour each; `broken` ones cannot be read."""

    classes, unit = (), "images"

    def __init__(self, count=6, broken=()):
        self.pixels = (torch.arange(count) * 40).to(torch.uint8)[:, None, None, None].expand(-1, 3, 32, 32)
        self.broken = broken

    def __len__(self):
        return len(self.pixels)

    def read(self, rows):
        from ssl_lab.data.source import Samples

        used = torch.tensor([(row + 1) % len(self) if row in self.broken else row for row in rows])
        return Samples(self.pixels[used], torch.full((len(used),), -1), used)


def talk(*questions):
    turns = [({"role": "user", "content": q}, {"role": "assistant", "content": a}) for q, a in questions]
    return tuple(message for pair in turns for message in pair)


def several(encode, **more):
    dialogues = [
        Dialogue((0,), talk((f"{MARKER}\nwhat color is it?", "red"))),
        Dialogue((), talk(("sure?", "yes"))),
        Dialogue((1, 2), talk((f"{MARKER} or {MARKER}?", "blue"), ("sure?", "yes, a red one"))),
        Dialogue((3,), talk(("is it a circle?", "yes"), (f"this {MARKER}?", "red"))),
    ]
    return Conversations(Pictures(**more), dialogues, encode)


def test_padded_and_packed_rows_have_one_loss():
    encode = encoder()
    source, at = several(encode), torch.arange(4)
    data = source.read([0, 1, 2, 3]).data
    views = ConversationViews(Resize(32))
    one = views(data, at, 0)
    assert one["images"].shape == (4, 3, 32, 32) and one["image_rows"].tolist() == [0, 2, 2, 3]
    assert one["image_ids"].tolist() == [0, 1, 2, 3]
    assert "image_ids" not in ConversationViews(Crop(32))(data, at, 0)
    assert (one["tokens"] == encode.image).sum(1).tolist() == [1, 0, 2, 1]
    for pack in (20, 60, 200):
        other = ConversationViews(Resize(32), pack=pack, image_length=16)(data, at, 0)
        assert len(other["tokens"]) <= 4 and "valid" not in other
        for row in range(len(other["tokens"])):
            count = int((other["tokens"][row] == encode.image).sum())
            assert count == int((other["image_rows"] == row).sum())
        vocabulary = encode.tokenizer.vocab_size
        model = small(positions=Learned)
        model.decoder.embed = torch.nn.Embedding(vocabulary, 48, dtype=torch.float64)
        model.decoder.head, model.image_token = None, encode.image
        model.decoder.positions = Learned(48, 4, 400).double()
        losses = []
        for batch in (one, other):
            out, labels = model(
                batch["tokens"], batch["images"].double(), valid=batch.get("valid"), segments=batch.get("segments"),
                labels=batch["labels"],
            )  # fmt: skip
            losses.append(mean_over_tokens(token_nll(out.tokens, model.decoder.head_weight, labels), labels))
        assert gap(*losses) < 1e-12
    assert packed([5, 9, 3, 12, 1], 10) == [[3], [1, 4], [0, 2]]


def test_an_image_whose_marker_is_cut_off_goes_too():
    encode = encoder(max_length=9)
    batch = ConversationViews(Resize(32))(several(encode).read([3, 0]).data, torch.arange(2), 0)
    assert len(batch["images"]) == 1 and batch["image_rows"].tolist() == [1]
    assert batch["images"].mean() < -1.5  # picture 0, the darkest
    batch = ConversationViews(Resize(32))(several(encode).read([1]).data, torch.arange(1), 0)
    assert batch["images"].shape == (0, 3, 32, 32)


def test_images_that_are_known_are_not_read_again():
    encode = encoder()
    source, at = several(encode), torch.arange(4)
    known = torch.tensor([False, True, False, True, False, False])
    asked = []
    lean = source.without(lambda count: asked.append(count) or known)
    assert asked == [6] and source.known is None
    read = []
    original = source.images.read
    source.images.read = lambda rows: read.extend(rows) or original(rows)
    samples = lean.read([0, 1, 2, 3])
    assert read == [0, 2] and samples.data.given == [True, False, True, False]
    whole, part = (ConversationViews(Resize(32))(x.read([0, 1, 2, 3]).data, at, 0) for x in (source, lean))
    assert part["image_given"].tolist() == [True, False, True, False] and "image_given" not in whole
    assert torch.equal(part["images"], whole["images"][part["image_given"]])
    for name in ("image_ids", "image_rows", "tokens", "labels"):
        assert torch.equal(part[name], whole[name])
    for pack in (20, 60):
        views = ConversationViews(Resize(32), pack=pack, image_length=16)
        whole, part = (views(x.read([3, 2, 1, 0]).data, at, 0) for x in (source, lean))
        assert torch.equal(part["images"], whole["images"][part["image_given"]])
        assert part["image_given"].tolist() == [not known[i] for i in whole["image_ids"]]
    known[:] = True
    assert ConversationViews(Resize(32))(lean.read([0]).data, at[:1], 0)["images"].shape == (0, 3, 32, 32)


def test_a_conversation_whose_image_is_unreadable_is_replaced_as_a_whole():
    samples = several(encoder(), broken=(0, 2)).read([0, 1, 2, 3])
    assert samples.rows[1] == 1 and samples.rows[3] == 3 and {int(x) for x in samples.rows} <= {1, 3}
    with pytest.raises(UserError, match="can be read"):
        Conversations(Pictures(broken=(0,)), [Dialogue((0,), talk((MARKER, "a")))], encoder()).read([0])
    with pytest.raises(UserError, match="row 0: <image> stands 0 times"):
        Conversations(Pictures(), [Dialogue((0,), talk(("a", "a")))], encoder())


def test_questions_about_shapes():
    encode = encoder()
    train = build.shapes("train", 20, encode)
    assert all(len(one.images) == 1 and len(one.messages) == 2 for one in train.dialogues)
    asked = [train.question(i) for i in range(len(train))]
    assert any(q.startswith("where is") for q, _ in asked)
    assert not any("striped?" in q or "how many" in q for q, _ in asked)
    whole = build.shapes("train", 20, encode, turns=None, kinds=["color", "count"])
    assert len(whole) == 20 and all(len(one.messages) == 4 for one in whole.dialogues)
    assert [m["content"].count(MARKER) for m in whole.dialogues[0].messages] == [1, 0, 0, 0]
    assert train.read([0, 5]).data.images.shape == (2, 3, 32, 32)
    told = build.shapes("train", 20, encode, kinds=["caption"])
    assert len(told) >= 60 and {m["content"] for one in told.dialogues for m in one.messages[:1]} == {MARKER}
    assert told.question(0)[1][0].startswith("a large")
    with pytest.raises(UserError, match="kinds=size"):
        build.shapes("train", 2, encode, kinds=["size"])


def picture(path, level=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    to_pil_image(torch.full((3, 8, 8), level, dtype=torch.uint8)).save(path)
    return path


def test_tables_of_questions_captions_and_classes(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    encode = encoder()
    blobs = [picture(tmp_path / f"{i}.png", 20 * i).read_bytes() for i in range(12)]
    several = {"image": blobs, "questions": [["what?", "red?"]] * 12, "answers": [["circle", "yes"]] * 12}
    people = {"image": blobs, "question": ["what?"] * 12, "answers": [["ring", "circle", "ring"]] * 12}
    for name, table in (("several", several), ("people", people)):
        pq.write_table(pa.table(table), tmp_path / f"{name}.parquet")
    source = build.questions(tmp_path / "several.parquet", encode)
    held = build.questions(tmp_path / "several.parquet", encode, split="test")
    assert len(source) + len(held) == 24 and source.question(1) == ("red?", ("yes",))
    assert len(build.questions(tmp_path / "several.parquet", encode, turns=2)) == len(source) // 2
    source = build.questions(tmp_path / "people.parquet", encode)
    assert source.question(0) == ("what?", ("ring", "ring", "circle"))
    assert source.dialogues[0].messages[1]["content"] == "ring"
    told = {
        "image": blobs, "question": ["what?"] * 12,
        "answers": [["circle", "ring", None, "ring"], None, [None], *[["star"]] * 9],
    }  # fmt: skip
    pq.write_table(pa.table(told), tmp_path / "told.parquet")
    source = build.questions(tmp_path / "told.parquet", encode)
    said = {
        one.images[0]: (one.messages[1]["content"], source.question(row)) for row, one in enumerate(source.dialogues)
    }
    assert all(answer in ("ring", "star") for answer, _ in said.values())  # nobody said None
    assert said[0] == ("ring", ("what?", ("ring", "ring", "circle")))
    assert len(source) + len(build.questions(tmp_path / "told.parquet", encode, split="test")) == 10
    nested = {"image": blobs, "questions": [["what?", "red?"]] * 12, "answers": [[["a", "b", "b"], ["no"]]] * 12}
    pq.write_table(pa.table(nested), tmp_path / "nested.parquet")
    assert build.questions(tmp_path / "nested.parquet", encode).question(0) == ("what?", ("b", "b", "a"))
    with pytest.raises(UserError, match="no column 'asked'"):
        build.questions(tmp_path / "people.parquet", encode, question_column="asked")
    with open(tmp_path / "captions.csv", "w", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), *((f"{i}.png", f"number {i}") for i in range(12))])
    source = build.captions(tmp_path / "captions.csv", encode, prompt="")
    assert source.dialogues[0].messages[0]["content"] == MARKER and source.question(0)[1][0].startswith("number")
    for name in ("red_ring", "star"):
        for i in range(10):
            picture(tmp_path / "folder" / name / f"{i}.png")
    source = build.classes(tmp_path / "folder", encode)
    assert {source.question(i)[1][0] for i in range(len(source))} == {"red ring", "star"}


@pytest.mark.parametrize("kind", ["bytes", "several", "paths"])
def test_one_image_is_in_one_split_alone(tmp_path, kind):
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = [picture(tmp_path / f"{i}.png", 8 * i) for i in range(20)]
    cells = [x.name if kind == "paths" else x.read_bytes() for x in files for _ in range(3)]
    turns = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "red"}]
    table = {"images": [[x] for x in cells]} if kind == "several" else {"image": cells}
    pq.write_table(pa.table(table | {"messages": [turns] * 60}), tmp_path / "talk.parquet")
    pq.write_table(
        pa.table({"image": cells, "question": ["what?"] * 60, "answer": ["a"] * 60}), tmp_path / "asked.parquet"
    )
    found = [[conversations(tmp_path / "talk.parquet", encoder(), split=s) for s in ("train", "test")]]
    if kind == "bytes":
        found.append([build.questions(tmp_path / "asked.parquet", encoder(), split=s) for s in ("train", "test")])
    for sources in found:
        seen = [{int(x.float().mean()) for x in one.read(range(len(one))).data.images} for one in sources]
        assert not seen[0] & seen[1] and len(seen[0] | seen[1]) == 20 and sum(map(len, sources)) == 60


def test_conversations_of_llava(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    encode = encoder()
    for i in range(3):
        picture(tmp_path / "pictures" / f"{i}.png", 100 * i)

    def turns(question):
        return [{"from": "human", "value": question}, {"from": "gpt", "value": "red"}]

    rows = [
        {"id": 0, "image": "0.png", "conversations": turns(f"what? {MARKER}")},
        {"id": 1, "conversations": turns("sure?")},
        {"id": 2, "image": ["1.png", "2.png"], "conversations": turns(f"{MARKER} or {MARKER}")},
        {"id": 3, "image": "1.png", "conversations": turns("what?")},
    ]
    for split in ("train", "test"):
        (tmp_path / f"{split}.json").write_text(json.dumps(rows), encoding="utf-8-sig")  # as Windows writes it
    source = conversations(tmp_path / "train.json", encode, image_folder=tmp_path / "pictures")
    read = conversations(tmp_path, encode, image_folder=tmp_path / "pictures").read([0, 1, 2, 3])
    asked = [messages[0]["content"] for messages in read.data.messages]
    assert asked == [f"{MARKER}\nwhat?", "sure?", f"{MARKER} or {MARKER}", f"{MARKER}\nwhat?"]
    assert [len(x) for x in read.data.numbers] == [1, 0, 2, 1] and len(source) == 3  # a file alone is divided
    levels = [int(image.float().mean()) for image in read.data.images]
    assert levels == [0, 100, 200, 100]
    blobs = [(tmp_path / "pictures" / f"{i}.png").read_bytes() for i in range(3)]
    inside = {"images": [blobs[:1], [], blobs[1:]], "messages": [
        [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "red"}]] * 3}  # fmt: skip
    folder = tmp_path / "parquet"
    folder.mkdir()
    for split in ("train", "test"):
        pq.write_table(pa.table(inside), folder / f"{split}.parquet")
    read = conversations(folder, encode).read([0, 1, 2])
    assert [len(x) for x in read.data.numbers] == [1, 0, 2] and [int(x.float().mean()) for x in read.data.images] == [
        0,
        100,
        200,
    ]
    assert read.data.messages[2][0]["content"] == f"{MARKER}\n{MARKER}\nwhat?"
    for wrong, message in (
        ([{"from": "robot", "value": "a"}], "a turn of 'robot'"),
        ([], "other row 1 has no answer"),
        (turns("what?")[:1], "other row 1 has no answer"),
        (turns("what?")[:1] + [{"from": "gpt", "value": MARKER}], "other row 1: an answer contains <image>"),
    ):
        rows = [{"image": "0.png", "conversations": x} for x in (turns("what?"), wrong)]
        (tmp_path / "other").mkdir(exist_ok=True)
        for split in ("train", "test"):
            (tmp_path / "other" / f"{split}.json").write_text(json.dumps(rows))
        with pytest.raises(UserError, match=message):
            conversations(tmp_path / "other", encode)
