"""Data sets of the Hugging Face hub, which parquet files stand in for: splits, slices, configurations, classes."""

from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from ssl_lab.data.hub import from_hub, on_hub
from ssl_lab.data.images import HFImages
from ssl_lab.data.text_files import documents
from ssl_lab.data.text_rows import Sentences
from ssl_lab.data.tokenizer import Tokenizer
from ssl_lab.errors import UserError

Hub = Callable[..., list[tuple[str, str | None, str | None]]]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """Splits given as columns become what `datasets` finds under any name; what was asked for is written down."""
    real, asked = datasets.load_dataset, list[tuple[str, str | None, str | None]]()

    def offer(features: datasets.Features | None = None, **splits: dict[str, list[object]]) -> list:
        files = {split: str(tmp_path / f"{split}.parquet") for split in splits}
        for split, columns in splits.items():
            datasets.Dataset.from_dict(columns, features=features).to_parquet(files[split])

        def load(path: str, name: str | None = None, *, split: str | None = None) -> object:
            asked.append((path, name, split))
            return real("parquet", data_files=files, split=split, cache_dir=str(tmp_path / "cache"))

        monkeypatch.setattr(datasets, "load_dataset", load)
        return asked

    return offer


def pictures(count: int) -> list[Image.Image]:
    return [Image.new("RGB", (5, 5), (i, i, i)) for i in range(count)]


def test_a_name_is_told_from_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    assert on_hub("someone/flowers") and on_hub("someone/flowers-v1.5:large")
    for path in ("flowers", "photos/cats", "someone/flowers.parquet", "a/b/c", "/someone/flowers"):
        assert not on_hub(path), path


def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise ConnectionError("the network is away\nand more")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    for read in (HFImages, lambda path: list(documents(path))):
        with pytest.raises(UserError, match=r"'someone/flowers' is no local file .*: the network is away \(without"):
            read("someone/flowers")


def test_rows_are_read_like_any_other(hub: Hub) -> None:
    features = datasets.Features({"img": datasets.Image(), "fine": datasets.ClassLabel(names=["a", "b"])})
    asked = hub(features, train={"img": pictures(3), "fine": [1, 0, 1]})
    found = HFImages("someone/flowers", label_column="fine")
    assert (found.classes, found.read([0, 1]).targets.tolist()) == (["a", "b"], [1, 0])
    assert asked == [("someone/flowers", None, "train")]


def test_a_split_may_be_a_slice(hub: Hub) -> None:
    hub(train={"image": pictures(10)}, features=datasets.Features({"image": datasets.Image()}))
    for split, numbers in (("train[:90%]", range(9)), ("train[90%:]", [9])):
        pixels = HFImages("someone/flowers", split=split).read(range(len(numbers))).data
        assert [int(x[0, 0, 0]) for x in pixels] == list(numbers)


def test_words_are_the_same_classes_in_every_split(hub: Hub) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    splits = {"train": ["ant", "bee", "cow"], "test": ["cow", "bee"]}
    asked = hub(features, **{name: {"image": pictures(len(x)), "label": x} for name, x in splits.items()})
    test = HFImages("someone/beasts:large", split="test")
    assert (test.classes, test.read([0, 1]).targets.tolist()) == (["ant", "bee", "cow"], [2, 1])
    assert asked == [("someone/beasts", "large", "test"), ("someone/beasts", "large", None)]


def test_sentences_and_documents_know_all_splits(hub: Hub) -> None:
    backend = Backend(models.WordLevel({"x": 0, "y": 1}, unk_token="x"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    hub(train={"text": ["x", "y"], "label": ["good", "bad"]}, test={"text": ["x y"], "label": ["ugly"]})
    test = Sentences("someone/reviews", Tokenizer(backend), split="test")
    assert (test.classes, test.targets.tolist()) == (["bad", "good", "ugly"], [2])
    assert list(documents("someone/reviews")) == ["x", "y", "x y"]
    assert list(documents("someone/reviews", "test")) == ["x y"]


def test_splits_that_do_not_fit_together_are_a_line(hub: Hub, tmp_path: Path) -> None:
    hub(train={"text": ["x"], "label": ["good"]}, test={"text": ["y"], "label": ["bad"]})
    pq.write_table(pa.table({"text": ["y"], "label": [[1.5]]}), tmp_path / "test.parquet")
    with pytest.raises(UserError, match=r"'someone/reviews' is no local file or folder, and .* does not give it"):
        from_hub("someone/reviews", None)
