"""What every method must satisfy, found by its YAML in conf/method: a new one is tested by existing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from ssl_lab.backbones.timm import Timm
from ssl_lab.backbones.vit import ViT
from ssl_lab.cli.catalog import conf_folder
from ssl_lab.cli.compose import build as instantiate
from ssl_lab.cli.compose import compose
from ssl_lab.errors import UserError
from ssl_lab.methods.base import Method
from ssl_lab.methods.dinov2 import DINOv2
from ssl_lab.methods.mae import MAE
from ssl_lab.nn.block import Block
from ssl_lab.nn.prompt import Prompts
from ssl_lab.rng import seed_all
from ssl_lab.train.optim import Optim
from ssl_lab.types import Batch, Embeds

METHODS = sorted(p.stem for p in (Path(__file__).parent.parent / "conf/method").glob("*.yaml"))
# A gain of 1e-5 opens over thousands of steps; these tests have dozens.
SMALL = {
    "layer_scale": 1.0, "dim": 32, "depth": 2, "num_heads": 4, "patch_size": 8, "image_size": 32, "size": 32,
    "vocab_size": 64, "max_length": 32, "dropout": 0.0, "num_classes": 4, "start_token": 0, "embed_dim": 32,
    "sampling_rate": 8000, "num_mels": 16, "channels": 16, "negatives": 10, "image_token": 5,
}  # fmt: skip

FROM_SCRATCH = {"flamingo": {"train": ["connector", "vision", "decoder"]}}  # here it cannot lean on a trained model


def shrink(node: Any) -> Any:
    """The same recipe at toy size: widths, depths and whatever else is large."""
    if isinstance(node, dict):
        return {k: SMALL[k] if k in SMALL else shrink(v) for k, v in node.items()}
    if isinstance(node, list):
        return [shrink(v) for v in node]
    return 64 if isinstance(node, int) and not isinstance(node, bool) and node > 256 else node


def build(name: str, seed: int = 0) -> Method:
    cfg = compose("train", [f"method={name}"], [conf_folder()])  # with the data that it chooses itself
    small = shrink(OmegaConf.to_container(cfg.method, resolve=True))
    torch.manual_seed(seed)
    method = instantiate(small | FROM_SCRATCH.get(name, {}))
    with torch.no_grad():
        for parameter in (p for n, p in method.named_parameters() if n.endswith(".gate")):
            parameter.fill_(0.5)  # a closed one lets no gradient past
    return method


def text(size: int = 8, vocab_size: int = 64, length: int = 16) -> Batch:
    """Rows of unequal length in two parts; a row of class c holds many tokens c + 1, and its answer begins at c + 1."""
    generator = torch.Generator().manual_seed(0)
    tokens, labels = torch.randint(8, vocab_size, (2, size, length), generator=generator)
    target = torch.arange(size) % 4
    tokens = torch.where(torch.rand(size, length, generator=generator) < 0.3, target[:, None] + 1, tokens)
    tokens[:, 0] = SMALL["image_token"]  # of no class, and drawn nowhere else
    at = torch.arange(length).expand(size, length)
    valid = at < length - torch.arange(size)[:, None] % 5
    second = (at >= length // 2).long()
    other = torch.where(at == 0, tokens, (tokens - 1) % (vocab_size - 8) + 8)  # and a worse answer
    return Batch(
        rejected=other.where(valid, 0),
        rejected_labels=labels.flip(0).where(valid, -100),
        rejected_valid=valid,
        tokens=tokens.where(valid, 0),
        labels=labels.where(valid, -100),
        valid=valid,
        types=second,
        span=torch.stack([target + 1, target + 2], 1),
    )


def sound(size: int = 8) -> Batch:
    """Clips of 1.1 to 1.5 s at 8 kHz: in noise a tone that belongs to the class, and steps upwards each 0.2 s."""
    generator = torch.Generator().manual_seed(0)
    at, length = torch.arange(12000), 12000 - 800 * (torch.arange(size)[:, None] % 5)
    pitch = (300 + 500 * (torch.arange(size)[:, None] % 4)) * (1 + 0.5 * (at // 1600 % 3))
    tone = torch.sin(at / 8000 * 2 * torch.pi * pitch)
    audio = 0.3 * tone + 0.03 * torch.randn(size, 12000, generator=generator)
    return Batch(audio=audio * (at < length), audio_valid=at < length)


def batch(size: int = 8) -> Batch:
    """What every method finds something in: images, views, sounds and texts."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(size, 3, 4, 4, generator=generator).repeat_interleave(8, 2).repeat_interleave(8, 3)
    image = image + 0.1 * torch.randn(size, 3, 32, 32, generator=generator)
    views = [image + 0.1 * torch.randn(image.shape, generator=generator) for _ in range(2)]
    return (
        Batch(image=image, images=image, views=views, target=torch.arange(size) % 4, index=torch.arange(size))
        | sound(size)
        | text(size)
    )


@pytest.fixture(params=METHODS)
def method(request) -> Method:
    return build(request.param)


def run(method: Method, steps: int, lr: float = 3e-3, *, teacher_moves: bool = True) -> list[float]:
    optim = Optim(lr=lr, warmup=0.1)
    optimizer, losses = optim.build(method.param_groups(), 8), []
    method.train()
    for i in range(steps):
        seed_all(i)
        step = method.step(batch(), i / steps)
        optimizer.zero_grad()
        step.loss.backward()
        method.after_backward(i / steps)
        optim.update(optimizer, (i + 1) / (steps + 1))
        optimizer.step()
        if teacher_moves:
            method.after_step(i / steps)
        # Distillation: below its teacher's entropy a loss cannot fall.
        losses.append(float(step.logs.get("kl", step.loss.detach())))
    return losses


