"""A model that sees and speaks as a folder that transformers opens: written, opened again by that library, compared."""

import copy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_lab.backbones.decoder import Decoder
from ssl_lab.backbones.hf_lm import HFDecoder
from ssl_lab.backbones.vlm import VisionLanguage
from ssl_lab.errors import UserError
from ssl_lab.nn.connectors import LinearConnector, MLPConnector
from ssl_lab.weights.export import Exported, gap, import_transformers
from ssl_lab.weights.families import facts_of
from ssl_lab.weights.rename import State, rename
from ssl_lab.weights.sources import quiet
from ssl_lab.weights.text import TABLES
from ssl_lab.weights.vlm_vision import Tower, cannot, tower

_MAY_BE_LEFT = ("pooler", "mask_token", "layernorm", "post_layernorm")  # of an image encoder, behind what is read


def to_hf(model: VisionLanguage, folder: Path, *, end: int | None = None, pad: int | None = None) -> Exported:
    """Write `config.json`, `generation_config.json` and `model.safetensors` of a LlavaForConditionalGeneration.

    A marker without a row in our embedding gets one of zeros there, and `generate` is told never to say it. A single
    linear map becomes their two with an identity behind it and no activation, which is the same.

    Args:
        model: image encoder, connector and decoder.
        folder: exists and is empty.
        end: id that ends an answer, for `generate`.
        pad: id that fills rows up, for `generate`.

    Raises:
        UserError: a part without a counterpart, transformers missing, or logits that differ.
    """
    transformers = import_transformers()
    if model.prefix_lm:
        raise cannot("prefix_lm=true", "lets an image see what comes after it")
    vision, (act, connector) = tower(model), _connector(model.connector)
    text, language, head = _language(model, transformers)
    config = transformers.LlavaConfig(
        vision_config=getattr(transformers, vision.config)(**vision.arguments),
        text_config=text,
        image_token_index=model.image_token,
        image_seq_length=_image_length(vision),
        vision_feature_layer=-1,
        vision_feature_select_strategy=vision.strategy,
        projector_hidden_act=act,
        multimodal_projector_bias="linear_1.bias" in connector,
        tie_word_embeddings=head is None,
    )
    with quiet():
        theirs = transformers.LlavaForConditionalGeneration(config)
    state = {f"model.vision_tower.{key}": value for key, value in _placed(theirs, vision.state).items()}
    state |= {f"model.multi_modal_projector.{key}": value for key, value in connector.items()}
    state |= {f"model.language_model.{key}": value for key, value in language.items()}
    _fill(theirs, state if head is None else state | {"lm_head.weight": head}, tied=head is None)
    theirs.generation_config = transformers.GenerationConfig(
        eos_token_id=end, pad_token_id=end if pad is None else pad, suppress_tokens=[model.image_token]
    )
    with quiet():
        theirs.save_pretrained(folder)
        again = transformers.LlavaForConditionalGeneration.from_pretrained(folder).eval()
    difference, scale = compare(model, again)
    opened_by = 'transformers.LlavaForConditionalGeneration.from_pretrained("{}")'
    return Exported(f"transformers {transformers.__version__}", difference, scale, opened_by)


def _connector(connector: nn.Module) -> tuple[str, State]:
    """The activation of their projector, and its tensors."""
    if not isinstance(connector, LinearConnector | MLPConnector):
        raise cannot("connector", f"is a {type(connector).__name__}, theirs maps every patch by itself")
    if connector.pool * connector.merge > 1:
        raise cannot("connector", f"has pool={connector.pool} and merge={connector.merge}, theirs keeps every patch")
    if isinstance(connector, MLPConnector):
        return "gelu", {
            f"linear_{i}.{k}": v for i in (1, 2) for k, v in getattr(connector, f"fc{i}").state_dict().items()
        }
    state = {f"linear_1.{key}": value for key, value in connector.fc.state_dict().items()}
    state["linear_2.weight"] = torch.eye(connector.fc.out_features)
    if "linear_1.bias" in state:
        state["linear_2.bias"] = torch.zeros(connector.fc.out_features)
    return "linear", state


