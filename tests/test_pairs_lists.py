"""Images with captions that a .csv or .tsv lists by their paths, and a parquet file that names them beside it."""

import csv

import pytest
from test_pairs_data import number_of, parquet, png

from ssl_lab.data.pairs import Pairs
from ssl_lab.errors import UserError


def csv_pack(folder, text, name="captions.csv", count=20):
    (folder / "photos").mkdir()
    for i in range(count):
        (folder / "photos" / f"{i}.png").write_bytes(png(i))
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def test_lines_of_a_csv_with_one_image_are_one_row(tmp_path):
    lines = [f'photos/{i}.png,"one, {i}"' for i in range(20)] + [f"photos/{i}.png,two {i}" for i in range(20)]
    path = csv_pack(tmp_path, "image,caption\n" + "\n".join(lines) + "\nphotos/0.png,\n")
    train, test = (Pairs(path, split=s) for s in ("train", "test"))
    assert len(train) + len(test) == 20 and len(test) > 0
    seen = []
    for source in (train, test):
        samples = source.read(range(len(source)))
        numbers = [number_of(x) for x in samples.data]
        assert source.captions(range(len(source))) == [[f"one, {i}", f"two {i}"] for i in numbers]
        seen += numbers
    assert sorted(seen) == list(range(20))


def test_a_tsv_may_hold_splits_and_classes(tmp_path):
    lines = [f"photos/{i}.png\tsays {i}\t{'val' if i < 3 else 'train'}\t{'ab'[i % 2]}" for i in range(20)]
    path = csv_pack(tmp_path, "filepath\ttitle\tsplit\tlabel\n" + "\n".join(lines), "pairs.tsv")
    train, test = (Pairs(path, split=s) for s in ("train", "test"))
    assert (len(train), len(test)) == (17, 3) and train.classes == ["a", "b"]
    assert test.captions([2]) == [["says 2"]] and test.read([0, 1, 2]).targets.tolist() == [0, 1, 0]


def test_a_folder_may_hold_a_csv_for_each_split(tmp_path):
    csv_pack(tmp_path, "image,caption\n" + "\n".join(f"photos/{i}.png,c {i}" for i in range(15)), "train.csv")
    (tmp_path / "test.csv").write_text("image,caption\n" + "\n".join(f"photos/{i}.png,c {i}" for i in range(15, 20)))
    assert (len(Pairs(tmp_path)), len(Pairs(tmp_path, split="test"))) == (15, 5)
    assert number_of(Pairs(tmp_path, split="test").read([1]).data[0]) == 16


def test_quotes_that_somebody_said_swallow_no_lines_of_a_tsv(tmp_path):
    said = ['"Go on', "he said", 'a "', '"Yes," she said', 'an 8" plate', '"No."']
    head = "image\tcaption\tvotes\n"
    path = csv_pack(tmp_path, head + "".join(f"photos/{i}.png\t{x}\t2\n" for i, x in enumerate(said)), "all.tsv")
    found = [text for s in ("train", "test") for texts in captions_of(path, s) for text in texts]
    assert sorted(found) == sorted(said)


def test_quotes_around_fields_of_a_tsv_are_none_of_the_text(tmp_path):
    said = ['She said "no".', "with a\ttab", "two\nlines", '"all of it"', "bare"]
    path = csv_pack(tmp_path, "", "all.tsv")
    with open(path, "w", newline="") as file:
        lines = [("image", "caption"), *((f"photos/{i}.png", x) for i, x in enumerate(said))]
        csv.writer(file, delimiter="\t").writerows(lines)
    found = [text for s in ("train", "test") for texts in captions_of(path, s) for text in texts]
    assert sorted(found) == sorted(said)


def captions_of(path, split):
    pairs = Pairs(path, split=split)
    return pairs.captions(range(len(pairs)))


@pytest.mark.parametrize(
    ("names", "classes"), [("abc", ["a", "b", "c"]), ("102", ["0", "1", "2"]), ("1x2", ["1", "2", "x"])]
)
def test_classes_have_one_number_in_the_lists_of_all_splits(tmp_path, names, classes):
    csv_pack(tmp_path, "image,caption,label\n" + f"photos/0.png,x,{names[0]}\nphotos/1.png,x,{names[2]}\n", "train.csv")
    (tmp_path / "test.csv").write_text(f"image,caption,label\nphotos/2.png,x,{names[1]}\nphotos/3.png,x,{names[2]}\n")
    (tmp_path / "dev.csv").write_text("image,caption\nphotos/4.png,x\n")
    sources = [Pairs(tmp_path, split=s) for s in ("train", "test", "dev")]
    assert all(x.classes == classes for x in sources)
    targets = [x.read(range(len(x))).targets.tolist() for x in sources]
    numbers = [classes.index(x) for x in names]
    assert targets == [[numbers[0], numbers[2]], [numbers[1], numbers[2]], [-1]]


def test_a_parquet_file_may_name_images_beside_it(tmp_path):
    (tmp_path / "x").mkdir()
    for i in range(12):
        (tmp_path / "x" / f"{i}.png").write_bytes(png(i))
    for split in ("train", "test"):
        parquet(tmp_path / f"{split}.parquet", 12, image=[f"x/{i}.png" for i in range(12)])
    assert [number_of(x) for x in Pairs(tmp_path).read([3, 8]).data] == [3, 8]


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        ("photo,words\na.png,b\n", {}, "image_column to one of photo, words"),
        ("image,words\na.png,b\n", {"caption_column": "caption"}, "no column 'caption'"),
        ("image,caption\na.png,\n", {}, "no line has both"),
        ("image,caption\na.png,b\n", {"split": "test"}, "single image"),
        ("image,caption\na.png,b\n", {"split": "later"}, "no split 'later'"),
        ("image,caption\na.png,b\n", {"label_column": "kind"}, "no column 'kind'"),
    ],
)
def test_what_is_wrong_with_a_csv_is_named(text, options, said, tmp_path):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(UserError, match=said):
        Pairs(tmp_path / "a.csv", **options)
