"""Images with captions: tables, generated scenes, tokens, and the batches that are made of them."""

import io
import logging
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from ssl_lab.data.batches import TrainBatches
from ssl_lab.data.module import DataModule
from ssl_lab.data.pair_views import PairViews
from ssl_lab.data.pairs import Pairs
from ssl_lab.data.pairs_shapes import HELD_OUT, ShapesPairs, train_captions
from ssl_lab.data.pairs_text import CaptionEncoder
from ssl_lab.data.pairs_tokenizer import trained
from ssl_lab.data.shapes_layout import COLORS, SHAPES
from ssl_lab.data.tokenizer import load
from ssl_lab.data.views import Crop, MultiView, Resize
from ssl_lab.errors import UserError

KEYS = ("image", "tokens", "valid", "target", "index", "position")


def png(number, side=12):
    """An image whose pixels all have this number."""
    out = io.BytesIO()
    Image.new("RGB", (side, side), (number % 256, number // 256, 7)).save(out, format="PNG")
    return out.getvalue()


def number_of(image):
    return int(image[0, 0, 0]) + 256 * int(image[1, 0, 0])


def parquet(path, count=30, **columns):
    """Row i shows number i and has i % 3 + 1 captions that name it."""
    captions = [[f"picture {i} in words {j}" for j in range(i % 3 + 1)] for i in range(count)]
    table = {"image": [png(i) for i in range(count)], "captions": captions} | columns
    pq.write_table(pa.table(table), path)
    return str(path)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return trained(parquet(tmp_path_factory.mktemp("words") / "words.parquet", 24), "bpe", 400)


@pytest.fixture
def pack(tmp_path):
    parquet(tmp_path / "train.parquet")
    parquet(tmp_path / "test.parquet", 9)
    return str(tmp_path)


def module(train, test, trainer=None, **options):
    made = {"batch_size": 4, "eval_views": PairViews(Resize(8), caption="first"), "image_size": 8, "seed": 3}
    data = DataModule(train, test, PairViews(Crop(8)), **(made | options))
    if trainer is not None:
        data.trainer = SimpleNamespace(accumulate_grad_batches=1, **trainer)
    return data


def batches(data, count):
    return [batch for batch, _ in zip(data.train_dataloader(), range(count), strict=False)]


def same(a, b):
    assert a.keys() == b.keys() == set(KEYS)
    assert all(torch.equal(a[key], b[key]) for key in KEYS)


def test_tokens_have_begin_end_and_padding(tokenizer):
    encode = CaptionEncoder(tokenizer, 10)
    words = tokenizer.encode("picture 3")
    batch = encode(["picture 3", "picture 3 in words 1 in words 2 in words 3 in words 4 in words 5"])
    row = [tokenizer.bos, *words, tokenizer.eos]
    assert batch["tokens"].shape == (2, 10) and batch["tokens"].dtype == torch.int64
    assert batch["tokens"][0].tolist() == row + [tokenizer.pad] * (10 - len(row)) and tokenizer.pad == 0
    assert batch["valid"][0].tolist() == [i < len(row) for i in range(10)]
    assert (
        batch["valid"][1].all() and batch["tokens"][1, -1] == tokenizer.eos and batch["tokens"][1, 0] == tokenizer.bos
    )
    assert encode.cut == 1
    assert CaptionEncoder(tokenizer, 40, fixed=False)(["picture 3"])["tokens"].shape == (1, 8)
    assert CaptionEncoder(tokenizer, 5, fixed=False)(["picture 3"] * 2)["tokens"].shape == (2, 5)
    with pytest.raises(UserError, match="context_length is 2"):
        CaptionEncoder(tokenizer, 2)


def test_several_columns_hold_captions(tmp_path):
    rows = {"image": [png(i) for i in range(4)], "name": ["a", "b", None, None], "tags": [["c", "d"], [], ["e"], None]}
    lines = ["image,name,tag", *(f"{i}.png,name {i},tag {i}" for i in range(3))]
    (tmp_path / "listed").mkdir()
    for i in range(3):
        (tmp_path / "listed" / f"{i}.png").write_bytes(png(i))
    for split in ("train", "test"):
        pq.write_table(pa.table(rows), tmp_path / f"{split}.parquet")
        (tmp_path / "listed" / f"{split}.csv").write_text("\n".join(lines))
    pairs = Pairs(tmp_path, caption_column=["name", "tags"])
    assert pairs.captions(range(len(pairs))) == [["a", "c", "d"], ["b"], ["e"]]
    assert Pairs(tmp_path / "listed", caption_column=["name", "tag"]).captions([1]) == [["name 1", "tag 1"]]
    with pytest.raises(UserError, match="'word' is not there"):
        Pairs(tmp_path, caption_column=["name", "word"])


def test_captions_that_are_cut_are_counted(pack, tokenizer, caplog):
    def warned(length):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            Pairs(pack, tokenizer, context_length=length)
        return caplog.text

    texts = [text for captions in Pairs(pack).captions(range(30)) for text in captions]
    lengths = [len(tokenizer.encode(text)) + 2 for text in texts]
    long = sum(n > max(lengths) - 1 for n in lengths)
    assert 0 < long < len(texts) == 60
    assert warned(max(lengths)) == ""
    assert f"{long} of 60 captions are longer than context_length={max(lengths) - 1}" in warned(max(lengths) - 1)
    with pytest.raises(UserError, match=f"set data.train.context_length={max(lengths)}"):
        Pairs(pack, tokenizer, context_length=min(lengths) - 1)


@pytest.mark.parametrize(("kind", "context"), [("bpe", 16), ("character", 40), ("wordpiece", 32)])
def test_every_kind_of_tokenizer_serves_and_is_the_same_again(pack, kind, context):
    first = trained(pack, kind, 500)
    assert first.backend.to_str() == trained(pack, kind, 500).backend.to_str()
    encode = CaptionEncoder(first, context)
    batch = encode(["picture 7 in words 1"])
    kept = batch["tokens"][0][batch["valid"][0]]
    assert first.decode(kept) == "picture 7 in words 1"
    assert kept[-1] == encode.end and first.pad == 0
    assert encode(["?"])["valid"].any()  # of a character that no caption has


def test_clips_own_tokenizer_is_open_clips():
    open_clip = pytest.importorskip("open_clip", reason="its file of merges comes with open_clip")
    ours, theirs = load("clip:"), open_clip.SimpleTokenizer()
    texts = ["A photo of   a cat.", "It's 1,234 déjà-vus!", "ΑΒΓ 漢字 🙂 naïve", "1" * 300, "", "don't\n stop, they'll"]
    encode = CaptionEncoder(ours, 77)
    assert (ours.vocab_size, ours.bos, ours.eos) == (49408, 49406, 49407)
    assert torch.equal(encode(texts)["tokens"], theirs(texts, 77))
    assert encode.cut == 1
    assert ours.decode(ours.encode("a photo of a cat.")).split() == ["a", "photo", "of", "a", "cat", "."]


def test_clips_tokenizer_names_what_is_wrong(tmp_path):
    (tmp_path / "merges.txt").write_text("nothing of this kind\n" * 3)
    with pytest.raises(UserError, match="merges of CLIP"):
        load(f"clip:{tmp_path / 'merges.txt'}")
    with pytest.raises(UserError, match=r"merges\.txt"):
        load(f"clip:{tmp_path / 'merge.txt'}")


def test_a_row_is_an_image_with_all_its_captions(pack, tokenizer):
    for split, count in (("train", 30), ("test", 9)):
        source = Pairs(pack, tokenizer, split=split, context_length=16)
        assert len(source) == count and source.tokenizer is tokenizer
        samples = source.read([5, 0, 7])
        assert [number_of(x) for x in samples.data.images] == [5, 0, 7]
        assert samples.data.captions == [[f"picture {i} in words {j}" for j in range(i % 3 + 1)] for i in (5, 0, 7)]
        assert samples.data.captions == source.captions([5, 0, 7])
        assert samples.targets.tolist() == [-1, -1, -1]


def test_training_draws_one_caption_by_seed_and_position(pack, tokenizer):
    source, views = Pairs(pack, tokenizer, context_length=16), PairViews(Crop(8))
    chosen: dict[int, set] = {}
    for number in range(60):
        batch = TrainBatches(source, views, 8, 5, 0, 1)(number)
        for row, tokens, valid in zip(batch["index"].tolist(), batch["tokens"], batch["valid"], strict=True):
            text = tokenizer.decode(tokens[valid])
            assert text in source.captions([row])[0]  # of the image that stands beside it
            chosen.setdefault(row, set()).add(text)
    assert all(texts == set(source.captions([row])[0]) for row, texts in chosen.items())
    data, place = source.read([2] * 3000).data, torch.arange(3000)
    share = [tokenizer.decode(t[v])[-1] for t, v in zip(*list(views(data, place, 9).values())[1:], strict=True)]
    assert all(abs(share.count(str(j)) - 1000) < 120 for j in range(3))  # 4.6 standard deviations
    alone = views(source.read([2]).data, torch.tensor([1234]), 9)
    assert torch.equal(alone["tokens"][0], views(data, place, 9)["tokens"][1234])
    assert not torch.equal(views(data, place, 9)["tokens"], views(data, place, 10)["tokens"])


def test_evaluation_gives_every_image_once_with_its_first_caption(pack, tokenizer):
    source = Pairs(pack, tokenizer, split="test", context_length=16)
    found = list(module(source, source).eval_loader("test"))
    assert torch.cat([b["index"] for b in found]).tolist() == list(range(9))
    texts = [tokenizer.decode(t[v]) for b in found for t, v in zip(b["tokens"], b["valid"], strict=True)]
    assert texts == [f"picture {i} in words 0" for i in range(9)]


def sources(kind, pack, tokenizer):
    if kind == "shapes":
        words = trained("shapes", "bpe", 512)
        return [ShapesPairs(s, 30, words, image_size=8) for s in ("train", "test")]
    return [Pairs(pack, tokenizer, split=s, context_length=16) for s in ("train", "test")]


@pytest.mark.parametrize("kind", ["table", "shapes"])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_same_from_any_step_with_any_workers(kind, workers, pack, tokenizer):
    train, test = sources(kind, pack, tokenizer)
    one = {"world_size": 1, "global_rank": 0}
    straight = batches(module(train, test, one | {"global_step": 0}), 20)
    later = batches(module(train, test, one | {"global_step": 13}, num_workers=workers), 7)
    for a, b in zip(straight[13:], later, strict=True):
        same(a, b)


@pytest.mark.parametrize("kind", ["table", "shapes"])
def test_two_ranks_share_the_batches_of_one(kind, pack, tokenizer):
    train, test = sources(kind, pack, tokenizer)
    place = {"global_step": 4}
    one = batches(module(train, test, place | {"world_size": 1, "global_rank": 0}, batch_size=8), 6)
    two = [batches(module(train, test, place | {"world_size": 2, "global_rank": r}), 6) for r in range(2)]
    for whole, *halves in zip(one, *two, strict=True):
        same(whole, {key: torch.cat([half[key] for half in halves]) for key in KEYS})


def test_views_of_the_image_may_be_several(pack, tokenizer):
    from ssl_lab.data.draws import View

    views = PairViews(MultiView(8, both=View(count=2, scale=(0.5, 1.0))))
    batch = views(Pairs(pack, tokenizer, context_length=16).read([0, 1]).data, torch.arange(2), 0)
    assert [x.shape for x in batch["views"]] == [(2, 3, 8, 8)] * 2 and batch["tokens"].shape == (2, 16)


def test_views_say_what_does_not_fit(pack):
    with pytest.raises(UserError, match="stats=clip"):
        PairViews(Crop(8), stats="clip")
    assert PairViews(Crop(8, stats="half")).stats == "half"
    with pytest.raises(UserError, match="images with captions"):
        PairViews(Crop(8))(Pairs(pack).read([0]).data, torch.arange(1), 0)


def test_an_unreadable_image_is_replaced_with_the_captions_of_its_stand_in(tmp_path, tokenizer, caplog):
    images = [png(i) for i in range(40)]
    images[11] = images[11][:30]
    path = parquet(tmp_path / "train.parquet", 40, image=images)
    parquet(tmp_path / "test.parquet", 3)
    for in_memory in (True, False):
        source = Pairs(tmp_path, tokenizer, context_length=16, in_memory=in_memory)
        samples = source.read([10, 11, 12])
        assert samples.rows[1] != 11 and samples.rows.tolist()[::2] == [10, 12]
        assert [number_of(x) for x in samples.data.images] == samples.rows.tolist()
        assert samples.data.captions[1][0] == f"picture {int(samples.rows[1])} in words 0"
        assert source.bad.keys() == {11}
    assert "unreadable" in caplog.text and path


def test_rows_without_a_caption_are_left_out_and_counted(tmp_path, caplog):
    captions = [["", None] if i == 3 else None if i == 4 else [] if i == 5 else [f"c {i}"] for i in range(12)]
    parquet(tmp_path / "train.parquet", 12, captions=pa.array(captions, pa.list_(pa.string())))
    parquet(tmp_path / "test.parquet", 3)
    with caplog.at_level(logging.WARNING):
        source = Pairs(tmp_path)
    assert "left out 3 of 12 rows" in caplog.text
    assert [x[0] for x in source.captions(range(9))] == [f"c {i}" for i in (0, 1, 2, 6, 7, 8, 9, 10, 11)]
    assert [number_of(x) for x in source.read(range(9)).data] == [0, 1, 2, 6, 7, 8, 9, 10, 11]


def test_a_column_named_split_divides(tmp_path):
    told = ["test" if i in (2, 9) else "train" for i in range(12)]
    path = parquet(tmp_path / "all.parquet", 12, split=told, group=["b" if i % 2 else "a" for i in range(12)])
    train, test = (Pairs(path, split=s, label_column="group") for s in ("train", "test"))
    assert [number_of(x) for x in test.read([0, 1]).data] == [2, 9] and len(train) == 10
    assert train.classes == ["a", "b"] and test.read([0, 1]).targets.tolist() == [0, 1]
    assert train.captions([2]) == [[f"picture 3 in words {0}"]]


def test_rows_of_one_image_are_on_one_side(tmp_path):
    path = parquet(tmp_path / "all.parquet", 90, image=[png(i // 3) for i in range(90)])
    train, test = (Pairs(path, split=s) for s in ("train", "test"))
    seen = [{number_of(x) for x in source.read(range(len(source))).data} for source in (train, test)]
    assert not seen[0] & seen[1] and seen[0] | seen[1] == set(range(30)) and len(train) + len(test) == 90
    few = parquet(tmp_path / "few.parquet", 4, image=[png(i // 2) for i in range(4)])
    assert [len(Pairs(few, split=s)) for s in ("train", "test")] == [2, 2]


def test_what_is_wrong_with_a_table_is_named(tmp_path, pack):
    with pytest.raises(UserError, match="column 'text' is not there"):
        Pairs(pack, caption_column="text")
    with pytest.raises(UserError, match="column 'image' is no text"):
        Pairs(pack, caption_column="image")
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.png").write_bytes(png(i))
    with pytest.raises(UserError, match="without captions"):
        Pairs(folder)
    with pytest.raises(UserError, match="no file or folder"):
        Pairs(tmp_path / "nowhere.parquet")


def test_held_out_combinations_never_occur_in_training():
    never = {f"{list(COLORS)[i % len(COLORS)]} {SHAPES[i // len(COLORS)]}" for i in HELD_OUT}
    assert len(never) == 16 and all(sum(name.endswith(shape) for name in never) == 2 for shape in SHAPES)
    assert all(sum(name.startswith(color) for name in never) == 2 for color in COLORS)
    train, test = (ShapesPairs(s, 1500, image_size=8) for s in ("train", "test"))
    said = [text for captions in train.captions(range(1500)) for text in captions]
    assert not any(name in text for name in never for text in said)
    assert {train.classes[i] for i in HELD_OUT} == never and train.held_out == HELD_OUT
    assert set(train.read(range(1500)).targets.tolist()) == set(range(64)) - set(HELD_OUT)
    assert set(test.read(range(1500)).targets.tolist()) == set(range(64))
    assert any(name in text for name in never for captions in test.captions(range(1500)) for text in captions)


def test_scenes_are_what_their_captions_say():
    source = ShapesPairs("test", 40, image_size=16)
    longer = ShapesPairs("test", 60, image_size=16)
    samples = source.read(range(40))
    assert torch.equal(samples.data, longer.read(range(40)).data)
    for target, captions in zip(samples.targets.tolist(), source.captions(range(40)), strict=True):
        assert 3 <= len(captions) <= 6 and f"big {source.classes[target]} in" in captions[1]
    for target, names in (("shape", SHAPES), ("color", list(COLORS))):
        other = ShapesPairs("test", 40, image_size=16, target=target)
        assert other.classes == names and other.held_out == []
        for i, name in zip(other.read(range(40)).targets.tolist(), samples.targets.tolist(), strict=True):
            assert names[i] in source.classes[name].split()
    train = ShapesPairs("train", 10)
    assert train.captions(range(10)) == ShapesPairs("train", 20).captions(range(10))
    assert train_captions(10) == [text for captions in train.captions(range(10)) for text in captions]


def test_shapes_refuse_what_they_lack():
    for options, said in (
        ({"split": "val"}, "no split"),
        ({"length": 0}, "length"),
        ({"target": "size"}, "target=size"),
    ):
        with pytest.raises(UserError, match=said):
            ShapesPairs(**({"split": "train", "length": 3} | options))
