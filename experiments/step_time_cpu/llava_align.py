"""LLaVA's first stage beside transformers: the connector learns, a ViT-S/16 and a language model of 135 M are frozen.

    python llava_align.py bf16-mixed 7 > llava_align_bf16.jsonl

Both have the same weights, through `export to=hf`, the same pictures, tokens and labels (answers alone), and AdamW of
the connector. Steps take turns in one process; `cached` is ours with the features of the frozen image encoder kept.
"""

import functools
import json
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from ssl_lab.backbones.decoder import Decoder
from ssl_lab.backbones.vit import ViT
from ssl_lab.backbones.vlm import VisionLanguage
from ssl_lab.bench.machine import facts
from ssl_lab.bench.step import MethodStep, TrainStep
from ssl_lab.bench.timing import interleave
from ssl_lab.losses.lm import IGNORE
from ssl_lab.methods.llava import LLaVA
from ssl_lab.nn.connectors import MLPConnector
from ssl_lab.nn.positions import Rotary
from ssl_lab.nn.recipes import llama_block, rms_norm
from ssl_lab.train.optim import Optim
from ssl_lab.types import Batch
from ssl_lab.weights import vlm_export

VOCAB, ROWS, QUESTION, ANSWER, PATCHES = 49152, 4, 24, 24, 196  # as SmolLM2-135M; tokens of a row; of a picture
CPU = torch.device("cpu")


def towers() -> VisionLanguage:
    torch.manual_seed(0)
    block = functools.partial(llama_block, hidden=1536, num_kv_heads=3)
    language = Decoder(VOCAB, 576, 30, 9, max_length=512, positions=Rotary, tied=True, block=block, norm=rms_norm)
    return VisionLanguage(ViT(384, 12, 6, image_size=224, patch_size=16), MLPConnector, language, image_token=VOCAB - 1)


def rows(marker: int) -> tuple[Tensor, Tensor]:
    """Tokens (B, L) with a picture at the beginning, and which of them are answers."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCAB - 2, (ROWS, 1 + QUESTION + ANSWER), generator=generator)
    tokens[:, 0] = marker
    answers = torch.zeros_like(tokens, dtype=torch.bool)
    answers[:, -ANSWER:] = True
    return tokens, answers


def ours(model: VisionLanguage, images: Tensor, precision: str, *, cached: bool) -> TrainStep:
    tokens, answers = rows(model.image_token)
    labels = torch.full_like(tokens, IGNORE)
    labels[:, :-1] = tokens[:, 1:].masked_fill(~answers[:, 1:], IGNORE)
    method = LLaVA(model, stage="align", cache_features=cached)
    method.optim = Optim(lr=1e-3, weight_decay=0.0)
    batch = Batch(tokens=tokens, images=images, labels=labels)
    if cached:
        batch["image_ids"] = torch.arange(ROWS)
    return MethodStep(method, batch, device=CPU, precision=precision)


def theirs(model: VisionLanguage, images: Tensor, precision: str) -> TrainStep:
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        vlm_export.to_hf(model, Path(folder))
        llava = transformers.LlavaForConditionalGeneration.from_pretrained(folder)
    llava.requires_grad_(False)
    learns = [p for name, p in llava.named_parameters() if "multi_modal_projector" in name]
    assert learns
    for p in learns:
        p.requires_grad_(True)
    tokens, answers = rows(llava.config.image_token_index)
    tokens = torch.cat([tokens[:, :1].expand(-1, PATCHES), tokens[:, 1:]], 1)
    answers = torch.cat([torch.zeros(ROWS, PATCHES, dtype=torch.bool), answers[:, 1:]], 1)
    labels = tokens.masked_fill(~answers, -100)

    def loss() -> Tensor:
        value: Tensor = llava(input_ids=tokens, pixel_values=images, labels=labels, use_cache=False).loss
        return value

    make = functools.partial(torch.optim.AdamW, learns, lr=1e-3, weight_decay=0.0)
    return TrainStep(nn.ModuleList([llava]), loss, make, device=CPU, precision=precision)


def main(precision: str, rounds: int) -> None:
    torch.set_num_threads(2)
    model, images = towers(), torch.randn(ROWS, 3, 224, 224, generator=torch.Generator().manual_seed(2))
    peer = theirs(model, images, precision)
    steps = {"ours": ours(model, images, precision, cached=False), "transformers": peer}
    steps["ours, cached"] = ours(model, images, precision, cached=True)
    losses = {name: float(step()) for name, step in steps.items()}
    took = interleave(steps, CPU, rounds=rounds)
    print(json.dumps({"machine": facts(CPU), "precision": precision, "rounds": rounds}))
    for name, timing in took.items():
        ms = {"median_ms": round(1e3 * timing.median, 1), "min_ms": round(1e3 * min(timing.seconds), 1)}
        ratio = round(timing.median / took["ours"].median, 2)
        print(json.dumps({"name": name, **ms, "times_ours": ratio, "first_loss": round(losses[name], 4)}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
