"""Pairs of answers: wrong ones that other images have, files of pairs, and rows in which the last answer is scored."""

import json

import pytest
import torch
from test_conversations import MARKER, Pictures, encoder, picture, talk

from ssl_lab.data import conversation_builders as build
from ssl_lab.data.conversation_views import ConversationViews
from ssl_lab.data.conversations import Conversations, Dialogue
from ssl_lab.data.preference_views import PreferenceViews
from ssl_lab.data.preferences import mistaken, preferences, shapes
from ssl_lab.data.views import Resize
from ssl_lab.errors import UserError


def asked(question, answer, image=0, answers=(), before=()):
    return Dialogue((image,), talk(*before, (f"{MARKER}\n{question}" if not before else question, answer)), answers)


def test_wrong_answers_are_those_of_other_images_to_the_same_question():
    rows = [
        asked("what color is it?", "red"), asked("what color is it?", "blue"), asked("what color is it?", "Red "),
        asked("is it a ring?", "yes"), asked("is it a ring?", "no"), asked("what color is that?", "green"),
        asked("sure?", "yes"), asked("what shape?", "ring", answers=("ring", "circle")), asked("what shape?", "circle"),
    ]  # fmt: skip
    found = mistaken(Conversations(Pictures(), rows, encoder()))
    said = {(one.messages[0]["content"].split("\n")[1], one.messages[1]["content"]): one for one in found.dialogues}
    assert said["what color is it?", "red"].rejected == "blue" and found.paired
    assert said["what color is it?", "blue"].rejected.strip().lower() == "red"
    assert said["is it a ring?", "yes"].rejected == "no" and said["is it a ring?", "no"].rejected == "yes"
    assert said["what color is that?", "green"].rejected in ("red", "blue", "Red ")  # by how the question begins
    assert ("sure?", "yes") not in said and ("what shape?", "ring") not in said  # nothing wrong is known
    assert said["what shape?", "circle"].rejected == "ring"
    many = [asked("a?", text) for text in ["b"] + ["c"] * 300 + ["d"] * 100]
    drawn = [one.rejected for one in mistaken(Conversations(Pictures(), many, encoder()), seed=3).dialogues]
    assert drawn == [one.rejected for one in mistaken(Conversations(Pictures(), many, encoder()), seed=3).dialogues]
    assert {"c", "d"} <= set(drawn) and drawn != [
        one.rejected for one in mistaken(Conversations(Pictures(), many, encoder()), seed=4).dialogues
    ]
    with pytest.raises(UserError, match="none is wrong"):
        mistaken(Conversations(Pictures(), [asked("a?", "b")] * 3, encoder()))


def test_wrong_answers_about_shapes_belie_the_picture():
    encode = encoder()
    plain, found = build.shapes("train", 300, encode), shapes("train", 300, encode)
    assert len(found) > 0.95 * len(plain) and not plain.paired
    kinds = {"is there": {"yes", "no"}, "what color": None, "what shape": None, "where is": None}
    for row, one in enumerate(found.dialogues):
        question, right = found.question(row)
        assert one.rejected not in right and any(question.startswith(kind) for kind in kinds)
        if question.startswith("is there"):
            assert {one.rejected, *right} == {"yes", "no"}
        if question.startswith("where"):
            assert "the large" in one.rejected


def test_rows_score_the_last_answers_and_share_their_images():
    encode = encoder()
    rows = [
        Dialogue((0,), talk((f"{MARKER}\nwhat color is it?", "red")), rejected="a blue one"),
        Dialogue((1, 2), talk((f"{MARKER} or {MARKER}?", "blue"), ("sure?", "yes, a red one")), rejected="no"),
        Dialogue((), talk(("sure?", "yes")), rejected="no"),
    ]
    source = Conversations(Pictures(), rows, encode)
    batch = PreferenceViews(Resize(32))(source.read([0, 1, 2]).data, torch.arange(3), 0)
    plain = ConversationViews(Resize(32))(source.read([0, 1, 2]).data, torch.arange(3), 0)
    assert torch.equal(batch["tokens"], plain["tokens"]) and torch.equal(batch["images"], plain["images"])
    decode = encode.tokenizer.decode
    for name, want in (
        ("labels", ["red", "yes, a red one", "yes"]),
        ("rejected_labels", ["a blue one", "no", "no"]),
    ):
        told = [decode(row[row != -100].tolist(), special=True).replace(" ", "") for row in batch[name]]
        assert told == [f"{text}<eos>".replace(" ", "") for text in want]
    for row, one in enumerate(rows):
        worse = [*one.messages[:-1], {"role": "assistant", "content": one.rejected}]
        real = batch["rejected_valid"][row]
        assert batch["rejected"][row][real].tolist() == encode(worse).tokens
    assert source.question(1) == ("sure?", ("yes, a red one",))  # what an evaluator asks is what is scored
    short = encoder(max_length=12)
    cut = PreferenceViews(Resize(32))(Conversations(Pictures(), rows, short).read([1]).data, torch.arange(1), 0)
    assert (cut["labels"] == -100).all() and (cut["rejected_labels"] == -100).all()
    single = Conversations(Pictures(), [asked("a?", "b")], encode).read([0]).data
    with pytest.raises(UserError, match="one answer"):
        PreferenceViews(Resize(32))(single, torch.arange(1), 0)


