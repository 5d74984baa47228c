import io
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from ssl_lab.data.decode import MAX_PIXELS, Unreadable, decode, size_of
from ssl_lab.data.images import HFImages
from ssl_lab.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def plain(number: int, width: int = 8, height: int = 8) -> bytes:
    """An image whose every pixel is (number, 100, 200)."""
    return encode(Image.new("RGB", (width, height), (number, 100, 200)))


def folder(root: Path, names: list[str], make: Callable[[int], bytes] = plain) -> Path:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(make(number))
    return root


def noise(width: int = 64, height: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def bomb() -> bytes:
    """The header of a PNG that claims 20,000 x 20,000 pixels."""
    head = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head)) + b"\0" * 12


BROKEN = {
    "truncated": lambda: encode(noise(), "JPEG")[:1500],
    "empty": lambda: b"",
    "text": lambda: b"this is no image at all",
    "zeros": lambda: b"\0" * 500,
    "cut_png": lambda: encode(noise())[:3000],
    "bomb": bomb,
}


@pytest.mark.faults("C11", "image truncated, empty, text, zeros, bomb: reason in a line")
@pytest.mark.parametrize("kind", BROKEN)
def test_broken_bytes_give_a_reason(kind: str) -> None:
    with pytest.raises(Unreadable) as error:
        decode(BROKEN[kind]())
    assert str(error.value) and "\n" not in str(error.value)


@pytest.mark.faults("C11", "grey, palette, alpha, CMYK, 16 bit: RGB")
def test_modes_become_rgb() -> None:
    def pixel(data: bytes) -> list[int]:
        image = decode(data)
        assert image.dtype == torch.uint8 and image.shape == (3, 6, 4)
        return image[:, 0, 0].tolist()

    size = (4, 6)
    assert pixel(encode(Image.new("L", size, 77))) == [77] * 3
    assert pixel(encode(Image.new("1", size, 1))) == [255] * 3
    assert pixel(encode(Image.new("RGBA", size, (200, 10, 30, 0)))) == [255] * 3  # clear: the white behind it
    assert pixel(encode(Image.new("RGBA", size, (200, 10, 30, 255)))) == [200, 10, 30]
    assert pixel(encode(Image.new("LA", size, (0, 128)))) == [127] * 3
    sixteen = Image.fromarray(np.full((6, 4), 0x8080, dtype=np.uint16))
    assert pixel(encode(sixteen)) == [128] * 3
    assert pixel(encode(sixteen, "TIFF")) == [128] * 3
    assert pixel(encode(Image.new("P", size, 0).convert("P"), "GIF"))[0] in range(256)
    for high in (1, 255):
        floats = encode(Image.fromarray(np.linspace(high, 0, 24, dtype=np.float32).reshape(6, 4)), "TIFF")
        assert pixel(floats) == [255] * 3 and decode(floats)[0, 3, 0] in range(110, 130)
    for odd in (-1.0, 300.0, float("nan")):
        with pytest.raises(Unreadable, match=r"not in 0\.\.1 or 0\.\.255"):
            decode(encode(Image.new("F", size, odd), "TIFF"))
    cmyk = pixel(encode(Image.new("CMYK", size, (0, 255, 255, 0)), "JPEG", quality=95))
    assert cmyk[0] > 240 and max(cmyk[1:]) < 15
    wrong_suffix = encode(Image.new("RGB", size, (9, 8, 7)), "BMP")  # the suffix is never asked
    assert pixel(wrong_suffix) == [9, 8, 7]


@pytest.mark.faults("C11", "turned by its EXIF: upright")
def test_orientation_is_applied() -> None:
    image = Image.new("RGB", (8, 4), "black")
    image.paste((255, 255, 255), (0, 0, 4, 4))  # the left half is white
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    data = encode(image, "JPEG", exif=exif, quality=95)
    assert size_of(data) == (8, 4)
    turned = decode(data)
    assert turned.shape == (3, 8, 4)
    assert turned[:, :4].float().mean() > 240 and turned[:, 4:].float().mean() < 15
    assert MAX_PIXELS < 20_000 * 20_000


