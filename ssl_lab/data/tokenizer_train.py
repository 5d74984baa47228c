"""Training of tokenizers by the `tokenizers` library, with the settings of GPT-2, GPT-4 and BERT."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, get_args

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from ssl_lab.errors import UserError

Kind = Literal["character", "word", "bpe", "bpe4", "wordpiece"]
WHOLE = ("character", "word")  # kinds that take all there is: vocab_size does not matter to them
USUAL = {  # special tokens by role, and their usual names
    "pad": ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>"),
    "bos": ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>"),
    "eos": ("</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>"),
    "unk": ("<unk>", "[UNK]"),
    "mask": ("<mask>", "[MASK]"),
    "cls": ("[CLS]", "<cls>"),
    "sep": ("[SEP]", "<sep>"),
}
END = "<|endoftext|>"
BERT_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_ALPHABET = 1000  # characters at most of a WordPiece vocabulary; rarer ones are unknown
_GPT4_PATTERN = (  # cl100k_base: contractions, words with a mark before them, digits by three, marks, spaces
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train(
    texts: Iterable[str],
    kind: Kind,
    vocab_size: int,
    special: Sequence[str] = (),
    sentinels: int = 0,
    origin: str = "",
) -> Tokenizer:
    """A tokenizer for `texts`, which are read once or twice; the same texts give the same tokenizer.

    `special` are further special tokens, `origin` names the texts in messages.

    Special tokens come first, then the alphabet, then what was learned, then `sentinels` tokens from <extra_id_N> down
    to <extra_id_0>; `vocab_size` counts them all. Both BPEs have <|endoftext|>, after the special tokens; WordPiece
    has [PAD] [UNK] [CLS] [SEP] [MASK] and puts [CLS] and [SEP] around a sentence or a pair.

    Raises:
        UserError: no text, an unknown kind, or a vocabulary smaller than the alphabet.
    """
    if kind not in get_args(Kind):
        raise UserError(f"kind={kind}: a tokenizer is one of {', '.join(get_args(Kind))}")
    counted = _Counted(texts)
    backend = _MAKERS[kind](counted, vocab_size - sentinels, list(special))
    backend.add_special_tokens([f"<extra_id_{i}>" for i in reversed(range(sentinels))])
    if not counted.characters:
        raise UserError(f"there is no text in {origin or 'the corpus'}: a tokenizer cannot be trained on it")
    if kind not in WHOLE and (size := backend.get_vocab_size()) > vocab_size:
        raise UserError(
            f"vocab_size={vocab_size} is smaller than the alphabet with its special tokens: set it to {size} or more"
        )
    return backend


def _character(texts: "_Counted", vocab_size: int, special: list[str]) -> Tokenizer:
    alphabet = sorted(set().union(*texts))
    unk = next((name for name in special if name in ("<unk>", "[UNK]")), None)
    vocab = {name: i for i, name in enumerate([*special, *alphabet])}
    # BPE without merges leaves a text in characters, without the cost of a piece for each.
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=unk))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(special)
    return backend


def _word(texts: "_Counted", vocab_size: int, special: list[str]) -> Tokenizer:
    words = sorted({word for text in texts for word in text.split()})
    unk = next((name for name in special if name in USUAL["unk"]), None)
    vocab = {name: i for i, name in enumerate([*special, *words])}
    backend = Tokenizer(models.WordLevel(vocab=vocab, **({} if unk is None else {"unk_token": unk})))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(special)  # without a decoder, tokens are joined by blanks
    return backend


def _bpe(texts: "_Counted", vocab_size: int, special: list[str]) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return _byte_level(backend, texts, vocab_size, special)


def _bpe4(texts: "_Counted", vocab_size: int, special: list[str]) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(_GPT4_PATTERN), "isolated")
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, plain])
    return _byte_level(backend, texts, vocab_size, special)


def _byte_level(backend: Tokenizer, texts: "_Counted", vocab_size: int, special: list[str]) -> Tokenizer:
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(dict.fromkeys([*special, END])),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return backend


def _wordpiece(texts: "_Counted", vocab_size: int, special: list[str]) -> Tokenizer:
    """Trained with the characters that go on (##x) as given tokens: else the library numbers them in random order."""
    special = list(dict.fromkeys([*BERT_SPECIAL, *special]))
    draft = _bert(models.WordPiece(unk_token="[UNK]"))
    alphabet = _alphabet(texts, draft)
    inner = [f"##{x}" for x in alphabet if len(draft.pre_tokenizer.pre_tokenize_str(f"a{x}")) == 1]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[*special, *inner],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    draft.train_from_iterator(texts, trainer)
    vocab = draft.get_vocab()
    backend = _bert(models.WordPiece(vocab=vocab, unk_token="[UNK]", max_input_chars_per_word=100))
    backend.add_special_tokens(special)
    backend.decoder = decoders.WordPiece(prefix="##")
    backend.post_processor = processors.BertProcessing(("[SEP]", vocab["[SEP]"]), ("[CLS]", vocab["[CLS]"]))
    return backend


def _bert(model: models.Model) -> Tokenizer:
    backend = Tokenizer(model)
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return backend


def _alphabet(texts: Iterable[str], backend: Tokenizer) -> list[str]:
    """The commonest characters after normalisation, in sorted order."""
    raw: Counter[str] = Counter()
    for text in texts:
        raw.update(text)
    counts: Counter[str] = Counter()
    for character, count in raw.items():
        for x in backend.normalizer.normalize_str(character):
            counts[x] += 0 if x.isspace() else count
    return sorted(sorted(+counts, key=lambda x: (-counts[x], x))[:_ALPHABET])


def whole(text: str) -> str:
    """The text with ? for each half of a surrogate pair, which JSON can hold and the library refuses."""
    return text.encode("utf-8", "replace").decode("utf-8")


class _Counted:
    """Hands texts on, as often as asked, and counts their characters."""

    def __init__(self, texts: Iterable[str]):
        self.texts, self.characters = texts, 0

    def __iter__(self) -> Iterator[str]:
        for text in self.texts:
            self.characters += len(text)
            yield whole(text)


_MAKERS = {"character": _character, "word": _word, "bpe": _bpe, "bpe4": _bpe4, "wordpiece": _wordpiece}
