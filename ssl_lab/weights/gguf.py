"""GGUF, the file format of llama.cpp: quantised weights, the tokenizer and the chat template in one file."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ssl_lab.errors import UserError
from ssl_lab.weights.rename import State, rename
from ssl_lab.weights.sources import first_line
from ssl_lab.weights.tables import gguf_llama

if TYPE_CHECKING:
    import tokenizers

_CONTROL, _USER = 3, 4  # kinds of tokens in tokenizer.ggml.token_type that stand in a text as a whole


def read(path: str | Path) -> tuple[State, dict[str, Any]]:
    """Weights as float32 in our names, and the facts of the decoder that they belong to.

    Quantised tensors are expanded: the model is the one that the file describes, not smaller in memory.

    Raises:
        UserError: no such file, no GGUF, or an architecture that our decoder cannot express.
    """
    import gguf

    reader = _open(path)
    metadata = _metadata(reader)
    if (reason := gguf_llama.refusal(metadata)) is not None:
        raise UserError(f"gguf:{path}: {reason}; use other weights")
    state: State = {}
    for tensor in reader.tensors:
        if tensor.name == "rope_freqs.weight":
            raise UserError(f"gguf:{path}: its rotary positions are scaled by a table, ours are not; use other weights")
        try:
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise UserError(
                f"gguf:{path}: the package gguf cannot expand {tensor.tensor_type.name}; take a file of another kind, "
                "e.g. Q8_0"
            ) from error
        state[tensor.name] = torch.from_numpy(values.copy() if not values.flags.writeable else values).float()
    facts = gguf_llama.facts(metadata, tied="output.weight" not in state)
    return rename(gguf_llama.by_halves(state, facts["head_dim"]), gguf_llama.table(facts)), facts


def tokenizer(path: str | Path) -> tuple["tokenizers.Tokenizer", dict[str, Any]]:
    """The file's tokenizer, and the entries of a tokenizer_config.json: special tokens by role, and `chat_template`.

    Raises:
        UserError: no such file, no GGUF, or a tokenizer that is no byte-level BPE.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    metadata = _metadata(_open(path))
    kind, rules = (metadata.get(f"tokenizer.ggml.{name}", "none") for name in ("model", "pre"))
    if kind != "gpt2" or rules not in _BEFORE_BYTES:
        raise UserError(
            f"gguf:{path}: its tokenizer is {kind!r} with the rules {rules!r}; ours are 'gpt2' with "
            f"{', '.join(map(repr, _BEFORE_BYTES))}; give the tokenizer.json of the model instead"
        )
    names = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    backend = tokenizers.Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges))
    digits = [pre_tokenizers.Digits(individual_digits=True)] if _BEFORE_BYTES[rules] else []
    backend.pre_tokenizer = pre_tokenizers.Sequence([*digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    kinds = list(zip(names, metadata["tokenizer.ggml.token_type"], strict=True))
    control = [tokenizers.AddedToken(name, special=True, normalized=False) for name, k in kinds if k == _CONTROL]
    backend.add_special_tokens(control)
    backend.add_tokens([tokenizers.AddedToken(name, normalized=False) for name, k in kinds if k == _USER])
    roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {role: metadata.get(f"tokenizer.ggml.{name}_token_id") for role, name in roles.items()}
    config: dict[str, Any] = {f"{role}_token": names[i] for role, i in ids.items() if i is not None}
    if (template := metadata.get("tokenizer.chat_template")) is not None:
        config["chat_template"] = template
    return backend, config


# Whether digits are split one by one before GPT-2's pattern, by the name of the rules.
_BEFORE_BYTES = {"gpt-2": False, "smollm": True}


def _open(path: str | Path) -> Any:
    try:
        import gguf
    except ImportError as error:
        raise UserError(f"gguf:{path} needs the package gguf: pip install 'ssl-lab[gguf]'") from error
    if not Path(path).is_file():
        raise UserError(f"gguf:{path}: no such file")
    try:
        return gguf.GGUFReader(path)
    except Exception as error:  # the package raises whatever its parsing trips over
        raise UserError(f"gguf:{path} is no complete GGUF file ({first_line(error)}); copy it again") from error


def _metadata(reader: Any) -> dict[str, Any]:
    return {name: entry.contents() for name, entry in reader.fields.items()}