def test_class_folders_with_splits(tmp_path: Path) -> None:
    names = [f"{split}/{name}/{i}.png" for split in ("train", "val") for name in ("cat", "dog") for i in range(3)]
    folder(tmp_path, [*names, "train/.hidden/x.png", "train/cat/deeper/y.PNG", "train/notes.txt"])
    train, test = HFImages(tmp_path), HFImages(tmp_path, split="test")
    assert train.classes == test.classes == ["cat", "dog"]
    assert (len(train), len(test)) == (7, 6)
    samples = test.read([0, 5])
    assert samples.targets.tolist() == [0, 1] and samples.rows.tolist() == [0, 5]
    assert isinstance(samples.data, torch.Tensor) and samples.data.shape == (2, 3, 8, 8)
    assert samples.data[:, 0, 0, 0].tolist() == [6, 11]


def test_one_folder_is_divided_by_the_names_of_its_files(tmp_path: Path) -> None:
    folder(tmp_path, [f"picture{i}.png" for i in range(100)])
    first = [set(HFImages(tmp_path, split=x).table.rows["image"]) for x in ("train", "test")]
    assert 3 <= len(first[1]) <= 20 and not first[0] & first[1] and len(first[0] | first[1]) == 100
    folder(tmp_path, ["another.png"])
    later = [set(HFImages(tmp_path, split=x).table.rows["image"]) for x in ("train", "test")]
    assert first[0] <= later[0] and first[1] <= later[1]  # a new file moves no other
    images = HFImages(tmp_path)
    assert images.classes == [] and set(images.read(range(len(images))).targets.tolist()) == {-1}


def test_images_of_several_sizes_stay_encoded(tmp_path: Path) -> None:
    folder(tmp_path, [f"{i}.png" for i in range(30)], lambda i: plain(i, 8 + i % 3, 9))
    images = HFImages(tmp_path).read([4, 1])
    assert isinstance(images.data, list) and images.data[0].shape[:2] == (3, 9)
    with pytest.raises(UserError, match="one size"):
        HFImages(tmp_path, in_memory=True)


def write(path: Path, rows: int, classes: list[str] | None = None, **columns: list[object]) -> None:
    table = pa.table({"image": [plain(i) for i in range(rows)], **columns})
    table = table.replace_schema_metadata({"classes": json.dumps(classes)} if classes else {})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


@pytest.mark.parametrize("in_memory", [True, False])
def test_parquet_folder(tmp_path: Path, in_memory: bool) -> None:
    write(tmp_path / "train.parquet", 20, ["a", "b", "c"], label=[i % 3 for i in range(20)])
    write(tmp_path / "test-00000-of-00002.parquet", 4, label=[0, 1, 2, 0])
    write(tmp_path / "test-00001-of-00002.parquet", 3, label=[None, 1, 2])
    train = HFImages(tmp_path, in_memory=in_memory)
    test = HFImages(tmp_path, split="test", in_memory=in_memory)
    assert (len(train), len(test)) == (20, 7) and train.classes == test.classes == ["a", "b", "c"]
    samples = test.read([4, 0, 6])
    assert samples.targets.tolist() == [-1, 0, 2]
    assert [int(x[0, 0, 0]) for x in samples.data] == [0, 0, 2]


def test_one_parquet_file_with_named_columns_and_words_as_classes(tmp_path: Path) -> None:
    file = tmp_path / "all.parquet"
    write(file, 60, photo=[plain(200)] * 60, kind=["dog", "cat", "eel"] * 20)
    train = HFImages(file, image_column="photo", label_column="kind")
    test = HFImages(file, split="test", image_column="photo", label_column="kind")
    assert train.classes == test.classes == ["cat", "dog", "eel"]
    assert len(train) + len(test) == 60 and len(test) > 1
    assert int(train.read([0]).data[0][0, 0, 0]) == 200
    with pytest.raises(UserError, match="no column 'lable': it has image, photo, kind"):
        HFImages(file, label_column="lable")


