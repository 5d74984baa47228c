"""CLIP's own tokenizer, made from its list of merges."""

import gzip
import importlib.util
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from ssl_lab.data.folders import missing
from ssl_lab.errors import UserError

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
FILE = "bpe_simple_vocab_16e6.txt.gz"
_MERGES = 49152 - 256 - 2  # lines of the file that count
_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # digits one by one


def backend(path: str | None = None) -> tokenizers.Tokenizer:
    """49,408 byte-level tokens of lower-case text (Radford et al., 2021); <|startoftext|> and <|endoftext|> come last.

    Unlike the original it neither undoes HTML escapes nor mends broken Unicode.

    Args:
        path: of `bpe_simple_vocab_16e6.txt.gz`, packed or not; None = the file that the package open_clip brings.

    Raises:
        UserError: no such file, or another one.
    """
    if path is None:
        spec = importlib.util.find_spec("open_clip")
        if spec is None or spec.origin is None:
            raise UserError(f"data.tokenizer=clip: needs {FILE}: name it as clip:<file>, or install open_clip_torch")
        path = str(Path(spec.origin).parent / FILE)
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"no merges of CLIP's tokenizer: {missing(file)}")
    try:
        text = (gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()).decode("utf-8")
        return _made([(a, b) for a, b in (line.split() for line in text.split("\n")[1 : 1 + _MERGES])])
    except Exception as error:
        raise UserError(f"{file} holds no merges of CLIP's tokenizer ({error}): take it from open_clip") from None


def _made(merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    # Bytes come in the order of their visible stand-ins: those that are printable, then the others.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(i) for i in [*printable, *range(256, 324)]]
    names = [*letters, *(x + "</w>" for x in letters), *(a + b for a, b in merges), BEGIN, END]
    vocab = {name: i for i, name in enumerate(names)}
    model = models.BPE(vocab=vocab, merges=merges, unk_token=END, end_of_word_suffix="</w>", fuse_unk=False)
    found = tokenizers.Tokenizer(model)
    clean = [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    found.normalizer = normalizers.Sequence(clean)
    split = pre_tokenizers.Split(Regex(_PATTERN), "removed", invert=True)
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    found.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    found.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("</w>", " ")])
    found.add_special_tokens([BEGIN, END])
    return found
