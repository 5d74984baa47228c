"""Shards: how they are written, found, indexed and read; their order; what happens to damaged ones."""

import io
import itertools
import json
import pickle
import tarfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from ssl_lab.data import shards as module_of_shards
from ssl_lab.data import shards_index
from ssl_lab.data.module import DataModule
from ssl_lab.data.pair_views import PairViews
from ssl_lab.data.pairs_tokenizer import trained
from ssl_lab.data.shards import Shards
from ssl_lab.data.shards_index import index_of
from ssl_lab.data.shards_order import row_order
from ssl_lab.data.views import Crop, Resize
from ssl_lab.errors import UserError

KEYS = ("image", "tokens", "valid", "target", "index", "position")


def png(number, side=12):
    """An image whose pixels all have this number."""
    out = io.BytesIO()
    Image.new("RGB", (side, side), (number % 256, number // 256, 7)).save(out, format="PNG")
    return out.getvalue()


def number_of(image):
    return int(image[0, 0, 0]) + 256 * int(image[1, 0, 0])


def tar(path, records, format=tarfile.PAX_FORMAT):
    """`records`: (name, content) in the order of the shard."""
    with tarfile.open(path, "w", format=format) as file:
        for name, content in records:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))


def pair(i, key=None):
    key = key or f"{i:06d}"
    return [(f"{key}.png", png(i)), (f"{key}.txt", f"picture {i}".encode())]


def pack(folder, sizes, name="train"):
    """Shards of these sizes; record i of all shows number i."""
    first = 0
    for number, size in enumerate(sizes):
        tar(folder / f"{name}-{number:03d}.tar", [x for i in range(first, first + size) for x in pair(i)])
        first += size
    return str(folder)


@pytest.fixture(scope="module")
def tokenizer():
    return trained("shapes", "bpe", 400)


def numbers(source, rows):
    samples = source.read(rows)
    images = samples.data.images if hasattr(samples.data, "images") else samples.data
    return [number_of(x) for x in images]


def loader(source, step=0, rank=0, ranks=1, batch_size=4, workers=0):
    views = PairViews(Crop(8))
    data = DataModule(
        source, source, views, eval_views=PairViews(Resize(8), caption="first"), batch_size=batch_size, seed=3,
        num_workers=workers,
    )  # fmt: skip
    data.trainer = SimpleNamespace(accumulate_grad_batches=1, global_step=step, world_size=ranks, global_rank=rank)
    return data


def batches(source, count, **options):
    return [batch for batch, _ in zip(loader(source, **options).train_dataloader(), range(count), strict=False)]


def same(a, b):
    assert a.keys() == b.keys() == set(KEYS)
    assert all(torch.equal(a[key], b[key]) for key in KEYS)


def test_rows_are_the_records_in_the_order_of_the_shards(tmp_path, tokenizer):
    source = Shards(pack(tmp_path, [5, 1, 7]), tokenizer, split=None)
    # of each shard those that would be held out come first
    shown = numbers(source, range(13))
    assert sorted(shown) == list(range(13)) and set(shown[:5]) == set(range(5)) and shown[5] == 5
    assert [c for c in source.captions(range(13))] == [[f"picture {i}"] for i in shown]
    assert numbers(source, [12, 0, 12]) == [shown[12], shown[0], shown[12]]
    assert source.read([0]).targets.tolist() == [-1] and source.classes == []
    assert source.table.name(5).endswith("train-001.tar 000005.png")


