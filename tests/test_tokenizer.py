"""Tokenizers: what they learn, how they are saved, and what they say when they cannot."""

import json
import os
import subprocess
import sys

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers
from transformers import AutoTokenizer

from ssl_lab.cli.main import main
from ssl_lab.data import tokenizer as module
from ssl_lab.data.tokenizer import Tokenizer, as_tokenizer, character, load, trained
from ssl_lab.data.tokenizer_train import train
from ssl_lab.errors import UserError

TEXT = (
    "The cat sat on the mat. The dog didn't sit; it's 1234567 o'clock!\n\n  Some lines,\ttabs and na\u00efvet\u00e9.\n"
    "Whatever the weather, the weathered feather-weight feathers her nest. 2024 comes after 2023 and 1999.\n"
)
KINDS = ("character", "bpe", "bpe4", "wordpiece")
SIZE = {"character": 0, "bpe": 300, "bpe4": 300, "wordpiece": 120}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text(TEXT * 20)
    return str(path)


def made(corpus, kind, **options):
    return trained(corpus, kind, SIZE[kind], **options)


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_undoes_encoding(corpus, kind):
    tokenizer = made(corpus, kind)
    text = "The cat sat." if kind == "wordpiece" else "The cat didn't,\n\n  it's 1999."
    assert tokenizer.decode(tokenizer.encode(text)) == (text.lower() if kind == "wordpiece" else text)
    assert tokenizer.encode_batch([text, "The"]) == [tokenizer.encode(text), tokenizer.encode("The")]
    assert max(tokenizer.encode(TEXT)) < tokenizer.vocab_size
    assert tokenizer.decode(torch.tensor(tokenizer.encode(text))) == tokenizer.decode(tokenizer.encode(text))


def test_bytes_alone_are_no_alphabet_and_hashes_no_wordpiece():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    for merges in ([], [("#", "#")]):
        names = [*letters, *("".join(pair) for pair in merges)]
        backend = tokenizers.Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges))
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        tokenizer = Tokenizer(backend)
        ids = tokenizer.encode("\u4f60 a## b")
        assert tokenizer.decode(ids) == "\u4f60 a## b"
        assert tokenizer.starts[backend.token_to_id("\u0120")] and not tokenizer.starts[backend.token_to_id("b")]


@pytest.mark.parametrize("kind", ["bpe", "bpe4"])
def test_bytes_hold_any_text(corpus, kind):
    text = "\u4f60\u597d \U0001f600 \x00 \u00e9t\u00e9"
    tokenizer = made(corpus, kind)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("kind", KINDS)
def test_half_of_a_surrogate_pair_is_a_question_mark(kind):
    tokenizer = Tokenizer(train(["what \ud83d is it? it is"] * 4, kind, SIZE[kind]))
    assert tokenizer.encode("it \ud83d is") == tokenizer.encode("it ? is")
    assert tokenizer.encode_spans(["\ud83d it"]) == tokenizer.encode_spans(["? it"])


def test_a_character_is_a_token_in_sorted_order(corpus):
    tokenizer = character(corpus)
    alphabet = sorted(set(TEXT))
    assert tokenizer.vocab_size == len(alphabet)
    assert tokenizer.encode(TEXT) == [alphabet.index(x) for x in TEXT]
    with pytest.raises(UserError, match="no token for '\u0142 \u4f60'"):
        tokenizer.encode("The \u4f60\u0142")
    known = made(corpus, "character", special=["<unk>"])
    assert known.encode("\u4f60T")[0] == known.unk == 0


def test_patterns_of_gpt2_and_gpt4():
    texts = ["1234567 " * 200, "word, word.\n\n" * 50, "It'S it's " * 50]
    two, four = (train(texts, kind, 400) for kind in ("bpe", "bpe4"))
    longest = {
        kind: max(sum(x.isdigit() for x in name) for name in t.get_vocab()) for kind, t in (("2", two), ("4", four))
    }
    assert longest == {"2": 7, "4": 3}
    assert [piece for piece, _ in four.pre_tokenizer.pre_tokenize_str("It'S 1234 a.\n\n b")] == [
        "It", "'S", "\u0120", "123", "4", "\u0120a", ".\u010a\u010a", "\u0120b",
    ]  # fmt: skip
    assert [piece for piece, _ in two.pre_tokenizer.pre_tokenize_str("It'S 1234 a.\n\n b")] == [
        "It", "'", "S", "\u01201234", "\u0120a", ".", "\u010a\u010a", "\u0120b",
    ]  # fmt: skip