def _language(model: VisionLanguage, transformers: Any) -> tuple[Any, State, Tensor | None]:
    """Configuration and tensors of the language model, and the output's weights where they are not the embedding's."""
    decoder = model.decoder
    rows = max(decoder.vocab_size, model.image_token + 1)
    if isinstance(decoder, HFDecoder):
        config, output = copy.deepcopy(decoder.model.config), decoder.model.get_output_embeddings()
        if getattr(output, "bias", None) is not None:
            raise cannot("decoder", "has a bias in its output")
        embed = next(key for key, value in decoder.model.base_model.state_dict().items() if _same(value, decoder.embed))
        state, config.vocab_size = dict(decoder.model.base_model.state_dict()), rows
        head = None if output.weight is decoder.embed.weight else output.weight.detach()
    else:
        facts = facts_of(decoder) if isinstance(decoder, Decoder) else {}
        if facts.get("family") not in ("llama", "gpt2"):
            raise cannot("decoder", "is no LLaMA, Mistral or GPT-2")
        table = TABLES[facts["family"]]
        known = {name: None for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
        kind = "GPT2" if facts["family"] == "gpt2" else "Mistral" if facts["window"] else "Llama"
        config = getattr(transformers, f"{kind}Config")(**table.arguments({**facts, "vocab_size": rows}), **known)
        state = rename(decoder.state_dict(), table.table(facts), back=True)
        embed = next(iter(rename({"embed.weight": decoder.embed.weight}, table.table(facts), back=True)))
        head = state.pop("lm_head.weight", None)
        head = None if facts["tied"] else head
    more = rows - decoder.vocab_size
    state[embed] = F.pad(state[embed], (0, 0, 0, more))
    return config, state, None if head is None else F.pad(head, (0, 0, 0, more))


def _same(value: Tensor, embed: nn.Embedding) -> bool:
    return value.data_ptr() == embed.weight.data_ptr()


def _placed(theirs: Any, state: State) -> State:
    """As the encoder's class names its tensors: some releases put `vision_model.` before them."""
    inner = any(key.startswith("vision_model.") for key in theirs.model.vision_tower.state_dict())
    return {f"vision_model.{key}": value for key, value in state.items()} if inner else state


@torch.no_grad()
def _fill(theirs: Any, state: State, tied: bool) -> None:
    """Every parameter; what an image encoder has behind the block that is read is set to nothing.

    Raises:
        UserError: one is left out, or a tensor has no place.
    """
    if not tied:
        theirs.lm_head.weight = nn.Parameter(theirs.lm_head.weight.detach().clone())
    unknown = theirs.load_state_dict(state, strict=False).unexpected_keys
    filled = {value.data_ptr() for key, value in theirs.state_dict().items() if key in state}
    left = {key: value for key, value in theirs.named_parameters() if value.data_ptr() not in filled}
    for key in [key for key in left if key.startswith("model.vision_tower.") and any(x in key for x in _MAY_BE_LEFT)]:
        left.pop(key).zero_()
    if left or unknown:
        raise UserError(f"LlavaForConditionalGeneration does not fit: {[*left, *unknown][0]!r}; use to=safetensors")


def _image_length(vision: Tower) -> int:
    """Tokens that stand for an image."""
    side = vision.arguments["image_size"] // vision.arguments["patch_size"]
    return int(side**2) + (vision.extra if vision.strategy == "full" else 0)


@torch.no_grad()
def compare(model: VisionLanguage, theirs: Any) -> tuple[float, float]:
    """Largest difference of the logits, and the largest logit, of rows with two images, one, and none, and padding.

    Raises:
        UserError: they differ by more than rounding.
    """
    ours: Any = copy.deepcopy(model).float().cpu().eval()
    marker, length = model.image_token, int(theirs.config.image_seq_length)
    room = getattr(getattr(ours.decoder, "positions", ours.decoder), "max_length", None) or 1 << 30
    shown = [2 if 2 * length + 6 <= room else 1, 1, 0]
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(0, model.decoder.vocab_size, (3, 6), generator=generator)
    words[words == marker] = (marker + 1) % model.decoder.vocab_size
    x = [word.tolist() for word in words]
    rows = [[*x[0][:2], marker, *x[0][2:4], *[marker] * (shown[0] - 1), *x[0][4:]], [marker, *x[1][:3]], x[2][:5]]
    vision = theirs.config.vision_config
    pixels = torch.randn(sum(shown), vision.num_channels, vision.image_size, vision.image_size, generator=generator)
    tokens, valid = _batch(rows)
    wide, real = _batch([[y for x in row for y in ([x] * length if x == marker else [x])] for row in rows])
    found = ours.decoder.logits(ours(tokens, pixels, valid=valid)[0].tokens)
    logits = theirs(input_ids=wide, attention_mask=real.long(), pixel_values=pixels).logits
    return gap(found[real], logits[..., : model.decoder.vocab_size][real])


def _batch(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Rows filled up on the right, and what is real."""
    widest = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (widest - len(row)) for row in rows])
    return tokens, torch.arange(widest) < torch.tensor([len(row) for row in rows])[:, None]
