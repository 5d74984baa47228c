"""A language model as a folder that transformers opens: written, opened again by that library, and compared."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssl_lab.backbones.encoder_decoder import EncoderDecoder
from ssl_lab.backbones.text import TextEncoder
from ssl_lab.errors import UserError
from ssl_lab.nn.heads import MaskedLMHead, PoolerHead
from ssl_lab.weights.export import Exported, gap, import_transformers
from ssl_lab.weights.families import Facts, LanguageModel, facts_of
from ssl_lab.weights.rename import State, rename
from ssl_lab.weights.sources import quiet
from ssl_lab.weights.tables import hf_bert
from ssl_lab.weights.text import TABLES

Head = MaskedLMHead | PoolerHead
_CONFIGS = {"bert": "Bert", "gpt2": "GPT2", "t5": "T5"}
_CLASSES = {"gpt2": "GPT2LMHeadModel", "t5": "T5ForConditionalGeneration"}
_BERTS = {
    (): "BertModel",
    (MaskedLMHead,): "BertForMaskedLM",
    (PoolerHead,): "BertForSequenceClassification",
    (MaskedLMHead, PoolerHead): "BertForPreTraining",
}


def to_hf(
    model: LanguageModel, folder: Path, *, heads: Sequence[Head] = (), special: Mapping[str, int | None] | None = None
) -> Exported:
    """Write `config.json` and `model.safetensors` for `from_pretrained`: what `hf:<folder>` reads.

    Args:
        model: a GPT-2, LLaMA or Mistral, BERT or T5 of ours.
        folder: exists and is empty.
        heads: of a BERT: masked tokens, classes, or both (then classes are next sentence).
        special: ids that `generate` needs: `pad`, `bos`, `eos`, and `decoder_start` of a T5; those left out are unset,
            for transformers' own belong to another vocabulary.

    Raises:
        UserError: an architecture without a counterpart, transformers missing, or outputs that differ.
    """
    transformers = import_transformers()
    facts = facts_of(model)
    if facts.get("family") not in TABLES:
        raise UserError(f"transformers has no model of these parts ({type(model).__name__}); use to=safetensors")
    table, name = TABLES[facts["family"]], _class_name(facts, heads)
    extra: dict[str, Any] = {"add_pooling_layer": False} if name == "BertModel" else {}
    config: Any = getattr(transformers, f"{_CONFIGS.get(facts['family'], _llama(facts))}Config")
    known = {f"{role}_token_id": (special or {}).get(role) for role in ("pad", "bos", "eos", "decoder_start")}
    theirs = getattr(transformers, name)(config(**table.arguments(facts), **_classes(heads), **known), **extra)
    _fill(theirs, _state(model, facts, heads), facts.get("tied", True))
    with quiet():
        theirs.save_pretrained(folder)
        again = type(theirs).from_pretrained(folder, **extra).eval()
    difference, scale = _compare(model, again, heads)
    opened_by = f'transformers.{name}.from_pretrained("{{}}")'
    return Exported(f"transformers {transformers.__version__}", difference, scale, opened_by)


def _class_name(facts: Facts, heads: Sequence[Head]) -> str:
    kinds = tuple(sorted((type(head) for head in heads), key=lambda kind: kind.__name__))
    if facts["family"] == "bert":
        if kinds not in _BERTS:
            raise UserError("a BERT goes with one head for masked tokens and one for classes at most")
        return _BERTS[kinds]
    if heads:
        raise UserError(f"a {facts['family']} has no heads beside its output; export it without")
    return _CLASSES[facts["family"]] if facts["family"] != "llama" else f"{_llama(facts)}ForCausalLM"


def _state(model: LanguageModel, facts: Facts, heads: Sequence[Head]) -> State:
    """All tensors in their names; those of a model with an output, of which the base model is a part."""
    table = TABLES[facts["family"]]
    whole = bool(heads) or facts["family"] != "bert"
    prefix = table.PREFIX if whole else ""
    base = rename(model.state_dict(), table.table(facts), back=True)
    state = {key if key.startswith("lm_head.") else prefix + key: value for key, value in base.items()}
    for head in heads:
        if isinstance(head, MaskedLMHead):
            state |= rename(head.state_dict(), hf_bert.MASKED_LM, back=True)
        else:
            names = rename(
                head.state_dict(), hf_bert.CLASSIFIER if len(heads) == 1 else hf_bert.NEXT_SENTENCE, back=True
            )
            state |= {prefix + key if key.startswith("pooler.") else key: value for key, value in names.items()}
    return state


def _fill(theirs: Any, state: State, tied: bool) -> None:
    """Every parameter, under one of its names.

    Raises:
        UserError: one is left out, or a tensor has no place.
    """
    output = theirs.get_output_embeddings()
    if not tied and output is not None:  # transformers ties T5 v1.1 until a checkpoint says otherwise
        output.weight = nn.Parameter(output.weight.detach().clone())
    unknown = theirs.load_state_dict(state, strict=False).unexpected_keys
    filled = {value.data_ptr() for key, value in theirs.state_dict().items() if key in state}
    left = [key for key, value in theirs.named_parameters() if value.data_ptr() not in filled]
    if left or unknown:
        raise UserError(f"{type(theirs).__name__} does not fit: {[*left, *unknown][0]!r}; use to=safetensors")


@torch.no_grad()
def _compare(model: LanguageModel, theirs: Any, heads: Sequence[Head]) -> tuple[float, float]:
    """Largest difference of all outputs for random tokens with padding at the end, and the largest output."""
    ours, *own_heads = [_plainly(part) for part in (model, *heads)]
    generator = torch.Generator().manual_seed(0)
    x, target = torch.randint(0, model.vocab_size, (2, 2, 12), generator=generator)
    valid = torch.ones_like(x, dtype=torch.bool)
    valid[1, 8:] = False
    if isinstance(model, EncoderDecoder):
        outputs = theirs(input_ids=x, attention_mask=valid, decoder_input_ids=target)
        return gap(ours.logits(ours(x, target, valid=valid).tokens), outputs.logits)
    outputs = theirs(x, attention_mask=valid)
    encoded = ours(x, valid=valid)
    if not isinstance(model, TextEncoder):
        return gap(ours.logits(encoded.tokens)[valid], outputs.logits[valid])
    found: list[tuple[Tensor, Tensor]] = []
    for head in own_heads:
        if isinstance(head, MaskedLMHead):
            logits = outputs.prediction_logits if len(heads) > 1 else outputs.logits
            found.append((head(encoded.tokens, ours.embed.weight)[valid], logits[valid]))
        else:
            logits = outputs.seq_relationship_logits if len(heads) > 1 else outputs.logits
            found.append((head(encoded.pooled("cls")), logits))
    found = found or [(encoded.tokens[valid], outputs.last_hidden_state[valid])]
    gaps = [gap(a, b) for a, b in found]
    return max(difference for difference, _ in gaps), max(scale for _, scale in gaps)


def _plainly(part: nn.Module) -> Any:
    """A copy as the library computes."""
    return copy.deepcopy(part).float().cpu().eval()


def _llama(facts: Facts) -> str:
    return "Mistral" if facts.get("window") else "Llama"


def _classes(heads: Sequence[Head]) -> dict[str, Any]:
    """How many, where a classifier is exported by itself."""
    alone = heads[0] if len(heads) == 1 else None
    return {"num_labels": alone.out.out_features} if isinstance(alone, PoolerHead) else {}
