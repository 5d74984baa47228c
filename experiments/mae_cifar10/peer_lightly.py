"""lightly's MAE parts on the same data for the same minutes: the peer row of this record.

    python peer_lightly.py --data <folder with train.parquet, test.parquet> --minutes 30 --out features.npz

Built as in lightly's own MAE example (MaskedVisionTransformerTIMM + MaskedVisionTransformerDecoderTIMM), with
normalised-pixel targets, and strengthened where that costs nothing: attention written out as matrix products (faster
than SDPA in bf16 on CPU), fused AdamW, images decoded once and augmented as one batch. Warm-up and cosine follow the
elapsed share of the time budget. Only training counts; the features are extracted afterwards.
"""

import argparse
import io
import json
import math
import time

import numpy as np
import pyarrow.parquet as pq
import timm.layers
import torch
import torch.nn.functional as F
from lightly.models import utils
from lightly.models.modules import MaskedVisionTransformerDecoderTIMM, MaskedVisionTransformerTIMM
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def images_of(path: str) -> tuple[Tensor, Tensor]:
    """All images (N, 3, 32, 32) uint8 and labels (N,) of a parquet file."""
    table = pq.read_table(path)
    pixels = [np.asarray(Image.open(io.BytesIO(x)).convert("RGB")) for x in table["image"].to_pylist()]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous(), torch.tensor(table["label"].to_pylist())


def normalize(x: Tensor) -> Tensor:
    return (x.float() / 255 - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)


def augment(x: Tensor) -> Tensor:
    """RandomResizedCrop(scale 0.2..1) and flip, one draw per sample, as one grid_sample."""
    n = len(x)
    area, ratio = torch.empty(n).uniform_(0.2, 1.0), torch.empty(n).uniform_(math.log(3 / 4), math.log(4 / 3)).exp()
    w, h = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    cx, cy = (torch.rand(n) * 2 - 1) * (1 - w), (torch.rand(n) * 2 - 1) * (1 - h)
    flip = torch.where(torch.rand(n) < 0.5, -1.0, 1.0)
    zero = torch.zeros(n)
    theta = torch.stack([torch.stack([w * flip, zero, cx], 1), torch.stack([zero, h, cy], 1)], 1)
    return F.grid_sample(normalize(x), F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False)


class MAE(nn.Module):
    def __init__(self, decoder_dim: int = 128, decoder_depth: int = 2) -> None:
        super().__init__()
        vit = VisionTransformer(img_size=32, patch_size=4, embed_dim=192, depth=12, num_heads=3, num_classes=0)
        self.backbone = MaskedVisionTransformerTIMM(vit=vit)
        self.length, self.dim = self.backbone.sequence_length, decoder_dim
        self.embed = nn.Linear(192, decoder_dim)
        self.decoder = MaskedVisionTransformerDecoderTIMM(
            num_patches=64, embed_dim=decoder_dim, depth=decoder_depth, num_heads=4, mlp_ratio=4.0
        )
        self.head = nn.Linear(decoder_dim, 48)

    def forward(self, x: Tensor) -> Tensor:
        keep, mask = utils.random_token_mask(size=(len(x), self.length), mask_ratio=0.75)
        kept = self.embed(self.backbone.encode(images=x, idx_keep=keep))
        z = utils.set_at_index(kept.new_zeros(len(x), self.length, self.dim), keep, kept)
        predicted = self.head(utils.get_at_index(self.decoder(z, idx_mask=mask), mask))
        target = utils.get_at_index(utils.patchify(x, 4), mask - 1)
        return F.mse_loss(predicted.float(), F.layer_norm(target, target.shape[-1:]))

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """Mean of the patch tokens, (N, 192) float32."""
        self.eval()
        with torch.autocast("cpu", torch.bfloat16):
            return torch.cat([self.backbone.encode(images=normalize(b))[:, 1:].mean(1).float() for b in x.split(500)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--out", required=True)
    a = parser.parse_args()
    torch.manual_seed(a.seed)
    timm.layers.set_fused_attn(False)
    train, train_label = images_of(f"{a.data}/train.parquet")
    test, test_label = images_of(f"{a.data}/test.parquet")
    model = MAE()
    optimizer = torch.optim.AdamW(model.parameters(), lr=a.lr, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    model.train()
    seen, losses, start = 0, [], time.perf_counter()
    order = torch.randperm(len(train))
    while (done := (time.perf_counter() - start) / (60 * a.minutes)) < 1:
        at = seen % (len(train) // 256 * 256)
        if at == 0:
            order = torch.randperm(len(train))
        for group in optimizer.param_groups:
            group["lr"] = a.lr * min(done / 0.05, 0.5 * (1 + math.cos(math.pi * done)))
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(augment(train[order[at : at + 256]]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen += 256
        losses.append(loss.item())
        if len(losses) % 200 == 0:
            row = {"step": len(losses), "images": seen, "loss": float(np.mean(losses[-200:]))}
            print(json.dumps(row | {"images_per_s": round(seen / (time.perf_counter() - start), 1)}), flush=True)
    np.savez(
        a.out,
        train=model.features(train).numpy(), train_label=train_label.numpy(),
        test=model.features(test).numpy(), test_label=test_label.numpy(),
    )  # fmt: skip


if __name__ == "__main__":
    main()
