"""Sources of text: what a row holds, which split it belongs to, and what is said when there is none."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from ssl_lab.cli import catalog
from ssl_lab.cli.compose import build, compose
from ssl_lab.data import text, text_captions
from ssl_lab.data.text import Blocks
from ssl_lab.data.text_files import documents
from ssl_lab.data.text_passages import NextSentences
from ssl_lab.data.text_questions import Questions
from ssl_lab.data.text_rows import Sentences, Translations
from ssl_lab.data.tokenizer import Tokenizer, trained
from ssl_lab.data.tokenizer_train import train
from ssl_lab.errors import UserError

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]


def write(path, columns, metadata=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    pq.write_table(table.replace_schema_metadata(metadata) if metadata else table, path)
    return str(path)


def prose(count, seed=0):
    """Sentences with uneven blanks and line ends."""
    rng = np.random.default_rng(seed)
    ends = [" ", "  ", "\n", "\n\n", ", ", ".\n\n", "  \n ", " 12345 "]
    return "".join(WORDS[rng.integers(10)] + ends[rng.integers(8)] for _ in range(count))


def characters(*texts, special=()):
    return Tokenizer(train(list(texts), "character", 0, special))


# Corpora


def test_rows_of_a_file(tmp_path):
    corpus = prose(300)
    file = tmp_path / "input.txt"
    file.write_text(corpus)
    tokenizer = characters(corpus)
    cut = int(len(corpus) * 0.9)
    for split, part in (("train", corpus[:cut]), ("test", corpus[cut:]), ("val", corpus[cut:])):
        every = Blocks(str(file), tokenizer, split=split, length=16, stride=1)
        assert every.num_tokens == len(part) and len(every) == len(part) - 16
        rows = [0, 5, len(every) - 1, 5]
        samples = every.read(rows)
        tokens, segments = samples.data
        assert [tokenizer.decode(row) for row in tokens] == [part[row : row + 17] for row in rows]
        assert tokens.dtype == segments.dtype == torch.int64 and not segments.any()
        assert samples.rows.tolist() == rows and samples.targets.tolist() == [-1] * 4
        once = Blocks(str(file), tokenizer, split=split, length=16)
        assert len(once) == (len(part) - 1) // 16
        inputs = once.read(range(len(once))).data[0][:, :-1]
        assert tokenizer.decode(inputs.flatten()) == part[: 16 * len(once)]
    assert every.tokenizer is tokenizer and every.unit == "sequences" and every.classes == []


def test_documents_are_closed_and_numbered(tmp_path):
    path = write(tmp_path / "train.parquet", {"text": ["abc", "", None, "de", "f"], "other": [1, 2, 3, 4, 5]})
    tokenizer = characters("abcdef", special=["<eos>"])
    blocks = Blocks(path, tokenizer, split=None, length=5, stride=1)
    tokens, segments = blocks.read(range(len(blocks))).data
    assert tokenizer.decode(torch.cat([tokens[:, 0], tokens[-1, 1:]]), special=True) == "abc<eos>de<eos>f<eos>"
    assert segments.tolist() == [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 2], [0, 1, 1, 1, 2, 2]]
    bare = Blocks(path, characters("abcdef"), split=None, length=5)
    assert bare.read([0]).data[1].tolist() == [[0, 0, 0, 1, 1, 2]]
    bert = Tokenizer(train(["abc de f"], "wordpiece", 40))
    assert int(Blocks(path, bert, split=None, length=3, stride=1).read([0]).data[0][0, 1]) == bert.sep


@pytest.mark.parametrize("kind", ["character", "bpe", "bpe4", "wordpiece", "metaspace"])
def test_long_texts_in_pieces_have_the_tokens_of_the_whole(kind, monkeypatch):
    corpus = prose(2000, seed=1)
    if kind == "metaspace":  # puts a blank before every text: no cut suits it
        backend = Backend(models.BPE())
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        backend.train_from_iterator([corpus], trainers.BpeTrainer(vocab_size=200, show_progress=False))
    else:
        backend = train([corpus], kind, 330 if "bpe" in kind else 80)
    tokenizer = Tokenizer(backend)
    monkeypatch.setattr(text, "_PIECE", 500)
    pieces = list(text._pieces([corpus, "", "beta"], tokenizer))
    assert "".join(piece for piece, _ in pieces) == corpus + "beta"
    assert [begins for _, begins in pieces].count(True) == 2
    assert len(pieces) > 20 or kind == "metaspace"
    tokens, first = text.stream([corpus, "", "beta"], tokenizer, None)
    assert tokens.tolist() == tokenizer.encode(corpus) + tokenizer.encode("beta")
    assert first.tolist() == [0, len(tokenizer.encode(corpus))] and tokens.dtype == np.uint16


def test_where_documents_come_from(tmp_path):
    (tmp_path / "a/train").mkdir(parents=True)
    (tmp_path / "a/test").mkdir()
    (tmp_path / "a/train/1.txt").write_text("one")
    (tmp_path / "a/train/2.txt").write_text("two")
    (tmp_path / "a/test/1.txt").write_text("three")
    (tmp_path / "b").mkdir()
    for split in ("train", "valid", "test"):
        (tmp_path / f"b/wiki.{split}.txt").write_text(split)
    (tmp_path / "c.jsonl").write_text('{"content": "x\u2028y", "n": 1}\n\n{"n": 2}\n')
    write(tmp_path / "d/data/train-00000.parquet", {"text": ["p"]})
    write(tmp_path / "d/data/train-00001.parquet", {"text": ["q"]})
    write(tmp_path / "d/data/validation-00000.parquet", {"text": ["r"]})
    (tmp_path / "d/README.txt").write_text("no data")
    write(tmp_path / "e/train.parquet", {"en": ["a", "b"], "de": ["c", "d"]})
    write(tmp_path / "e/dev.parquet", {"en": ["e"], "de": ["f"]})
    cases = [
        ("a", "train", None, ["one", "two"]),
        ("a", "val", None, ["three"]),
        ("a", None, None, ["three", "one", "two"]),
        ("b", "train", None, ["train"]),
        ("b", "validation", None, ["test"]),
        ("b", "valid", None, ["valid"]),
        ("c.jsonl", None, None, ["x\u2028y", ""]),
        ("d", "train", None, ["p", "q"]),
        ("d", "test", None, ["r"]),
        ("e", "train", ["en", "de"], ["a", "b", "c", "d"]),
        ("e", "dev", "de", ["f"]),
    ]
    for name, split, column, wanted in cases:
        assert list(documents(str(tmp_path / name), split, column)) == wanted, (name, split)


def test_a_byte_order_mark_is_no_text(tmp_path):
    for name, content in (("a.txt", "one"), ("b.jsonl", '{"text": "one"}\n')):
        (tmp_path / name).write_text(content, encoding="utf-8-sig")
        assert list(documents(str(tmp_path / name))) == ["one"]


def test_a_tenth_is_held_out_for_good(tmp_path):
    texts = [f"text {i}" for i in range(300)]
    path = write(tmp_path / "all.parquet", {"text": texts})
    parts = {split: list(documents(path, split)) for split in ("train", "test")}
    assert sorted(parts["train"] + parts["test"]) == sorted(texts)
    assert 15 < len(parts["test"]) < 50
    longer = write(tmp_path / "more.parquet", {"text": [*texts, "another"]})
    assert set(parts["test"]) <= set(documents(longer, "test"))
    folder = tmp_path / "files"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i}.txt").write_text(str(i))
    held_out = set(documents(str(folder), "test"))
    assert held_out and held_out.isdisjoint(documents(str(folder), "train"))


def test_passages_stay_within_documents(tmp_path):
    texts = ["a" * 25, "b" * 9, "c", "d" * 10]
    path = write(tmp_path / "train.parquet", {"text": texts})
    passages = NextSentences(path, characters("abcd"), split=None, length=13)
    a, other = passages.read(range(len(passages))).data
    found = [passages.tokenizer.decode(x.tolist()) for x in a]
    assert found == ["a" * 10, "a" * 10, "a" * 5, "b" * 9, "d" * 10]
    for mine, theirs in zip(found, other, strict=True):
        assert passages.tokenizer.decode(theirs.tolist())[0] != mine[0]
    (tmp_path / "one.txt").write_text("abcdefghij" * 20)
    single = NextSentences(str(tmp_path / "one.txt"), characters("abcdefghij"), split="train", length=10)
    everywhere = [x.tobytes() for x in single.read(range(len(single))).data[0]]
    assert len(everywhere) == -(-180 // 7)
    assert all(single._other(row) not in (row, row + 1) for row in range(len(single) - 2))


# Rows


def test_sentences_and_their_classes(tmp_path):
    tokenizer = characters("abcdef gh")
    named = {"sentence": ["ab", "c", "d"], "label": pa.array([1, 0, None], pa.int8())}
    write(tmp_path / "sst/train.parquet", named, {"classes": '["bad", "good"]'})
    write(tmp_path / "sst/dev.parquet", {"sentence": ["ef"], "label": [0]}, {"classes": '["bad", "good"]'})
    sentences = Sentences(str(tmp_path / "sst"), tokenizer)
    assert sentences.classes == ["bad", "good"] and len(sentences) == 3
    samples = sentences.read([2, 0])
    assert [tokenizer.decode(x.tolist()) for x in samples.data[0]] == ["d", "ab"] and len(samples.data) == 1
    assert samples.targets.tolist() == [-1, 1] and samples.rows.tolist() == [2, 0]
    assert len(Sentences(str(tmp_path / "sst"), tokenizer, split="dev")) == 1

    features = {"label": {"_type": "ClassLabel", "names": ["no", "yes"]}, "sentence1": {"dtype": "string"}}
    pairs = {"sentence1": ["a", "b"], "sentence2": ["c", "d"], "label": [0, 1]}
    write(tmp_path / "mrpc/train.parquet", pairs, {"huggingface": json.dumps({"info": {"features": features}})})
    found = Sentences(str(tmp_path / "mrpc/train.parquet"), tokenizer, split=None)
    assert found.classes == ["no", "yes"]
    assert [[tokenizer.decode(x.tolist()) for x in side] for side in found.read([1]).data] == [["b"], ["d"]]

    write(tmp_path / "words/train.parquet", {"text": ["a", "b"], "class": ["x", "z"]})
    write(tmp_path / "words/test.parquet", {"text": ["a", "b"], "class": ["z", "y"]})
    for split, targets in (("train", [0, 2]), ("test", [2, 1])):
        words = Sentences(str(tmp_path / "words"), tokenizer, split=split)
        assert words.classes == ["x", "y", "z"] and words.targets.tolist() == targets
    plain = Sentences(write(tmp_path / "bare/train.parquet", {"text": ["a", "b"]}), tokenizer, split=None)
    assert plain.classes == [] and plain.targets.tolist() == [-1, -1]
    other = Sentences(str(tmp_path / "mrpc/train.parquet"), tokenizer, split=None, columns=["sentence2"])
    assert len(other.read([0]).data) == 1


def test_labels_that_a_split_or_some_rows_lack(tmp_path):
    tokenizer = characters("abcd")
    write(tmp_path / "a/train.parquet", {"text": ["a", "b", "c"], "label": [1, None, 0]})
    write(tmp_path / "a/test.parquet", {"text": ["d"]})
    train_split = Sentences(str(tmp_path / "a"), tokenizer)
    assert train_split.classes == ["0", "1"] and train_split.targets.tolist() == [1, -1, 0]
    for column in (None, "label"):
        assert Sentences(str(tmp_path / "a"), tokenizer, split="test", label_column=column).targets.tolist() == [-1]
    write(tmp_path / "b/train.parquet", {"text": ["a", "b"], "label": [0, 1]})
    write(tmp_path / "b/test.parquet", {"text": ["d"], "label": pa.array([None], pa.int64())})
    unlabelled = Sentences(str(tmp_path / "b"), tokenizer, split="test")
    assert unlabelled.classes == ["0", "1"] and unlabelled.targets.tolist() == [-1]


def test_true_and_false_are_classes(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"text": "a", "label": x}) + "\n" for x in (True, False, None)))
    found = Sentences(str(path), characters("ab"), split=None)
    assert found.targets.dtype == torch.int64 and found.targets.tolist() == [1, 0, -1] and found.classes == ["0", "1"]


def test_texts_beside_those_that_are_held_out_by_name_are_what_to_train_on(tmp_path):
    for name, letter in (("mine.txt", "a"), ("more.txt", "b"), ("test.txt", "c")):
        (tmp_path / name).write_text(letter * 50)
    assert [set(x) for x in documents(str(tmp_path), "train")] == [{"a"}, {"b"}]
    assert [set(x) for x in documents(str(tmp_path), "test")] == [{"c"}]


def test_names_of_classes_belong_to_their_column(tmp_path):
    kinds = {"kind": ["x", "y", "z"], "label": ["no", "yes"]}
    features = {name: {"_type": "ClassLabel", "names": names} for name, names in kinds.items()}
    columns = {"text": ["a", "b"], "kind": [2, 0], "label": [1, 0]}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    path = write(tmp_path / "train.parquet", columns, metadata)
    for column, names in kinds.items():
        found = Sentences(path, characters("ab"), split=None, label_column=column)
        assert found.classes == names and found.targets.tolist() == columns[column]


def test_translations_are_aligned(tmp_path):
    path = write(tmp_path / "train.parquet", {"en": ["a", "bc", "", "d"], "de": ["aa", None, "x", "dd"]})
    pairs = Translations(path, characters("abcdx"), source="en", target="de", split=None)
    assert len(pairs) == 2 and pairs.references == ["aa", "dd"]
    source, target = pairs.read([1, 0]).data
    assert [pairs.tokenizer.decode(x.tolist()) for x in (*source, *target)] == ["d", "a", "dd", "aa"]


def test_captions_are_made_up_the_same_way_every_time():
    table = text_captions.table("train")
    text_captions.table.cache_clear()
    assert text_captions.table("train") == table
    assert table["sentence"][0] in table["text"][0] and table["text"][:50] != text_captions.table("test")["text"][:50]
    for context, answer, start, shape in list(zip(*(table[k] for k in ("context", "answer", "answer_start", "label"))))[
        :200
    ]:
        assert context[start : start + len(answer)] == answer
        assert f" {shape}" in context
    example = table["sentence"].index("there is a big red circle in the picture")
    assert table["noun_first"][example] == "there is circle red big in the picture"
    lengths = {len(a.split()) - len(b.split()) for a, b in zip(table["sentence"], table["noun_first"], strict=True)}
    assert lengths <= {1, 2, 3, 4}  # one article for each noun is gone


@pytest.mark.parametrize(
    ("data", "views", "keys"),
    [
        ("captions", "next_token", {"tokens", "labels", "segments"}),
        ("captions_classes", "sentences", {"tokens", "types", "valid"}),
        ("captions_questions", "questions", {"tokens", "types", "valid", "span"}),
        ("captions_translation", "translation", {"tokens", "valid", "labels"}),
        ("passages", "mask_pairs", {"tokens", "types", "valid", "labels"}),
    ],
)
def test_offline_sets_of_the_command_line(data, views, keys):
    words = ["method=causal_lm", f"data={data}", f"views@data.views={views}", "method.decoder.max_length=64"]
    node = compose("train", [*words, "data.batch_size=4", "data.num_workers=2"], [catalog.conf_folder()]).data
    made = build(node)
    assert made.train.tokenizer is made.test.tokenizer is made.tokenizer
    batch, again = next(iter(made.train_dataloader())), next(iter(build({**node, "num_workers": 0}).train_dataloader()))
    assert set(batch) == keys | {"target", "index", "position"}
    assert all(torch.equal(batch[key], again[key]) for key in batch)
    judged = next(iter(made.eval_loader("test", limit=4)))
    assert set(judged) == keys | {"target", "index"} and len(judged["tokens"]) == 4


def test_errors_name_the_thing_and_what_to_do(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("short")
    (tmp_path / "latin.txt").write_bytes(b"\xe9")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\nb\n')
    (tmp_path / "none").mkdir()
    (tmp_path / "empty.txt").write_text("")
    table = write(tmp_path / "t/train.parquet", {"en": ["a", "b"], "n": [1, 2], "zeros": [0, 0], "label": [0.5, 1.5]})
    tokenizer = characters("abcdefghijklmnopqrstuvwxyz")
    cases = {
        "fewer than one row of length . 1 = 17": lambda: Blocks(str(file), tokenizer, length=16),
        "length is 0": lambda: Blocks(str(file), tokenizer, length=0),
        "did you mean text.txt": lambda: Blocks(str(tmp_path / "txt.txt"), tokenizer),
        "no UTF-8 text": lambda: Blocks(str(tmp_path / "latin.txt"), tokenizer),
        "no readable parquet": lambda: Blocks(str(tmp_path / "broken.parquet"), tokenizer),
        "bad.jsonl line 2": lambda: Blocks(str(tmp_path / "bad.jsonl"), tokenizer),
        "no texts in": lambda: Blocks(str(tmp_path / "none"), tokenizer),
        "set column to one of en, n": lambda: Blocks(table, tokenizer),
        "no column 'fr': it has en": lambda: Translations(table, tokenizer, source="en", target="fr", split=None),
        "set columns to one or two": lambda: Sentences(table, tokenizer, split=None),
        "neither texts nor whole": lambda: Sentences(table, tokenizer, split=None, columns=["en"]),
        "holds int values": lambda: Sentences(table, tokenizer, split=None, columns=["n"], label_column="en"),
        "zeros holds int values": lambda: Sentences(table, tokenizer, split=None, columns=["zeros"]),
        "is no table": lambda: Sentences(str(file), tokenizer),
        "holds 0 passages": lambda: NextSentences(str(tmp_path / "empty.txt"), tokenizer),
        "no split 'tets'": lambda: Blocks(str(file), tokenizer, split="tets"),
        "leaves no room": lambda: Questions("captions", tokenizer, max_length=64),
        "no tokenizer": lambda: Blocks(str(file), str(tmp_path / "tok.json")),
    }
    for pattern, call in cases.items():
        with pytest.raises(UserError, match=pattern) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_a_tokenizer_may_be_given_by_its_path(tmp_path):
    trained("captions", "bpe", 300).save(tmp_path)
    words = ["method=causal_lm", "data=captions", f"data.tokenizer={tmp_path}"]
    made = build(compose("train", words, [catalog.conf_folder()]).data)
    assert made.tokenizer.vocab_size == 300 and made.train.tokenizer is made.test.tokenizer