def test_captions_labels_and_names_come_from_where_webdataset_puts_them(tmp_path, tokenizer):
    many = json.dumps({"captions": ["one", "two"], "label": 1}).encode()
    records = [
        ("deep/er/a.png", png(0)), ("deep/er/a.txt", b"plain\n"),
        ("b.jpeg", png(1)), ("b.json", many), ("b.txt", b"one"),
        ("c.PNG", png(2)), ("c.txt", b"three"), ("c.cls", b"2"), ("c.json", b'{"width": 3}'),
        ("d.seen.png", png(3)), ("d.txt", "vier \u00fc".encode()),
        ("e.png", png(4)), ("e.json", b'{"caption": "five", "label": "cat"}'),
        ("f" * 150 + ".png", png(5)), ("f" * 150 + ".txt", b"six"),
    ]  # fmt: skip
    tar(tmp_path / "x.tar", records)
    source = Shards(tmp_path / "x.tar", tokenizer, split=None)
    found = dict(zip(numbers(source, range(6)), source.captions(range(6)), strict=True))
    assert found == {0: ["plain"], 1: ["one", "two"], 2: ["three"], 3: ["vier \u00fc"], 4: ["five"], 5: ["six"]}
    targets = dict(zip(numbers(source, range(6)), source.read(range(6)).targets.tolist(), strict=True))
    assert targets == {0: -1, 1: 1, 2: 2, 3: -1, 4: -1, 5: -1}
    assert source.classes == ["0", "1", "2"]
    (tmp_path / "classes.json").write_text('["cat", "dog", "owl"]')
    assert Shards(tmp_path / "x.tar", split=None).classes == ["cat", "dog", "owl"]
    (tmp_path / "classes.json").write_text('["cat", "dog"]')
    with pytest.raises(UserError, match="hold class 2, but"):
        Shards(tmp_path / "x.tar", split=None)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_form_of_tar_is_read(form, tmp_path):
    key = "n" * 90 if form == tarfile.USTAR_FORMAT else "n" * 300
    tar(tmp_path / "x.tar", pair(3) + pair(4, key) + pair(5), form)
    assert sorted(numbers(Shards(tmp_path / "x.tar", split=None), range(3))) == [3, 4, 5]


def test_a_pass_visits_every_row_once_a_few_shards_at_a_time():
    sizes, mix = (5, 9, 2, 7, 4, 6), 2
    shard_of = torch.repeat_interleave(torch.arange(6), torch.tensor(sizes))
    total = sum(sizes)
    passes = row_order(torch.arange(3 * total), 7, sizes, mix).view(3, total)
    assert torch.equal(passes.sort(1).values, torch.arange(total).expand(3, -1))
    assert not torch.equal(passes[0], passes[1])
    assert not torch.equal(row_order(torch.arange(total), 8, sizes, mix), passes[0])
    for turn in shard_of[passes].tolist():
        seen, start = [], 0
        while start < total:  # groups are runs that hold all rows of two shards, and no other
            group = list(dict.fromkeys(turn[start:]))[:mix]
            end = start + sum(sizes[s] for s in group)
            assert Counter(turn[start:end]) == {s: sizes[s] for s in group}
            seen, start = seen + group, end
        assert sorted(seen) == list(range(6))
        assert sum(a != b for a, b in itertools.pairwise(turn)) > 8  # within a group shards alternate
    part = row_order(torch.arange(20, 50), 7, sizes, mix)
    assert torch.equal(part, passes.flatten()[20:50])  # no history: any slice alone
    whole = row_order(torch.arange(total), 7, sizes, 6)
    assert len({int(shard_of[r]) for r in whole[:12]}) > 3


@pytest.mark.parametrize("workers", [0, 2])
def test_training_resumes_in_the_middle_of_a_shard(workers, tmp_path, tokenizer):
    source = Shards(pack(tmp_path, [7, 5, 9, 6, 8]), tokenizer, split=None, context_length=16, mix=2)
    straight = batches(source, 24)  # almost three passes
    for step in (1, 10, 17):
        again = Shards(str(tmp_path), tokenizer, split=None, context_length=16, mix=2)
        for a, b in zip(straight[step:], batches(again, 24 - step, step=step, workers=workers), strict=True):
            same(a, b)
    rows = torch.cat([b["index"] for b in straight])
    assert torch.equal(rows, row_order(torch.arange(96), 3, (7, 5, 9, 6, 8), 2))


@pytest.mark.parametrize("workers", [0, 2])
def test_two_ranks_share_the_batches_of_one(workers, tmp_path, tokenizer):
    source = Shards(pack(tmp_path, [7, 5, 9]), tokenizer, split=None, context_length=16, mix=2)
    one = batches(source, 8, batch_size=8, step=3)
    two = [batches(source, 8, step=3, rank=r, ranks=2, workers=workers) for r in range(2)]
    for whole, *halves in zip(one, *two, strict=True):
        same(whole, {key: torch.cat([half[key] for half in halves]) for key in KEYS})


def test_evaluation_gives_every_record_once(tmp_path):
    source = Shards(pack(tmp_path, [3, 4]), split=None)
    data = DataModule(source, source, Crop(8), eval_views=Resize(8), batch_size=4, image_size=8)
    assert torch.cat([b["index"] for b in data.eval_loader("test")]).tolist() == list(range(7))