def test_ids_special_tokens_first_and_sentinels_last(corpus):
    tokenizer = made(corpus, "bpe", special=["<pad>"], sentinels=5)
    assert (tokenizer.pad, tokenizer.eos, tokenizer.vocab_size) == (0, 1, 300)
    assert tokenizer.sentinels == [299, 298, 297, 296, 295]
    assert tokenizer.special == [0, 1, 295, 296, 297, 298, 299]
    assert tokenizer.encode("a<extra_id_0>b<|endoftext|>")[1::2] == [299, 1]
    assert made(corpus, "bpe").sentinels == []
    bert = made(corpus, "wordpiece")
    assert (bert.pad, bert.unk, bert.cls, bert.sep, bert.mask) == (0, 1, 2, 3, 4)
    assert (bert.bos, bert.eos) == (None, None)
    assert bert.encode("the cat", special=True) == [2, *bert.encode("the cat"), 3]
    with pytest.raises(UserError, match="needs a tokenizer with a mask token"):
        tokenizer.require("eos", "mask")


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_opens_what_is_saved(corpus, kind, tmp_path):
    tokenizer = made(corpus, kind, special=["<pad>"] if kind == "bpe" else [])
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("The cat didn't sit, 1999!", TEXT):
        assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text)
        assert theirs.encode(text) == tokenizer.encode(text, special=True)
        assert theirs.decode(theirs.encode(text), skip_special_tokens=True) == tokenizer.decode(tokenizer.encode(text))
    for role in ("pad", "bos", "eos", "unk", "mask", "cls", "sep"):
        assert getattr(theirs, f"{role}_token_id") == getattr(tokenizer, role), role
    assert len(theirs) == tokenizer.vocab_size
    theirs.save_pretrained(tmp_path / "theirs")
    for path in (tmp_path, tmp_path / "tokenizer.json", tmp_path / "theirs"):
        again = load(path)
        assert again.encode(TEXT) == tokenizer.encode(TEXT) and again.special == tokenizer.special
        assert (again.pad, again.eos, again.mask) == (tokenizer.pad, tokenizer.eos, tokenizer.mask)
    assert as_tokenizer(str(tmp_path)) is load(tmp_path)
    assert as_tokenizer(tokenizer) is tokenizer


def test_what_a_configuration_holds_survives(corpus, tmp_path):
    made(corpus, "bpe").save(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    config = json.loads(file.read_text()) | {"chat_template": "{{ x }}", "pad_token": {"content": "<|endoftext|>"}}
    file.write_text(json.dumps(config))
    tokenizer = load(tmp_path)
    assert tokenizer.pad == tokenizer.eos == 0
    tokenizer.save(tmp_path / "again")
    assert json.loads((tmp_path / "again/tokenizer_config.json").read_text()) == config
    file.unlink()
    assert (load(tmp_path).pad, load(tmp_path).eos) == (None, 0)  # by the usual name


def test_training_is_the_same_in_every_process():
    code = (
        "from ssl_lab.data.tokenizer_train import train; import hashlib, sys\n"
        "texts = [' '.join(f'{a}{b}{a}' for a in 'abcdefghij' for b in 'klmnopqrst')]\n"  # ties wherever one looks
        "for kind in ('character', 'bpe', 'bpe4', 'wordpiece'):\n"
        "    print(hashlib.md5(train(texts, kind, 330 if 'bpe' in kind else 120).to_str().encode()).hexdigest())"
    )
    runs = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout for _ in "123"
    }
    assert len(runs) == 1 and len(runs.pop().split()) == 4


def test_a_word_begins_and_a_sentence_ends(corpus):
    for kind in KINDS:
        tokenizer = made(corpus, kind)
        ids = tokenizer.encode("the weathered feather. the nest")
        words: list[list[int]] = []
        for i, starts in zip(ids, tokenizer.starts[ids].tolist(), strict=True):
            words = [*words, [i]] if starts or not words else [*words[:-1], [*words[-1], i]]
        assert [tokenizer.decode(word).strip() for word in words] == ["the", "weathered", "feather", ".", "the", "nest"]
        assert tokenizer.ends[ids].sum() == 1
        assert tokenizer.starts[tokenizer.special].all()


