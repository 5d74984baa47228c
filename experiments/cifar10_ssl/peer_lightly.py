"""lightly's SimCLR parts on the same data for the same minutes: a peer row of this record.

    python peer_lightly.py --data <folder with train.parquet, test.parquet> --minutes 30 --out features.npz

Its transform, projection head and NT-Xent around timm's ViT, strengthened where that costs nothing: attention written
out as matrix products (faster than SDPA in bf16 on CPU), fused AdamW, images decoded once, a worker that makes views
while the model trains. Warm-up and cosine follow the elapsed share of the time budget. Only training counts; the
features are extracted afterwards. lightly's MAE is in ../mae_cifar10.
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
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def images_of(path: str) -> tuple[np.ndarray, Tensor]:
    """All images (N, 32, 32, 3) uint8 and labels (N,) of a parquet file."""
    table = pq.read_table(path)
    pixels = [np.asarray(Image.open(io.BytesIO(x)).convert("RGB")) for x in table["image"].to_pylist()]
    return np.stack(pixels), torch.tensor(table["label"].to_pylist())


class Views(Dataset):
    """Two views of each image, by lightly's transform with the settings of its CIFAR-10 benchmark."""

    def __init__(self, images: np.ndarray) -> None:
        self.images = images
        self.transform = SimCLRTransform(input_size=32, cj_strength=0.5, gaussian_blur=0.0)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> list[Tensor]:
        return self.transform(Image.fromarray(self.images[i]))


class SimCLR(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = VisionTransformer(
            img_size=32, patch_size=4, embed_dim=192, depth=12, num_heads=3, num_classes=0, global_pool="avg"
        )
        self.head = SimCLRProjectionHead(192, 512, 128)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))

    @torch.no_grad()
    def features(self, images: np.ndarray) -> Tensor:
        """Mean of the patch tokens, (N, 192) float32."""
        self.eval()
        x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
        x = (x - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)
        with torch.autocast("cpu", torch.bfloat16):
            return torch.cat([self.backbone(b).float() for b in x.split(500)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--temperature", type=float, default=0.2)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True)
    a = parser.parse_args()
    torch.manual_seed(a.seed)
    timm.layers.set_fused_attn(False)
    train, train_label = images_of(f"{a.data}/train.parquet")
    test, test_label = images_of(f"{a.data}/test.parquet")
    model, criterion = SimCLR(), NTXentLoss(temperature=a.temperature)
    optimizer = torch.optim.AdamW(model.parameters(), lr=a.lr, weight_decay=0.05, fused=True)
    loader = DataLoader(
        Views(train), a.batch, shuffle=True, drop_last=True, num_workers=a.workers, persistent_workers=True
    )
    model.train()
    batches, losses, seen, start = iter(loader), [], 0, time.perf_counter()
    while (done := (time.perf_counter() - start) / (60 * a.minutes)) < 1:
        try:
            x1, x2 = next(batches)
        except StopIteration:
            batches = iter(loader)
            x1, x2 = next(batches)
        for group in optimizer.param_groups:
            group["lr"] = a.lr * min(done / 0.05, 0.5 * (1 + math.cos(math.pi * done)))
        with torch.autocast("cpu", torch.bfloat16):
            z1, z2 = model(x1), model(x2)
        loss = criterion(z1.float(), z2.float())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen += a.batch
        losses.append(loss.item())
        if len(losses) % 50 == 0:
            row = {"step": len(losses), "images": seen, "loss": float(np.mean(losses[-50:]))}
            print(json.dumps(row | {"images_per_s": round(seen / (time.perf_counter() - start), 1)}), flush=True)
    np.savez(
        a.out,
        train=model.features(train).numpy(), train_label=train_label.numpy(),
        test=model.features(test).numpy(), test_label=test_label.numpy(),
    )  # fmt: skip


if __name__ == "__main__":
    main()
