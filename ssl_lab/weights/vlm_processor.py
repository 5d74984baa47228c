"""The files beside an exported LLaVA that turn pictures and conversations into its inputs."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssl_lab.weights.export import import_transformers
from ssl_lab.weights.look import Look
from ssl_lab.weights.sources import quiet

# What conversations look like in transformers, as those of a template that knows nothing of pictures.
_FLAT = (
    "{%- set told = namespace(messages=[]) -%}"
    "{%- for message in messages -%}"
    "{%- set said = namespace(text='') -%}"
    "{%- if message['content'] is string -%}"
    "{%- set said.text = message['content'] -%}"
    "{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- set last = '' if loop.last else '\\n' -%}"
    "{%- set said.text = said.text + (MARKER + last if part['type'] == 'image' else part['text']) -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{%- set told.messages = told.messages + [{'role': message['role'], 'content': said.text}] -%}"
    "{%- endfor -%}"
)
_SYSTEM = (
    "{%- if not told.messages or told.messages[0]['role'] != 'system' -%}"
    "{%- set told.messages = [{'role': 'system', 'content': SYSTEM}] + told.messages -%}"
    "{%- endif -%}"
)
_LAST = "{%- set messages = told.messages %}"
_OWN = ("chat_template", "tokenizer_class", "image_token", "clean_up_tokenization_spaces")


def write(
    folder: Path,
    *,
    tokenizer: Path,
    config: Mapping[str, Any],
    system: str | None,
    look: Look,
    patch_size: int,
    strategy: str,
    extra: int,
) -> None:
    """Write what `AutoProcessor.from_pretrained` opens: tokenizer, chat template, image processor.

    Args:
        folder: of an exported model.
        tokenizer: a tokenizer.json.
        config: what stands in tokenizer_config.json, with `chat_template` and `image_token`.
        system: what is said beforehand where a conversation does not; None = as the template has it.
        look: of pictures.
        patch_size: side of a patch.
        strategy: "default" drops the first token of the image encoder, "full" drops none.
        extra: tokens that it has beside the patches.
    """
    transformers = import_transformers()
    marker = str(config["image_token"])
    chat = template(str(config["chat_template"]), marker, system)
    special = {key: value for key, value in config.items() if key.endswith("_token") and key not in _OWN}
    with quiet():
        words = transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(tokenizer), extra_special_tokens={"image_token": marker}, **special
        )
        transformers.LlavaProcessor(
            image_processor=look.hf(transformers),
            tokenizer=words,
            patch_size=patch_size,
            vision_feature_select_strategy=strategy,
            num_additional_image_tokens=extra,
            chat_template=chat,
            image_token=marker,
        ).save_pretrained(folder)


def template(own: str, marker: str, system: str | None) -> str:
    """A chat template for contents that are lists of parts, `{"type": "image"}` and `{"type": "text", ...}`, too."""
    before = "" if system is None else _SYSTEM.replace("SYSTEM", json.dumps(system, ensure_ascii=False))
    return _FLAT.replace("MARKER", json.dumps(marker)) + before + _LAST + own