def test_splits_are_told_by_the_names_of_shards(tmp_path):
    pack(tmp_path, [4, 3])
    pack(tmp_path, [2], "val")
    assert (len(Shards(tmp_path)), len(Shards(tmp_path, split="test")), len(Shards(tmp_path, split=None))) == (7, 2, 9)
    assert numbers(Shards(tmp_path, split="test"), [0, 1]) == [0, 1]


def test_a_tenth_of_the_records_is_held_out_where_there_is_one_split(tmp_path):
    pack(tmp_path, [60, 60], "part")
    train, test = Shards(tmp_path), Shards(tmp_path, split="test")
    shown = [numbers(x, range(len(x))) for x in (train, test)]
    assert sorted(shown[0] + shown[1]) == list(range(120)) and 3 <= len(shown[1]) <= 25
    pack(tmp_path, [60, 60, 5], "part")  # more of it moves no record
    assert set(shown[1]) <= set(numbers(Shards(tmp_path, split="test"), range(len(Shards(tmp_path, split="test")))))


def test_shards_are_named_by_folder_pattern_list_or_file(tmp_path):
    folder = pack(tmp_path, [2, 3, 4], "part")
    pattern = f"{folder}/part-{{000..002}}.tar"
    (tmp_path / "some.txt").write_text("part-002.tar\n\npart-000.tar\n")
    for path, count in ((folder, 9), (pattern, 9), (tmp_path / "some.txt", 6), (f"{folder}/part-001.tar", 3)):
        assert len(Shards(path, split=None)) == count
    assert set(numbers(Shards(tmp_path / "some.txt", split=None), range(4))) == {5, 6, 7, 8}
    assert trained(str(tmp_path / "some.txt"), "character").encode("picture")


def test_what_is_missing_or_packed_is_named(tmp_path):
    folder = pack(tmp_path, [2, 3], "part")
    (tmp_path / "packed.tar.gz").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    for path, said in (
        (f"{folder}/part-{{000..003}}.tar", r"shard .*part-002\.tar is missing, one of 2 of the 4"),
        (f"{folder}/prat-000.tar", r"did you mean part-000\.tar"),
        (f"{folder}/packed.tar.gz", "unpack"),
        (f"{folder}/empty", "no shards in"),
    ):
        with pytest.raises(UserError, match=said) as caught:
            Shards(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="mix is 0"):
        Shards(folder, mix=0)


def test_the_index_is_made_once_and_again_when_the_shard_changes(tmp_path, monkeypatch):
    pack(tmp_path, [3])
    shard, scans = tmp_path / "train-000.tar", []
    scan = shards_index._scan
    monkeypatch.setattr(shards_index, "_scan", lambda *x: scans.append(x) or scan(*x))
    first = index_of(shard, True)
    assert index_of(shard, True) == first and len(scans) == 1
    assert index_of(shard, False).count == 3 and len(scans) == 2  # without captions it is another one
    pack(tmp_path, [4])
    assert index_of(shard, True).count == 4 and len(scans) == 3
    file = next((tmp_path / ".index").glob("*.pairs"))
    file.write_bytes(file.read_bytes()[:-1])
    assert index_of(shard, True).count == 4 and len(scans) == 4
    elsewhere = index_of(shard, True, tmp_path / "indices")
    assert elsewhere.file.startswith(str(tmp_path / "indices")) and elsewhere.records().tolist() == first_of(shard)


def test_a_tokenizer_is_trained_from_the_index_that_is_named(tmp_path):
    (tmp_path / "shards").mkdir()
    pack(tmp_path / "shards", [3])
    trained(str(tmp_path / "shards"), "character", split=None, index=str(tmp_path / "indices"))
    assert list((tmp_path / "indices").iterdir()) and not (tmp_path / "shards" / ".index").exists()


def first_of(shard):
    return index_of(shard, True).records().tolist()


def test_a_folder_that_cannot_be_written_is_read_all_the_same(tmp_path, monkeypatch):
    pack(tmp_path, [3, 2])

    def refuse(*_):
        raise PermissionError("read-only")

    monkeypatch.setattr(shards_index, "_write", refuse)
    assert sorted(numbers(Shards(tmp_path, split=None), range(5))) == [0, 1, 2, 3, 4]