def test_workers_may_be_forked_after_threads_were_used(corpus, capfd):
    tokenizer = made(corpus, "bpe")
    tokenizer.encode_batch([TEXT] * 50)
    pid = os.fork()
    if pid == 0:
        os._exit(0 if tokenizer.encode_batch([TEXT] * 50)[0] else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert "fork" not in capfd.readouterr().err


def test_trained_once(corpus, monkeypatch):
    first = made(corpus, "bpe", special=["<pad>"])
    monkeypatch.setattr(module, "train", lambda *_, **__: pytest.fail("trained again"))
    assert made(corpus, "bpe", special=["<pad>"]) is first


def test_errors_are_one_line(corpus, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/tokenizer.json").write_text('{"version": "1.0"')
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/vocab.txt").write_text("a")
    made(corpus, "bpe").save(tmp_path / "config")
    (tmp_path / "config/tokenizer_config.json").write_text("{")
    cases = {
        "there is no text": lambda: trained(str(tmp_path / "empty.txt"), "bpe", 300),
        "smaller than the alphabet": lambda: trained(corpus, "bpe", 200),
        "set it to ": lambda: trained(corpus, "wordpiece", 20),
        "kind=bpx": lambda: trained(corpus, "bpx"),
        "did you mean": lambda: load(tmp_path / "brokn"),
        "is no tokenizer.json of the tokenizers library": lambda: load(tmp_path / "broken"),
        r"no tokenizer.json in .*holds vocab.txt": lambda: load(tmp_path / "bare"),
        "tokenizer_config.json is no JSON": lambda: load(tmp_path / "config"),
    }
    for pattern, call in cases.items():
        with pytest.raises(UserError, match=pattern) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_verb(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "160")
    words = [
        "tokenizer",
        "data.path=captions",
        "data.column=[sentence,noun_first]",
        f"out={tmp_path}",
        "kind=wordpiece",
    ]
    assert main([*words, "vocab_size=150"]) == 0
    shown = capsys.readouterr().out
    lines = {tuple(line.split()[:2]): line.split()[2:] for line in shown.splitlines() if len(line.split()) == 7}
    assert set(lines) == {(c, s) for c in ("sentence", "noun_first") for s in ("train", "test")}
    documents, size, tokens, share, unknown = lines["sentence", "test"]
    assert documents == "500" and unknown == "0.00%"
    assert float(share) == pytest.approx(int(size.replace(",", "")) / int(tokens.replace(",", "")), abs=0.005)
    assert isinstance(load(tmp_path), Tokenizer)
    assert main([*words, "vocab_size=150"]) == 0
    assert main([*words, "vocab_size=140"]) == 2
    assert "holds another tokenizer" in capsys.readouterr().err
    assert load(tmp_path).vocab_size == 150
    monkeypatch.setattr("ssl_lab.cli.tokenizer.trained", None)  # not even begun
    assert main([*[word for word in words if "out=" not in word], f"out={tmp_path / 'tokenizer.json'}"]) == 2
    assert "give a folder that can be written to" in capsys.readouterr().err


def test_a_word_is_a_token(corpus, tmp_path):
    tokenizer = trained(corpus, "word", special=["<pad>"])
    words = sorted(set(TEXT.split()))
    assert tokenizer.vocab_size == len(words) + 1 and tokenizer.pad == 0 and tokenizer.of_words
    text = "feathers her nest. The cat"
    assert tokenizer.encode(text) == [1 + words.index(word) for word in text.split()]
    assert tokenizer.decode([0, *tokenizer.encode(text), 0]) == text and tokenizer.starts.all()
    with pytest.raises(UserError, match="the word tokenizer has no token for 'bird'"):
        tokenizer.encode("The bird")
    known = trained(corpus, "word", special=["<unk>"])
    assert known.encode("The bird") == [known.encode("The")[0], known.unk]
    tokenizer.save(tmp_path)
    assert load(tmp_path).encode(text) == tokenizer.encode(text)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(text)["input_ids"] == tokenizer.encode(text)
