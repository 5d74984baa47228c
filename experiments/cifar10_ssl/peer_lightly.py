"""lightly's MAE or SimCLR parts on the same data for the same minutes: the peer rows of these records.

    python peer_lightly.py mae --data <folder with train.parquet, test.parquet> --minutes 30 --out features.npz

MAE is built as in lightly's own example (MaskedVisionTransformerTIMM + MaskedVisionTransformerDecoderTIMM) with
normalised-pixel targets, SimCLR from its transform, projection head and NT-Xent. Both are strengthened where that costs
nothing: attention written out as matrix products (faster than SDPA in bf16 on CPU), fused AdamW, images decoded once,
MAE's augmentation as one batch, a worker that makes SimCLR's views. Warm-up and cosine follow the elapsed share of the
budget: --minutes, or --images where another job uses the machine. Only training counts; features are extracted later.
"""

import argparse
import io
import json
import math
import time
from collections.abc import Iterator

import numpy as np
import pyarrow.parquet as pq
import timm.layers
import torch
import torch.nn.functional as F
from lightly.loss import NTXentLoss
from lightly.models import utils
from lightly.models.modules import (
    MaskedVisionTransformerDecoderTIMM,
    MaskedVisionTransformerTIMM,
    SimCLRProjectionHead,
)
from lightly.transforms import SimCLRTransform
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import to_pil_image

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH = 256


def vit(**settings: object) -> VisionTransformer:
    """ViT-Ti with patches of 4 pixels."""
    return VisionTransformer(img_size=32, patch_size=4, embed_dim=192, depth=12, num_heads=3, num_classes=0, **settings)


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
    betas = (0.9, 0.95)

    def __init__(self, decoder_dim: int = 128, decoder_depth: int = 2) -> None:
        super().__init__()
        self.backbone = MaskedVisionTransformerTIMM(vit=vit())
        self.length, self.dim = self.backbone.sequence_length, decoder_dim
        self.embed = nn.Linear(192, decoder_dim)
        self.decoder = MaskedVisionTransformerDecoderTIMM(
            num_patches=64, embed_dim=decoder_dim, depth=decoder_depth, num_heads=4, mlp_ratio=4.0
        )
        self.head = nn.Linear(decoder_dim, 48)

    def batches(self, train: Tensor) -> Iterator[Tensor]:
        while True:
            order = torch.randperm(len(train))
            yield from (augment(train[rows]) for rows in order[: len(train) // BATCH * BATCH].split(BATCH))

    def forward(self, x: Tensor) -> Tensor:
        keep, mask = utils.random_token_mask(size=(len(x), self.length), mask_ratio=0.75)
        kept = self.embed(self.backbone.encode(images=x, idx_keep=keep))
        z = utils.set_at_index(kept.new_zeros(len(x), self.length, self.dim), keep, kept)
        predicted = self.head(utils.get_at_index(self.decoder(z, idx_mask=mask), mask))
        target = utils.get_at_index(utils.patchify(x, 4), mask - 1)
        return F.mse_loss(predicted.float(), F.layer_norm(target, target.shape[-1:]))

    def tokens(self, x: Tensor) -> Tensor:
        return self.backbone.encode(images=x)[:, 1:]


class Views(Dataset):
    """Two views of each image, by lightly's transform with the settings of its CIFAR-10 benchmark."""

    def __init__(self, images: Tensor) -> None:
        self.images = images
        self.transform = SimCLRTransform(input_size=32, cj_strength=0.5, gaussian_blur=0.0)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> list[Tensor]:
        return self.transform(to_pil_image(self.images[i]))


class SimCLR(nn.Module):
    betas = (0.9, 0.999)

    def __init__(self) -> None:
        super().__init__()
        self.backbone = vit(global_pool="avg")
        self.head, self.criterion = SimCLRProjectionHead(192, 512, 128), NTXentLoss(temperature=0.2)

    def batches(self, train: Tensor) -> Iterator[list[Tensor]]:
        loader = DataLoader(Views(train), BATCH, shuffle=True, drop_last=True, num_workers=1, persistent_workers=True)
        while True:
            yield from loader

    def forward(self, views: list[Tensor]) -> Tensor:
        z1, z2 = (self.head(self.backbone(view)) for view in views)
        return self.criterion(z1.float(), z2.float())

    def tokens(self, x: Tensor) -> Tensor:
        return self.backbone.forward_features(x)[:, 1:]


@torch.no_grad()
def features(model: MAE | SimCLR, x: Tensor) -> np.ndarray:
    """Mean of the patch tokens, (N, 192) float32."""
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        return torch.cat([model.tokens(normalize(b)).mean(1).float() for b in x.split(500)]).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("method", choices=["mae", "simclr"])
    parser.add_argument("--data", required=True)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--images", type=int, help="the budget, instead of --minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--out", required=True)
    a = parser.parse_args()
    torch.manual_seed(a.seed)
    timm.layers.set_fused_attn(False)
    train, train_label = images_of(f"{a.data}/train.parquet")
    test, test_label = images_of(f"{a.data}/test.parquet")
    model = MAE() if a.method == "mae" else SimCLR()
    optimizer = torch.optim.AdamW(model.parameters(), lr=a.lr, betas=model.betas, weight_decay=0.05, fused=True)
    model.train()
    losses, seen, start = [], 0, time.perf_counter()
    for batch in model.batches(train):
        seconds = time.perf_counter() - start
        if (done := seen / a.images if a.images else seconds / (60 * a.minutes)) >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = a.lr * min(done / 0.05, 0.5 * (1 + math.cos(math.pi * done)))
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen += BATCH
        losses.append(loss.item())
        if len(losses) % 50 == 0:
            row = {"step": len(losses), "images": seen, "loss": float(np.mean(losses[-50:]))}
            print(json.dumps(row | {"images_per_s": round(seen / (time.perf_counter() - start), 1)}), flush=True)
    np.savez(
        a.out,
        train=features(model, train), train_label=train_label.numpy(),
        test=features(model, test), test_label=test_label.numpy(),
    )  # fmt: skip


if __name__ == "__main__":
    main()
