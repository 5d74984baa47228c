"""What the published recipes resolve to at their own batch size, against numbers written down from the papers."""

import math
import re

import pytest
import torch
from lightning.pytorch.plugins import TorchSyncBatchNorm
from omegaconf import OmegaConf

from ssl_lab.backbones.timm import Timm
from ssl_lab.cli import catalog
from ssl_lab.cli.compose import build, compose
from ssl_lab.cli.duration import steps_of
from ssl_lab.errors import UserError
from ssl_lab.schedules import as_schedule

CONF = catalog.conf_folder()
IMAGENET = 1_281_167
CIFAR = 50_000

# batch, epochs, warm-up epochs, lr at its peak and at the end, weight decay at start and end, what decays
TRAINING = {
    "mae_in1k": (4096, 800, 40, 2.4e-3, 0, 0.05, 0.05, "matrices"),
    "simclr_in1k": (4096, 1000, 10, 4.8, 0, 1e-6, 1e-6, "matrices"),
    "moco_v1_in1k": (256, 200, 0, 0.03, 0.0003, 1e-4, 1e-4, "all"),
    "moco_v2_in1k": (256, 200, 0, 0.03, 0, 1e-4, 1e-4, "all"),
    "moco_v3_in1k": (4096, 300, 40, 2.4e-3, 0, 0.1, 0.1, "all"),
    "dino_in1k": (512, 100, 10, 1e-3, 1e-6, 0.04, 0.4, "matrices"),
    "dinov2_in1k": (2048, None, None, 0.004 * math.sqrt(2), 1e-6, 0.04, 0.4, "matrices"),
    "ijepa_in1k": (2048, 300, 40, 1e-3, 1e-6, 0.04, 0.4, "matrices"),
    "simclr_cifar10_r18": (256, 1000, 10, 0.4, 0, 1e-4, 1e-4, "matrices"),
    "moco_cifar10_r18": (256, 1000, 10, 0.3, 0, 1e-4, 1e-4, "all"),
    "moco_v3_cifar10_r18": (256, 1000, 10, 0.3, 0, 1e-6, 1e-6, "matrices"),
    "dino_cifar10_r18": (256, 1000, 10, 0.3, 0, 1e-6, 1e-6, "matrices"),
}
# method's schedules: value at the start and at the end
MOVING = {
    "moco_v1_in1k": {"momentum": (0.999, 0.999)},
    "moco_v2_in1k": {"momentum": (0.999, 0.999)},
    "moco_v3_in1k": {"momentum": (0.99, 1)},
    "dino_in1k": {"momentum": (0.996, 1), "teacher_temperature": (0.04, 0.04)},
    "dinov2_in1k": {"momentum": (0.992, 1), "teacher_temperature": (0.04, 0.07)},
    "ijepa_in1k": {"momentum": (0.996, 1)},
    "moco_cifar10_r18": {"momentum": (0.99, 0.999)},
    "moco_v3_cifar10_r18": {"momentum": (0.99, 1)},
    "dino_cifar10_r18": {"momentum": (0.9995, 1), "teacher_temperature": (0.07, 0.07)},
}
RRC, BYOL = "data.views.both.scale", "data.views.first"
FIXED = {
    "simclr_in1k": {"method.temperature": 0.1, "method.projection": 128, RRC: [0.08, 1], "optim.name": "lars"},
    "moco_v1_in1k": {
        "method.head": [128],
        "method.temperature": 0.07,
        "method.queue_size": 65536,
        "method.encoder.zero_init_last": False,
        "data.views.both.jitter": [0.4, 0.4, 0.4, 0.4],
        "data.views.both.jitter_p": 1,
        "optim.name": "sgd",
        "optim.schedule": "step",
    },
    "moco_v2_in1k": {
        "method.head": [2048, 128],
        "method.temperature": 0.2,
        "method.queue_size": 65536,
        "data.views.both.blur_p": 0.5,
        "optim.name": "sgd",
        "optim.schedule": "cosine",
    },
    "moco_v3_in1k": {
        "method.encoder.num_heads": 12,
        "method.encoder.dim": 384,
        "method.encoder.depth": 12,
        "method.encoder.positions": "sincos",
        "method.hidden": 4096,
        "method.projection": 256,
        "method.temperature": 0.2,
        f"{BYOL}.scale": [0.08, 1],
    },
    "dino_in1k": {
        "method.encoder.num_heads": 6,
        "method.encoder.drop_path": 0.1,
        "method.head.prototypes": 65536,
        "method.clip": 3,
        "method.freeze_prototypes": 0.01,
        f"{BYOL}.scale": [0.4, 1],
        "data.views.local.count": 8,
    },
    "dinov2_in1k": {
        "method.encoder.dim": 1024,
        "method.encoder.depth": 24,
        "method.encoder.num_registers": 0,
        "method.encoder.drop_path": 0.3,
        "method.encoder.block.layer_scale": 1e-5,
        "method.koleo_weight": 0.1,
        "method.mask_ratio": [0.1, 0.5],
        "method.clip": 3,
        "optim.layer_decay": 0.9,
        "optim.patch_lr": 0.2,
        f"{BYOL}.scale": [0.32, 1],
        "data.views.local.scale": [0.05, 0.32],
    },
    "ijepa_in1k": {
        "method.encoder.dim": 1280,
        "method.encoder.patch_size": 14,
        "method.encoder.cls_token": False,
        "method.predictor.dim": 384,
        "method.predictor.depth": 12,
        "method.predictor.num_heads": 16,
        "method.masks.min_keep": 10,
        "data.views.scale": [0.3, 1],
        "data.views.hflip": 0,
    },
    "simclr_cifar10_r18": {"method.projection": 256, "method.temperature": 0.2, "optim.name": "larc"},
    "moco_cifar10_r18": {"method.queue_size": 32768, "method.temperature": 0.2, "optim.name": "sgd"},
    "moco_v3_cifar10_r18": {"method.temperature": 0.2, "optim.name": "larc"},
    "dino_cifar10_r18": {"method.head.prototypes": 4096, "optim.name": "larc", "method.clip": None},
}


