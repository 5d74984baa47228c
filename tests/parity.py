"""What every parity test needs: random weights everywhere, and one way to compare."""

import torch
from torch import Tensor, nn


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter random and in float64: fresh ones hide errors, since biases are 0 and norms 1."""
    generator = torch.Generator().manual_seed(seed)
    module.double().eval()
    with torch.no_grad():
        for p in module.parameters():
            noise = 0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.copy_(noise if p.ndim > 1 else p + noise)
    return module


def gap(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference; infinite for different shapes."""
    return (a - b).abs().max().item() if a.shape == b.shape else float("inf")


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Gradient of every parameter by name, 0 where there is none."""
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in module.named_parameters()}


def images(side: int = 32, batch: int = 2, width: int | None = None) -> Tensor:
    return torch.randn(batch, 3, side, width or side, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def weigh(tokens: Tensor) -> Tensor:
    """A scalar in which every output has its own weight, so that no gradient cancels."""
    weights = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(2), dtype=tokens.dtype)
    return (tokens * weights).sum()


TINY = {
    "dim": 32,
    "depth": 2,
    "num_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "in_chans": 3,
    "mlp_ratio": 2.0,
    "cls_token": True,
    "num_registers": 0,
    "layer_scale": None,
    "qk_norm": False,
    "positions": "learned",
}