def test_files_of_pairs(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    encode = encoder()
    for i in range(2):
        picture(tmp_path / f"{i}.png", 100 * i)
    said = {"chosen": "red", "rejected": "blue"}
    parts = [{"type": "image"}, {"type": "text", "text": "what?"}]
    one = {"role": "assistant", "content": "red"}
    other = one | {"content": "blue"}
    rows = [
        {"image": "0.png", "question": "what?", **said},
        {"question": "sure?", **said},
        {"images": ["0.png", "1.png"], "question": f"{MARKER} or {MARKER}", **said},
        {"image": "1.png", "question": [{"role": "user", "content": parts}], "chosen": one, "rejected": [other]},
    ]
    folder = tmp_path / "json"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.json").write_text(json.dumps(rows))
    source = preferences(folder, encode, image_folder=tmp_path)
    asked = [d.messages[0]["content"] for d in source.dialogues]
    assert asked == [f"{MARKER}\nwhat?", "sure?", f"{MARKER} or {MARKER}", f"{MARKER}\nwhat?"]
    assert {(d.messages[-1]["content"], d.rejected) for d in source.dialogues} == {("red", "blue")}
    assert [len(d.images) for d in source.dialogues] == [1, 0, 2, 1]
    assert [int(x.float().mean()) for x in source.read([2]).data.images] == [0, 100]
    blob = (tmp_path / "1.png").read_bytes()
    whole = [{"role": "user", "content": "what?"}, one]
    table = {"image": [blob] * 3, "chosen": [whole] * 3, "rejected": [[whole[0], other]] * 3}
    (tmp_path / "parquet").mkdir()
    for split in ("train", "test"):
        pq.write_table(pa.table(table), tmp_path / "parquet" / f"{split}.parquet")
    source = preferences(tmp_path / "parquet", encode)
    assert source.dialogues[0].messages[0]["content"] == f"{MARKER}\nwhat?" and source.dialogues[2].rejected == "blue"
    assert int(source.read([1]).data.images[0].float().mean()) == 100
    wrong = [whole[0], other]
    system = {"role": "system", "content": "be short"}
    rows = [
        {"prompt": "what?", "messages": whole, "chosen": whole, "rejected": wrong},
        {"prompt": "what?", "messages": [system, *whole], "chosen": whole, "rejected": wrong},
        {"messages": [system, *whole], "chosen": [system, *whole], "rejected": [system, *wrong]},
    ]
    (tmp_path / "beside.json").write_text(json.dumps(rows * 10))
    found = preferences(tmp_path / "beside.json", encode, split="train").dialogues
    told = {tuple(m["role"] for m in one.messages) for one in found}
    assert told == {("user", "assistant"), ("system", "user", "assistant")}
    for row, message in (
        ({"messages": whole, "chosen": "b", "rejected": "c"}, "messages ends with an answer"),
        ({"question": "a", "chosen": "b"}, "no column rejected"),
        ({"question": "a", "chosen": "b", "rejected": "b"}, "the same answer"),
        ({"chosen": whole, "rejected": [{"role": "user", "content": "why?"}, other]}, "but for the last answer"),
        ({"question": [], "chosen": "b", "rejected": "c"}, "no turns"),
    ):
        (tmp_path / "wrong.json").write_text(json.dumps([row] * 30))
        with pytest.raises(UserError, match=message):
            preferences(tmp_path / "wrong.json", encode)