def experiment(name):
    return compose("train", [f"experiment={name}", *(["data.path=x"] if "path" in name else [])], [CONF])


def said(name, field):
    return next(e for e in catalog.experiments([CONF]) if e.name == name).fields[field]


def global_batch(name, cfg):
    """From the hardware that the head comment names; what the configuration says must be the same."""
    gpus, each = re.match(r"(\d+) GPUs? x (\d+)", said(name, "hardware") + " x 256").groups()
    assert int(each) == cfg.data.batch_size
    assert cfg.trainer.num_nodes == max(1, int(gpus) // 8)
    assert ("strategies.DDPStrategy" in str(cfg.trainer.strategy)) == (int(gpus) > 1)
    return int(gpus) * cfg.data.batch_size


@pytest.mark.parametrize("name", TRAINING)
def test_rates_decay_and_length(name):
    batch, epochs, warm_epochs, peak, end, decay_0, decay_1, decays = TRAINING[name]
    cfg = experiment(name)
    assert global_batch(name, cfg) == batch
    num_train = CIFAR if "cifar" in name else IMAGENET
    steps = steps_of(cfg.duration, batch, num_train)
    if epochs is None:  # DINOv2's epochs are 1,250 steps, whatever the data
        epochs, warm_epochs, num_train = 100, 10, 1250 * batch
    assert steps * batch / num_train == pytest.approx(epochs, abs=0.01)
    optim = build(cfg.optim)
    assert optim.peak_lr(batch) == pytest.approx(peak)
    assert optim.peak_lr(batch) * optim.lr_factor(1.0) == pytest.approx(end, rel=1e-6, abs=1e-12)
    assert optim.warmup * epochs == pytest.approx(warm_epochs, abs=1e-5)
    assert optim.lr_factor(optim.warmup) == pytest.approx(1)
    layer = torch.nn.Linear(2, 2)
    optimizer = optim.build(layer.named_parameters(), batch)
    for progress, value in ((0.0, decay_0), (1.0, decay_1)):
        optim.update(optimizer, progress)
        found = {p: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
        assert found[layer.weight] == pytest.approx(value)
        assert found[layer.bias] == (pytest.approx(value) if decays == "all" else 0)


def test_beta_and_momentum_of_the_optimizers():
    betas = {name: tuple(build(experiment(name).optim).betas) for name in TRAINING}
    assert betas.pop("mae_in1k") == (0.9, 0.95)
    assert set(betas.values()) == {(0.9, 0.999)}


@pytest.mark.parametrize("name", MOVING)
def test_what_the_method_moves(name):
    cfg = experiment(name)
    assert cfg.method.momentum_batch is None  # at the paper's batch nothing is scaled
    for key, ends in MOVING[name].items():
        node = cfg.method.get(key)
        schedule = as_schedule(build(node) if OmegaConf.is_config(node) else node)
        assert [schedule(p) for p in (0.0, 1.0)] == pytest.approx(list(ends))


@pytest.mark.parametrize("name", FIXED)
def test_numbers_of_method_and_views(name):
    cfg = experiment(name)
    for key, value in FIXED[name].items():
        found = OmegaConf.select(cfg, key)
        assert (list(found) if isinstance(value, list) else found) == value, key


def test_batch_norms_of_simclr_are_global_and_those_of_moco_are_not():
    """MoCo shuffles instead; the projectors' norms are global by themselves."""
    assert experiment("simclr_in1k").trainer.sync_batchnorm is True
    assert not any(experiment(f"moco_v{n}_in1k").trainer.get("sync_batchnorm") for n in (1, 2, 3))


def test_global_batch_norms_keep_the_names_of_a_checkpoint():
    method = build(compose("train", ["experiment=simclr_in1k", "backbone=resnet18", "method.hidden=8"], [CONF]).method)
    names = list(method.state_dict())
    method = TorchSyncBatchNorm().apply(method)
    assert list(method.state_dict()) == names
    norms = [m for m in method.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == 22 and {type(m) for m in norms} == {torch.nn.SyncBatchNorm}


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("dino_in1k", [224] * 2 + [96] * 8),
        ("dino_64px", [64] * 2 + [32] * 6),
        ("dino_imagenette", [160] * 2 + [64] * 6),
        ("moco_v3_imagenette", [160] * 2),
        ("simclr_stl10_64px", [64] * 2),
        ("dino_cifar10_r18", [32] * 2),
        ("moco_v1_in1k", [224] * 2),
    ],
)
def test_views_have_sizes_that_patches_divide(name, sizes):
    cfg = compose("train", [f"experiment={name}", "data.path=x"], [CONF])
    assert build(cfg.data.views).sizes == sizes
    assert all(size % cfg.method.encoder.get("patch_size", 1) == 0 for size in sizes)


@pytest.mark.parametrize("name", [n for n in TRAINING if "cifar10_r18" in n])
def test_resnet_18_keeps_small_images_large(name):
    """Strides of the three later stages alone: 32 px end as 4 x 4, and the function of timm's layers is untouched."""
    torch.manual_seed(0)
    encoder = build(experiment(name).method.encoder).eval()
    out = encoder(torch.randn(2, 3, 32, 32))
    assert out.tokens.shape == (2, 16, 512)
    assert encoder.model.conv1.weight.shape == (64, 3, 3, 3)
    assert encoder.model.conv1.weight.std().item() == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.05)


def test_a_small_stem_survives_a_file_and_is_refused_elsewhere(tmp_path):
    from ssl_lab.weights import io

    model = Timm("resnet18", small_stem=True).eval()
    io.save(model, tmp_path / "a.safetensors")
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(io.build(tmp_path / "a.safetensors").eval()(x).tokens, model(x).tokens)
    for other in ("convnext_atto", "resnet26d"):
        with pytest.raises(UserError, match=f"small_stem=true is for ResNets.*{other}"):
            Timm(other, small_stem=True)
    with pytest.raises(UserError, match=r"method\.encoder\.num_heads=null"):
        Timm("resnet18", num_heads=3)


@pytest.mark.parametrize("name", [e.name for e in catalog.experiments([CONF])])
def test_every_recipe_says_what_it_needs_and_what_came_of_it(name):
    fields = next(e for e in catalog.experiments([CONF]) if e.name == name).fields
    assert set(fields) == set(catalog.FIELDS)
    if name.endswith("_in1k"):
        assert fields["time"] == "not run here"
