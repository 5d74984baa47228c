"""Weights into a language model: from transformers, from GGUF and from our own files, every tensor or none."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ssl_lab.errors import UserError
from ssl_lab.nn.heads import MaskedLMHead, PoolerHead
from ssl_lab.weights import gguf, io, sources
from ssl_lab.weights.families import KINDS, Facts, LanguageModel, facts_of, make, settings
from ssl_lab.weights.rename import State, rename
from ssl_lab.weights.tables import hf_bert, hf_gpt2, hf_llama, hf_t5

log = logging.getLogger(__name__)
TABLES: dict[str, ModuleType] = {"bert": hf_bert, "gpt2": hf_gpt2, "llama": hf_llama, "t5": hf_t5}
MODEL_TYPES = {"bert": "bert", "gpt2": "gpt2", "llama": "llama", "mistral": "llama", "t5": "t5"}
_PARTS = {"Decoder": "decoder", "TextEncoder": "encoder", "EncoderDecoder": "model"}  # what methods call them
_NOT_TRAINED = ("cls.", "pooler.", "classifier.", "qa_outputs.")  # heads that a checkpoint may lack


@dataclass(frozen=True)
class Source:
    """Weights in our names, and the facts that the tensors alone do not tell; empty where nothing tells them."""

    state: State
    facts: Facts = field(default_factory=dict)


def read(spec: str) -> Source:
    """Weights named by `hf:<folder or repository>`, `gguf:<file>`, a .safetensors or .ckpt file, or a run folder.

    Heads are left behind, see `load_head`.

    Raises:
        UserError: nothing there, no network, a corrupt file, or an architecture that our models cannot express.
    """
    kind, colon, name = spec.partition(":")
    if colon and kind == "hf":
        family, facts, state = _from_hf(name)
        return Source(rename(state, TABLES[family].table(facts)), facts)
    if colon and kind == "gguf":
        return Source(*gguf.read(Path(name)))
    if spec.endswith(".gguf"):
        raise UserError(f"{spec} is a GGUF file: name it gguf:{spec}")
    path = sources.inside(Path(spec))
    if path.suffix != ".safetensors":
        return Source(_backbone(sources.read_checkpoint(path), path))
    state, header = sources.read_safetensors(path)
    facts = header.get("arguments", {}) if header.get("class") in _PARTS else {}
    return Source(_backbone(state, path), facts)


def load(model: LanguageModel, spec: str) -> None:
    """Fill `model` with the weights named by `spec`, see `read`.

    Raises:
        UserError: nothing there, another kind of model, another vocabulary, or tensors that fit nowhere.
        OtherArchitecture: another size or recipe; the message says what to set.
    """
    source = read(spec)
    _require_kind(model, source.facts, spec)
    here, there = facts_of(model), source.facts
    if not there:
        log.warning(sources.UNTOLD, spec, "heads, window, base of rotations, epsilon and activation")
    _require_vocabulary(model, source.state, spec)
    if here and there and (wrong := _unlike(settings(here), settings(there), there["family"])):
        part = _PARTS[KINDS[there["family"]].__name__]
        told = "; ".join(f"{name} {io.word(new)} there, {io.word(old)} here" for name, (old, new) in wrong.items())
        words = " ".join(f"method.{part}.{name}={io.word(new)}" for name, (_, new) in wrong.items())
        raise io.OtherArchitecture(
            f"{spec} does not fit this model: {told}; to match it: {words}", _nested(wrong, settings(there))
        )
    if problems := io.differences(model.state_dict(), source.state):
        raise UserError(
            f"{spec} does not fit this model: {'; '.join(problems[:4])}; choose another backbone or other weights"
        )
    model.load_state_dict(source.state)


def build(spec: str) -> LanguageModel:
    """The model that the weights named by `spec` belong to, see `read`.

    Raises:
        UserError: as `load`, and weights that do not say what they are.
    """
    source = read(spec)
    if not source.facts:
        raise UserError(f"{spec} does not say what it is (no architecture beside its tensors); load it into a model")
    model = make(source.facts)
    if problems := io.differences(model.state_dict(), source.state):
        raise UserError(f"{spec}: configuration and tensors disagree: {'; '.join(problems[:4])}")
    model.load_state_dict(source.state)
    return model


def load_head(head: MaskedLMHead | PoolerHead, spec: str) -> None:
    """Fill a head of BERT from `hf:<folder or repository>`: masked tokens, next sentence or classes.

    Raises:
        UserError: the model has no such head, or one of another size.
    """
    kind, _, name = spec.partition(":")
    if kind != "hf":
        raise UserError(f"{spec}: heads come from transformers' models alone: hf:<folder or repository>")
    family, _, state = _from_hf(name)
    if family != "bert":
        raise UserError(f"{spec} is a {family!r}; a head of BERT needs a BERT")
    parts: tuple[str, ...]
    if isinstance(head, MaskedLMHead):
        table, parts = hf_bert.MASKED_LM, ("cls.predictions.",)
    elif any(key.startswith("classifier.") for key in state):
        table, parts = hf_bert.CLASSIFIER, ("pooler.", "classifier.")
    else:
        table, parts = hf_bert.NEXT_SENTENCE, ("pooler.", "cls.seq_relationship.")
    found = rename({key: value for key, value in state.items() if key.startswith(parts)}, table)
    if problems := io.differences(head.state_dict(), found):
        raise UserError(f"{spec} does not fit this head: {'; '.join(problems[:4])}; start it anew, or change its size")
    head.load_state_dict(found)


def _from_hf(name: str) -> tuple[str, dict[str, Any], State]:
    """Family, facts and tensors in their names, those of the base model without its prefix."""
    transformers, config = sources.hf_config(name)
    if (family := MODEL_TYPES.get(config.model_type)) is None:
        raise UserError(f"hf:{name} is a {config.model_type!r}; a language model takes {', '.join(MODEL_TYPES)}")
    table = TABLES[family]
    if (reason := table.refusal(config)) is not None:
        raise UserError(f"hf:{name}: {reason}; use other weights")
    known = [getattr(transformers, each, None) for each in config.architectures or ()]
    cls: Any = next((each for each in known if each is not None), transformers.AutoModel)
    try:
        with sources.quiet():
            model, info = cls.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    except Exception as error:
        raise UserError(f"hf:{name}: the weights cannot be read ({sources.first_line(error)})") from error
    missing = {key.removeprefix(table.PREFIX) for key in info["missing_keys"]}
    if lost := sorted(key for key in missing if not key.startswith(_NOT_TRAINED)):
        raise UserError(f"hf:{name}: the weights lack {lost[0]!r} ({len(lost)} missing); is the file complete?")
    facts = table.facts(config)
    output = model.get_output_embeddings()
    if "tied" in facts:
        facts["tied"] = output is None or output.weight is model.get_input_embeddings().weight
    state = {key.removeprefix(table.PREFIX): value for key, value in model.state_dict().items()}
    return family, facts, {key: value for key, value in state.items() if key not in missing}


def _backbone(state: State, path: Path) -> State:
    """The language model in a state dict of ours: alone, or as a part of a method."""
    places = sorted((key.removesuffix("embed.weight") for key in state if _is_embedding(key)), key=_priority)
    if not places:
        raise UserError(
            f"{path} (first key {next(iter(state), None)!r}) is no language model of ours; give a transformers model "
            f"by its folder, hf:{path.parent}"
        )
    return {key.removeprefix(places[0]): value for key, value in state.items() if key.startswith(places[0])}


def _is_embedding(key: str) -> bool:
    return key == "embed.weight" or key.endswith(".embed.weight")


def _priority(place: str) -> tuple[int, str]:
    """The model itself first, then what methods usually call it."""
    usual = ["", *(f"{part}." for part in _PARTS.values())]
    return usual.index(place) if place in usual else len(usual), place


def _require_kind(model: nn.Module, facts: Facts, spec: str) -> None:
    if facts and not isinstance(model, KINDS[facts["family"]]):
        wanted, found = KINDS[facts["family"]].__name__, type(model).__name__
        raise UserError(f"{spec} holds a {facts['family']}, which is a {wanted}, not a {found}; choose such a backbone")


def _require_vocabulary(model: LanguageModel, state: State, spec: str) -> None:
    """Weights know the tokens of their own tokenizer and no others."""
    embedding = state.get("embed.weight")
    if embedding is not None and len(embedding) != model.vocab_size:
        part = next(_PARTS[kind.__name__] for kind in KINDS.values() if isinstance(model, kind))
        raise UserError(
            f"{spec} knows {len(embedding)} tokens, this model {model.vocab_size}: take its tokenizer, "
            f"data.tokenizer=<its tokenizer.json or gguf:file> (and method.{part}.vocab_size={len(embedding)})"
        )


def _unlike(here: Mapping[str, Any], there: Mapping[str, Any], family: str) -> dict[str, tuple[Any, Any]]:
    """Settings by their path that differ: (here, there). How many positions exist is a fact only of a learned table."""
    old, new = _flat(here), _flat(there)
    free = () if family in ("bert", "gpt2") else ("max_length",)
    unlike = [name for name in new if name not in free and (name not in old or old[name] != new[name])]
    return {name: (old.get(name), new[name]) for name in unlike}


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A nested mapping by dotted paths."""
    out: dict[str, Any] = {}
    for name, value in tree.items():
        out |= {f"{name}.{k}": v for k, v in _flat(value).items()} if isinstance(value, Mapping) else {name: value}
    return out


def _nested(wrong: Mapping[str, Any], whole: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that differ, nested as a configuration writes them; what is called comes whole."""
    return {name: whole[name] for name in dict.fromkeys(path.split(".")[0] for path in wrong)}