@pytest.mark.faults("C11", "broken record of a shard: left out and counted")
def test_a_broken_record_is_left_out_and_counted(tmp_path, tokenizer, caplog):
    records = [*pair(0), ("1.txt", b"no image"), ("2.png", png(2)), ("3.png", png(3)), ("3.txt", b"\xff\xfe\xff")]
    records += [("4.png", png(4)), ("4.json", b"{"), ("5.png", png(5)), ("5.txt", b"  \n"), *pair(6)]
    tar(tmp_path / "x.tar", records)
    source = Shards(tmp_path, tokenizer, split=None)
    assert sorted(numbers(source, range(len(source)))) == [0, 6]
    assert "no image 1" in caplog.text and "no caption 4" in caplog.text and "(2 records remain)" in caplog.text
    assert sorted(numbers(Shards(tmp_path, split=None), range(6))) == [0, 2, 3, 4, 5, 6]  # images need no caption


@pytest.mark.faults("C11", "shard cut off: gives what it has")
def test_a_cut_off_shard_gives_what_it_has(tmp_path, tokenizer, caplog):
    pack(tmp_path, [6, 5])
    whole = (tmp_path / "train-000.tar").read_bytes()
    with tarfile.open(tmp_path / "train-000.tar") as file:
        place = file.getmember("000003.png").offset_data
    (tmp_path / "train-000.tar").write_bytes(whole[: place + 20])
    (tmp_path / "train-002.tar").write_bytes(b"this is no tar at all" * 100)
    (tmp_path / "train-003.tar").write_bytes(b"")
    source = Shards(tmp_path, tokenizer, split=None, context_length=16)
    assert sorted(numbers(source, range(8))) == [0, 1, 2, 6, 7, 8, 9, 10] and len(source) == 8
    assert "cut off 1" in caplog.text and "no tar" in caplog.text
    assert len(batches(source, 5)) == 5
    caplog.clear()
    module_of_shards._indices.cache_clear()
    Shards(tmp_path, tokenizer, split=None)
    assert "cut off 1" in caplog.text  # said again when the index is only read


def test_nothing_usable_ends_the_run(tmp_path, tokenizer):
    (tmp_path / "train-0.tar").write_bytes(b"this is no tar at all" * 100)
    with pytest.raises(UserError, match="no usable record"):
        Shards(tmp_path, tokenizer, split=None)


def test_an_unreadable_image_is_replaced_with_its_captions(tmp_path, tokenizer, caplog):
    records = [x for i in range(40) for x in pair(i)]
    records[22] = ("000011.png", b"no image at all")
    tar(tmp_path / "x.tar", records)
    source = Shards(tmp_path, tokenizer, split=None, bad_samples=tmp_path / "bad.jsonl")
    bad = next(i for i, c in enumerate(source.captions(range(40))) if c == ["picture 11"])
    samples = source.read([bad])
    assert samples.rows[0] != bad and samples.data.captions == [[f"picture {number_of(samples.data.images[0])}"]]
    assert "x.tar 000011.png" in caplog.text and "000011.png" in (tmp_path / "bad.jsonl").read_text()


@pytest.mark.faults("C11", "shard that vanishes: replaced, too many end the run")
def test_a_shard_that_vanishes_is_replaced_until_it_is_too_much(tmp_path, tokenizer):
    made = Shards(pack(tmp_path, [400, 3]), tokenizer, split=None)
    source = pickle.loads(pickle.dumps(made))  # as a worker gets it, without open files
    (tmp_path / "train-001.tar").unlink()
    assert all(x < 400 for x in numbers(source, [400, 401, 402]))
    (tmp_path / "train-000.tar").unlink()
    with pytest.raises(UserError, match="unreadable"):
        pickle.loads(pickle.dumps(made)).read(range(50))


def test_few_files_and_indices_are_open_at_a_time(tmp_path, tokenizer):
    source = Shards(pack(tmp_path, [2] * 40), tokenizer, split=None)
    assert sorted(numbers(source, range(80))) == list(range(80))
    assert len(source.table._files) <= 16 and len(source.table._records) <= 16


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory in use is read from /proc")
def test_memory_is_flat_over_many_shards(tmp_path, tokenizer):
    source = Shards(pack(tmp_path, [100] * 40), tokenizer, split=None, context_length=16)

    def used(first, last):
        for start in range(first, last, 100):
            source.read(range(start, start + 100))
        text = Path("/proc/self/status").read_text()
        return int(text.partition("VmRSS:")[2].split()[0]) << 10

    early = used(0, 1000)
    assert used(1000, 4000) - early < 4 << 20
