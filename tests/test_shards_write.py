"""Writing shards: what is in them, whole files, the verb."""

import json
import tarfile

import pytest
import torch
from PIL import Image
from test_shards import png

from ssl_lab.cli.main import main
from ssl_lab.data.images import HFImages
from ssl_lab.data.pairs_shapes import ShapesPairs
from ssl_lab.data.pairs_tokenizer import trained
from ssl_lab.data.shapes import Shapes
from ssl_lab.data.shards import Shards
from ssl_lab.data.shards_write import plan, write_shards
from ssl_lab.errors import UserError


def test_writing_and_reading_gives_the_same(tmp_path):
    tokenizer = trained("shapes", "bpe", 400)
    scenes = ShapesPairs("train", 25, image_size=8)
    written = write_shards(scenes, tmp_path, "train", 10)
    assert (written.shards, written.records, written.unreadable, written.kept) == (3, 25, 0, 0)
    source = Shards(tmp_path, tokenizer, split=None, context_length=16)
    samples, names = source.read(range(25)), [int(source.table.name(i)[-13:-4]) for i in range(25)]
    assert sorted(names) == list(range(25))
    assert torch.equal(torch.stack(samples.data.images), scenes.read(names).data)
    assert samples.data.captions == scenes.captions(names)
    assert torch.equal(samples.targets, scenes.read(names).targets)


def test_writing_twice_gives_the_same_bytes_and_whole_files_are_kept(tmp_path):
    scenes = Shapes("test", 25, image_size=8)
    for name in ("a", "b"):
        write_shards(scenes, tmp_path / name, "test", 10)
    files = sorted(x.name for x in (tmp_path / "a").iterdir())
    assert files == ["test-00000.tar", "test-00001.tar", "test-00002.tar"]
    assert all((tmp_path / "a" / x).read_bytes() == (tmp_path / "b" / x).read_bytes() for x in files)
    (tmp_path / "a" / files[1]).unlink()
    again = write_shards(scenes, tmp_path / "a", "test", 10)
    assert (again.kept, again.shards, again.records) == (2, 3, 25)
    assert (tmp_path / "a" / files[1]).read_bytes() == (tmp_path / "b" / files[1]).read_bytes()


def test_a_shard_appears_whole_or_not_at_all(tmp_path):
    class Ends(Shapes):
        def read(self, rows):
            if rows[0] >= 256:
                raise KeyboardInterrupt
            return super().read(rows)

    with pytest.raises(KeyboardInterrupt):
        write_shards(Ends("train", 700, image_size=8), tmp_path, "train", 350)  # read 256 at a time
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyboardInterrupt):
        write_shards(Ends("train", 700, image_size=8), tmp_path, "train", 150)
    assert [x.name for x in sorted(tmp_path.iterdir())] == ["train-00000.tar", "train-00001.tar"]


def test_an_unreadable_image_is_not_written(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    from ssl_lab.data.pairs import Pairs

    images = [png(i)[:40] if i == 3 else png(i) for i in range(8)]
    pq.write_table(pa.table({"image": images, "caption": [f"c {i}" for i in range(8)]}), tmp_path / "train.parquet")
    pq.write_table(pa.table({"image": images[4:], "caption": ["x"] * 4}), tmp_path / "test.parquet")
    written = write_shards(Pairs(tmp_path, in_memory=False), tmp_path / "out", "train", 5)
    assert (written.records, written.unreadable) == (7, 1)
    with tarfile.open(tmp_path / "out" / "train-00000.tar") as file:
        assert file.extractfile("000000001.png").read() == images[1]  # as it was stored
        assert file.extractfile("000000001.txt").read() == b"c 1" and "000000003.png" not in file.getnames()


def test_every_format_is_found_again(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        for i, form in enumerate(("PNG", "JPEG2000", "TGA")):
            Image.new("RGB", (8, 8), (90 * i, 0, 0)).save(tmp_path / split / f"{i}.png", format=form)
    assert write_shards(HFImages(tmp_path, in_memory=False), tmp_path / "out", "train", 5).records == 3
    with tarfile.open(tmp_path / "out" / "train-00000.tar") as file:
        assert [name.rpartition(".")[2] for name in file.getnames()] == ["png", "jp2", "png"]
    samples = Shards(tmp_path / "out", split=None).read(range(3))
    assert [int(image[0, 0, 0]) for image in samples.data] == [0, 90, 180]


def test_a_folder_with_other_shards_is_refused(tmp_path):
    plan(tmp_path, {"rows": 3})
    plan(tmp_path, {"rows": 3})
    with pytest.raises(UserError, match="other data"):
        plan(tmp_path, {"rows": 4})


def test_the_verb_writes_what_training_reads(tmp_path, capsys):
    words = ["data=shapes_captions", "data.train.length=30", "data.test.length=8", "data.image_size=8"]
    out = tmp_path / "out"
    assert main(["shards", *words, f"out={out}", "per_shard=10"]) == 0
    assert "30 records in 3 shards" in capsys.readouterr().out.replace("\n", " ")
    assert json.loads((out / "classes.json").read_text())[0] == "red circle"
    assert (len(Shards(out)), len(Shards(out, split="test"))) == (30, 8)
    assert main(["shards", *words, f"out={out}", "per_shard=10"]) == 0
    assert "3 of them there before" in capsys.readouterr().out.replace("\n", " ")
    assert main(["shards", *words, f"out={out}", "per_shard=20"]) == 2
    assert main(["shards", *words, f"out={out}", "per_shard=0"]) == 2
    assert main(["shards", *words, f"out={out / 'classes.json'}"]) == 2
    assert "give a folder that can be written to" in capsys.readouterr().err
    assert main(["shards", "data=captions", f"out={tmp_path / 'no'}"]) == 2
    assert "none" in capsys.readouterr().err


def test_a_shard_that_went_missing_is_named(tmp_path):
    words = ["data=shapes_captions", "data.train.length=30", "data.test.length=8", "data.image_size=8"]
    assert main(["shards", *words, f"out={tmp_path}", "per_shard=10"]) == 0
    (tmp_path / "train-00001.tar").unlink()
    with pytest.raises(UserError, match=r"train-00001\.tar is missing, one of 1 of the 4 that shards\.json names"):
        Shards(tmp_path)
    (tmp_path / "shards.json").write_text("{")  # another tool's, perhaps
    assert len(Shards(tmp_path)) == 20
