"""Where a model that sees and speaks looked while it answered: attention from the answer's tokens to the patches."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_lab.analysis.attention import attention_weights, heat
from ssl_lab.backbones.decoder import Decoder
from ssl_lab.backbones.flamingo import GatedVisionLanguage
from ssl_lab.backbones.vlm import VisionLanguage
from ssl_lab.errors import UserError
from ssl_lab.nn.connectors import LinearConnector, MLPConnector


@torch.no_grad()
def looked(model: VisionLanguage, tokens: Tensor, visual: Tensor, first: int, *, layer: int | None = None) -> Tensor:
    """Maps (N, rows, columns) float of the N pictures of a row: how much of their attention the answer's tokens gave.

    Mean over heads and over the tokens that say the answer, each asked where it is about to be said. Values of all
    pictures sum to at most 1, since words are looked at too.

    Args:
        model: in evaluation mode.
        tokens: (1, L) int64, prompt and answer, with a marker for each picture.
        visual: (N, Q, D) of the pictures, see `VisionLanguage.see`.
        first: place of the answer's first token in `tokens`.
        layer: block of the language model; None = the middle one.

    Raises:
        UserError: a model with gated blocks, a connector whose tokens have no place in the picture, a language model
            that is not ours, or an answer without tokens.
    """
    if isinstance(model, GatedVisionLanguage):
        raise UserError("a Flamingo looks between the blocks of its language model: there is no map of that")
    if not isinstance(model, VisionLanguage) or not isinstance(model.connector, LinearConnector | MLPConnector):
        raise UserError("the tokens of a resampler have no place in the picture: take connector linear or mlp2x")
    if not isinstance(model.decoder, Decoder):
        raise UserError("a language model of transformers does not tell its attention here: use our decoder")
    length = visual.shape[1]
    beside = 0 if model.drop_prefix else int(getattr(model.vision, "num_prefix", 0))
    side = math.isqrt(length - beside)
    if side**2 != length - beside or not 0 < first < tokens.shape[1]:
        raise UserError(f"{length} tokens of a picture and an answer from token {first} on show no map")
    x = model.splice(tokens, visual)
    middle = len(model.decoder.blocks) // 2 if layer is None else layer
    weights, _ = attention_weights(model.decoder, x.embedded, middle, prefix=x.prefix)
    marked = tokens[0] == model.image_token
    end = torch.where(marked, length, 1).cumsum(0)
    asked = weights[0, :, -x.embedded.shape[1] :, -x.embedded.shape[1] :].mean(0)[end[first - 1 : -1] - 1].mean(0)
    return torch.stack([asked[i - length + beside : i] for i in end[marked].tolist()]).unflatten(1, (side, side))


def laid_over(picture: Tensor, seen: Tensor, *, strength: float = 0.5) -> Tensor:
    """A picture (3, H, W) uint8 in grey under a map (rows, columns) >= 0 in colours -> (3, H, W) uint8.

    The lightest place was looked at most; one that was not looked at at all is dark.
    """
    size = picture.shape[-2:]
    smooth = F.interpolate(seen[None, None].float(), size=size, mode="bicubic", align_corners=False)[0, 0].clamp(min=0)
    grey = (picture.float() * picture.new_tensor([0.299, 0.587, 0.114], dtype=torch.float32).view(3, 1, 1)).sum(0)
    return torch.lerp(grey.expand(3, -1, -1), heat(smooth, size).float(), strength).round().to(torch.uint8)