def test_the_loss_is_a_finite_scalar_and_logs_are_scalars(method):
    step = method.step(batch(), 0.5)
    assert step.loss.shape == () and torch.isfinite(step.loss)
    for name, value in step.logs.items():
        assert torch.as_tensor(value).numel() == 1, name


def test_a_gradient_reaches_every_trainable_parameter(method):
    for i in range(2):  # gates and gains that start at zero open after one step
        seed_all(i)
        method.zero_grad()
        method.step(batch(), 0.5).loss.backward()
    frozen = [n for n, p in method.named_parameters() if not p.requires_grad and p.grad is not None]
    without = [
        n for n, p in method.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.abs().sum())
    ]
    assert not frozen and not without


def test_a_step_is_a_function_of_its_seed(method):
    losses = []
    for _ in range(2):
        seed_all(3)
        losses.append(method.step(batch(), 0.5).loss.item())
    assert losses[0] == losses[1]


def test_the_loss_falls_on_eight_samples(method):
    # A teacher that moves takes the aim along: hold it still.
    losses = run(method, 60, teacher_moves=False)
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def test_embeddings_do_not_collapse(method):
    if not isinstance(method, Embeds):
        pytest.skip("no embed")
    run(method, 30)
    method.eval()
    with torch.no_grad():
        z = torch.nn.functional.normalize(method.embed(batch()), dim=-1)
    assert z.shape[0] == 8 and z.std(0).mean() * z.shape[1] ** 0.5 > 0.05


def test_it_is_made_of_blocks_and_bf16_autocast_gives_nearly_the_same(method):
    assert any(isinstance(m, Block) for m in method.modules())
    run(method, 20)  # at the beginning class tokens are nearly alike, and batch norms magnify what is left
    seed_all(0)
    exact = method.step(batch(), 0.5).loss
    seed_all(0)
    with torch.autocast("cpu", torch.bfloat16):
        half = method.step(batch(), 0.5).loss
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact, rtol=2e-2, atol=2e-2)


RECIPES = {"simclr": "simclr", "moco": "moco_v2", "moco_v3": "byol", "dino": "dino", "dinov2": "dinov2"}


@pytest.mark.parametrize("name", RECIPES)
def test_other_views_than_a_method_needs(name):
    method, (a, b) = build(name), batch()["views"]
    with pytest.raises(UserError, match=f"views@data.views={RECIPES[name]}"):
        method.step(Batch(image=a), 0.5)
    with pytest.raises(UserError, match=f"got 1 views.*views@data.views={RECIPES[name]}"):
        method.step(Batch(views=[a]), 0.5)
    if name in ("simclr", "moco", "moco_v3"):  # which pair up two
        with pytest.raises(UserError, match=f"got 4 views and needs 2.*views@data.views={RECIPES[name]}"):
            method.step(Batch(views=[a, b, a, b]), 0.5)
    if name in ("simclr", "dinov2"):  # they see both at once
        with pytest.raises(UserError, match="32 x 32, 16 x 16 px"):
            method.step(Batch(views=[a, b[..., :16, :16]]), 0.5)


def test_mae_masks_the_image_that_comes():
    method, image = build("mae"), batch()["image"]
    for other in (image[..., :16, :16], torch.cat([image, image], 2)):
        for use in (method.pictures, lambda got: method.step(got, 0.5)):
            with pytest.raises(UserError, match=r"px.* 32 x 32 px.*data\.image_size"):
                use(Batch(image=other))
    with pytest.raises(UserError, match=r"views@data\.views=crop"):
        method.step(Batch(views=[image]), 0.5)


@pytest.mark.parametrize("name", ["mae", "dinov2"])
def test_what_hides_patches_needs_a_vit(name):
    with pytest.raises(UserError, match="our ViT alone can"):
        (MAE if name == "mae" else DINOv2)(Timm("resnet10t"))


@pytest.mark.parametrize("share", [0.0, -0.5, 1.0, 1.5])
def test_mae_sees_and_hides_some_patches(share):
    with pytest.raises(UserError, match=rf"mask_ratio={share} of 16 patches"):
        MAE(ViT(32, 1, 2, image_size=32, patch_size=8), mask_ratio=share)


@pytest.mark.parametrize("name", ["moco", "moco_v3", "dino", "dinov2", "ijepa"])
def test_the_teacher_of_a_frozen_encoder_stays(name):
    method = build(name)
    before = [p.clone() for p in method.encoder.parameters()]
    for part in method.parameters():
        part.requires_grad_(False)
    method.after_step(0.5)
    assert all(torch.equal(a, b) for a, b in zip(before, method.encoder.parameters(), strict=True))


def test_one_image_has_no_batch_statistics():
    method, views = build("moco_v3"), [view[:1] for view in batch()["views"]]
    with pytest.raises(UserError, match=r"data\.batch_size to at least 2"):
        method.step(Batch(views=views), 0.5)


def test_mae_takes_a_prompt():
    method = build("mae")
    Prompts(length=3)(method)
    method.step(batch(), 0.5).loss.backward()
    assert method.encoder.registers.grad.abs().sum() > 0