@pytest.mark.parametrize(
    ("train", "test", "targets", "classes"),
    [
        ([1.0, None, 0.0], [2.0, 0.0, float("nan")], [[1, -1, 0], [2, 0, -1]], ["0", "1", "2"]),  # as pandas has them
        ([1, -100, 0], [-1, 1, 1], [[1, -1, 0], [-1, 1, 1]], ["0", "1"]),
        ([True, False, None], [True, True, True], [[1, 0, -1], [1, 1, 1]], ["0", "1"]),
        (["b", "a", None], [None, None, None], [[1, 0, -1], [-1, -1, -1]], ["a", "b"]),
    ],
)
def test_labels_of_every_kind(tmp_path: Path, train: list, test: list, targets: list, classes: list) -> None:
    write(tmp_path / "train.parquet", 3, label=train)
    write(tmp_path / "test.parquet", 3, label=test)
    for split, wanted in zip(("train", "test"), targets, strict=True):
        images = HFImages(tmp_path, split=split)
        assert images.read(range(3)).targets.tolist() == wanted and images.classes == classes


@pytest.mark.parametrize(
    "values", [[[0], [1, 2], []], [{"x": 1}, {"x": 2}, None], [0.5, 0.1, 2.0], [1 << 63, 7, 8], [b"a", b"b", b"c"]]
)
def test_a_label_column_without_classes_ends_no_run(
    tmp_path: Path, values: list, caplog: pytest.LogCaptureFixture
) -> None:
    column = pa.array(values, pa.uint64()) if values[0] == 1 << 63 else pa.array(values)
    for split in ("train", "test"):
        write(tmp_path / f"{split}.parquet", 3, label=column)
    images = HFImages(tmp_path)
    assert images.classes == [] and images.read([0, 2]).targets.tolist() == [-1, -1]
    assert caplog.text.count("column 'label' holds") == caplog.text.count("passed over") == 1
    with pytest.raises(UserError, match="column 'label' holds") as error:
        HFImages(tmp_path, label_column="label")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("given", [None, "label"])
def test_a_split_without_labels(tmp_path: Path, given: str | None) -> None:
    write(tmp_path / "train.parquet", 3, label=["b", "a", "c"])
    write(tmp_path / "test.parquet", 2)
    train, test = (HFImages(tmp_path, split=x, label_column=given) for x in ("train", "test"))
    assert train.classes == ["a", "b", "c"] and train.read([0, 1]).targets.tolist() == [1, 0]
    assert test.read([0, 1]).targets.tolist() == [-1, -1]


@pytest.mark.parametrize("values", [[1, 2, 3], [[1], [2], [3]]])
def test_a_column_that_holds_no_images_is_named(tmp_path: Path, values: list) -> None:
    table = {"image": values, "photo": [plain(i) for i in range(3)]}
    for split in ("train", "test"):
        pq.write_table(pa.table(table), tmp_path / f"{split}.parquet")
    with pytest.raises(UserError, match=r"'image' holds .*int64.*, not bytes or paths: set image_column") as error:
        HFImages(tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="'image' holds"):
        HFImages(tmp_path, image_column="image")
    assert len(HFImages(tmp_path, image_column="photo")) == 3


def test_hugging_face_features_are_understood(tmp_path: Path) -> None:
    features = datasets.Features({"img": datasets.Image(), "y": datasets.ClassLabel(names=["no", "yes"])})
    rows = {"img": [Image.new("RGB", (5, 5), (i, 0, 0)) for i in range(4)], "y": [0, 1, 1, 0]}
    for split in ("train", "validation"):
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{split}.parquet")
    images = HFImages(tmp_path, split="test")
    assert images.classes == ["no", "yes"]
    samples = images.read([2])
    assert samples.targets.tolist() == [1] and int(samples.data[0][0, 0, 0]) == 2


