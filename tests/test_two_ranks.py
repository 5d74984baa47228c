"""Every method: two gloo processes, half the batch each, compute the loss and every gradient of one with all of it."""

import pytest
import torch
from ranks import on_ranks, part
from test_methods import METHODS, SMALL, build, sound, text
from timm.layers import DropPath
from torch import nn

from ssl_lab.methods.base import Method
from ssl_lab.types import Batch

SIZE, STEPS = 8, 2
EXACT = {"supervised": {"mixup": None}}  # timm's Mixup pairs the samples of one rank
EXACT |= {name: {"augment": None} for name in ("ctc", "rnnt", "audio_classification")}  # its draws belong to the rank


def made(name: str) -> Method:
    method = build(name).double()
    for attribute, value in EXACT.get(name, {}).items():
        setattr(method, attribute, value)
    for module in method.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.0  # its draws belong to the rank
    generator = torch.Generator().manual_seed(1)
    for parameter in method.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data.add_(0.1 * noise)
    return method.train()


def joined() -> Batch:
    g = torch.Generator().manual_seed(2)
    images = [torch.randn(SIZE, 3, SMALL["size"], SMALL["size"], generator=g, dtype=torch.float64) for _ in range(3)]
    batch = Batch(image=images[0], images=images[0], views=images[1:])
    batch |= Batch(target=torch.arange(SIZE) % 4, index=torch.arange(SIZE))
    texts = text(SIZE)
    texts["labels"][SIZE // 2 :, ::2] = -100  # the second rank has fewer tokens to score
    sounds = sound(SIZE)
    sounds["audio"] = sounds["audio"].double()
    return batch | sounds | texts


def share(rows: slice) -> Batch:
    return {
        key: [view[rows] for view in value] if isinstance(value, list) else value[rows]
        for key, value in joined().items()
    }


def fixed_loss(method: Method, rows: slice) -> torch.Tensor:
    """The loss of some rows of the batch, with randomness that belongs to the rows and not to the rank."""
    batch, g = share(rows), torch.Generator().manual_seed(3)
    kind = type(method).__name__.removeprefix("FSDP")
    N = (SMALL["size"] // SMALL["patch_size"]) ** 2
    if kind == "MAE":
        return method.reconstruct(batch["image"], torch.rand(SIZE, N, generator=g)[rows])[0]
    if kind == "DINOv2":
        masked = torch.rand(2, SIZE, N, generator=g) < torch.linspace(0, 0.6, SIZE)[None, :, None]
        return method.distill(batch["views"], masked[:, rows].flatten(0, 1), 0.5).loss
    if kind == "IJEPA":
        order = torch.rand(SIZE, N, generator=g).argsort(1)[rows]
        return method.predict(batch["image"], order[:, :9], order[:, 9:13].unflatten(1, (2, 2)))
    if kind == "BestRQ":
        features, valid = method.features(batch)
        noise = torch.randn(SIZE, *features.shape[1:], generator=g, dtype=features.dtype)
        hidden = torch.zeros(SIZE, features.shape[1], dtype=torch.bool)
        for row in range(SIZE):  # the second rank has more to tell
            hidden[row, 10 : 30 + 5 * row] = True
        return method.predict(features, valid, hidden[rows] & valid, noise[rows]).loss
    if kind == "Wav2Vec2":
        features, valid = method.encoder.front(batch["audio"], batch["audio_valid"])
        hidden, others = torch.zeros_like(valid), []
        for row, at in enumerate(range(rows.start, rows.stop)):  # the second rank has more to tell
            hidden[row, 2 : 8 + 2 * at] = True
            hidden &= valid
            count, before = int(hidden[row].sum()), int(hidden[:row].sum())
            others.append(before + torch.arange(count * 3).view(count, 3) * 7 % count)
        noise = -torch.empty(SIZE, valid.shape[1], 2, 64, dtype=torch.float64).exponential_(generator=g).log()
        return method.predict(features, valid, hidden, torch.cat(others), 0.5, noise[rows][hidden]).loss
    return method.step(batch, 0.5).loss


class Loss(nn.Module):
    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = method

    def forward(self, rows: slice) -> torch.Tensor:
        return fixed_loss(self.method, rows)


def trained(name: str, rows: slice, wrap=lambda module: module) -> dict[str, torch.Tensor]:
    """Loss and gradients of two steps, and all that a method keeps after them."""
    method, found = made(name), {}
    net = wrap(Loss(method))
    for step in range(STEPS):
        method.zero_grad()
        loss = net(rows)
        loss.backward()
        found[f"{step}.loss"] = loss.detach()
        for key, parameter in method.named_parameters():
            if parameter.grad is not None:
                found[f"{step}.grad.{key}"] = parameter.grad.clone()
                parameter.data.sub_(0.05 * parameter.grad)
        method.after_step(0.5)
    return found | {f"state.{key}": value.clone() for key, value in method.state_dict().items()}


def work(rank: int) -> dict[str, dict[str, torch.Tensor]]:
    return {name: trained(name, part(rank, SIZE), torch.nn.parallel.DistributedDataParallel) for name in METHODS}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of the two ranks found, by method."""
    return on_ranks(work, tmp_path_factory.mktemp("ranks"))


@pytest.mark.faults("C17", "two ranks, each method: loss and gradients of one process")
@pytest.mark.parametrize("name", METHODS)
def test_two_ranks_compute_what_one_does(ranks, name):
    one, (first, second) = trained(name, slice(0, SIZE)), (ranks[0][name], ranks[1][name])
    assert one.keys() == first.keys() == second.keys()
    for key, value in one.items():
        left, right = first[key], second[key]
        if key.endswith(".loss"):
            left = right = (left + right) / 2
        torch.testing.assert_close(left, value, rtol=1e-9, atol=1e-10, msg=lambda text, key=key: f"{key}: {text}")
        assert torch.equal(left, right), f"{key} differs between the ranks"