@pytest.mark.faults("C11", "unreadable images: listed, the same stand-in every time")
@pytest.mark.parametrize("in_memory", [True, False])
def test_unreadable_images_are_replaced_counted_and_reported(tmp_path: Path, in_memory: bool) -> None:
    kinds = list(BROKEN.values())
    names = [f"{i:03}.png" for i in range(120)]
    folder(tmp_path / "set", names, lambda i: kinds[i // 30]() if i % 30 == 7 else plain(i))
    report = tmp_path / "run" / "bad_samples.jsonl"
    reads = []
    for _ in range(2):
        images = HFImages(tmp_path / "set", in_memory=in_memory, bad_samples=report)
        everything = images.read(range(len(images)))
        bad = [row for row in range(len(images)) if everything.rows[row] != row]
        assert len(bad) == len(images.bad) >= 2
        for row in bad:
            image, instead = everything.data[row], everything.data[int(everything.rows[row])]
            assert torch.equal(image, instead)
        assert images.read(bad).rows.tolist() == everything.rows[bad].tolist()  # the same stand-in every time
        reads.append(everything.rows.tolist())
    assert reads[0] == reads[1]
    lines = [json.loads(x) for x in report.read_text().splitlines()]
    assert len(lines) == len(bad) and all(x["reason"] and x["image"].endswith(".png") for x in lines)


def test_two_workers_list_unreadable_images_in_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path / "set", [f"{i:03}.png" for i in range(20)], lambda i: b"" if i == 3 else plain(i))
    report, read_text = tmp_path / "bad.jsonl", Path.read_text
    report.write_text("{}\n")

    def read(path: Path, *args: str, **options: str) -> str:
        found = read_text(path, *args, **options)
        with report.open("a") as file:
            file.write("the other worker\n")
        return found

    images = HFImages(tmp_path / "set", split="train", in_memory=False, bad_samples=report)
    monkeypatch.setattr(Path, "read_text", read)
    images.read(range(len(images)))
    lines = report.read_bytes().splitlines()
    assert lines[:2] == [b"{}", b"the other worker"] and b"003.png" in lines[2] and len(lines) == 3


@pytest.mark.faults("C11", "a third unreadable: the run ends")
@pytest.mark.parametrize("in_memory", [True, False])
def test_too_many_unreadable_images_end_the_run(tmp_path: Path, in_memory: bool) -> None:
    folder(tmp_path, [f"{i:03}.png" for i in range(100)], lambda i: b"" if i % 3 == 0 else plain(i))
    with pytest.raises(UserError, match=r"unreadable, such as .*\.png \(it is empty"):
        HFImages(tmp_path, in_memory=in_memory).read(range(80))


@pytest.mark.parametrize("in_memory", [True, "auto", False])
def test_a_set_without_one_readable_image(tmp_path: Path, in_memory: bool) -> None:
    folder(tmp_path, ["a.jpg", "b.jpg", "c.jpg"], lambda i: b"no image")
    with pytest.raises(UserError, match="unreadable"):
        HFImages(tmp_path, split="train", in_memory=in_memory).read([0, 1])


def test_empty_places_say_what_they_hold(tmp_path: Path) -> None:
    (tmp_path / "pictures" / "cat").mkdir(parents=True)
    with pytest.raises(UserError, match=r"no images in .*pictures .*it holds cat"):
        HFImages(tmp_path / "pictures")
    write(tmp_path / "none" / "train.parquet", 0)
    with pytest.raises(UserError, match="no rows"):
        HFImages(tmp_path / "none")
    (tmp_path / "fake.parquet").write_text("no parquet")
    with pytest.raises(UserError, match=r"fake\.parquet is no readable parquet"):
        HFImages(tmp_path / "fake.parquet")
    (tmp_path / "images.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match="unpack"):
        HFImages(tmp_path / "images.zip")


def test_classes_beside_what_is_held_out_are_to_stand_in_train(tmp_path: Path) -> None:
    held_out = [f"test/{kind}/{i}.png" for kind in ("cat", "dog") for i in range(3)]
    root = folder(tmp_path / "photos", [*held_out, "cat/0.png", "dog/0.png"])
    with pytest.raises(UserError, match=r"photos has test but no train, and cat, dog beside it: move"):
        HFImages(root)
    alone = folder(tmp_path / "alone", held_out)
    assert sum(len(HFImages(alone, split=split)) for split in ("train", "test")) == 6


def test_a_missing_path_names_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "cifar10").mkdir()
    with pytest.raises(UserError, match=r"no file or folder .*cifar1O.* did you mean cifar10\?"):
        HFImages(tmp_path / "cifar1O")
    with pytest.raises(UserError, match="there is cifar10"):
        HFImages(tmp_path / "flowers" / "train")
