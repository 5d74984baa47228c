"""Training in float8 (Micikevicius et al., 2022, arXiv:2209.05433): the linear maps of blocks, converted by torchao.

Each factor of a product is scaled by its largest number and rounded to 8 bits just before (dynamic scaling); weights,
gradients and optimizer state stay what they are. Names in a state dict do not change.
"""

import logging
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import nn

from ssl_lab.errors import UserError
from ssl_lab.nn.block import Block
from ssl_lab.nn.linear import Linear

M = TypeVar("M", bound=nn.Module)
Recipe = Literal["tensorwise", "rowwise"]
_WIDTH = 16  # widths must be multiples of this, for the product in hardware
_CAPABILITY = (8, 9)  # of the first NVIDIA GPUs that multiply in float8
_PRECISIONS = ("bf16-mixed", "bf16-true")


@dataclass(frozen=True)
class Float8:
    """Called with a network, it converts in place the linear maps of every `Block` that learn.

    Ours alone (`ssl_lab.nn.linear.Linear`), with both widths multiples of 16: projections of attention and feed-forward
    networks. What takes no gradient stays as it is, since only the one product of its forward pass would gain, and the
    targets of a teacher would get coarser. So do low-rank updates and adapters, which are too narrow, and routed
    experts and their router, which are no such maps. Embeddings, heads and patch projections lie outside of blocks.

    Args:
        recipe: one scale per tensor, or one per row: finer, and slower.
        emulate: round to float8, but multiply in float32: runs on any device, slowly, for tests.

    Raises:
        UserError: another recipe.
    """

    recipe: Recipe = "tensorwise"
    emulate: bool = False

    def __post_init__(self) -> None:
        if self.recipe not in get_args(Recipe):
            raise UserError(f"float8={self.recipe}: choose {', '.join(get_args(Recipe))} or null")

    def __call__(self, network: nn.Module) -> None:
        """Convert; what is converted stays so.

        Raises:
            UserError: torchao is missing.
        """
        chosen = {id(layer) for layer in learning(network) if _fits(layer)}
        if not chosen:
            return
        float8, ours = _torchao(self.recipe)
        config = float8.Float8LinearConfig.from_recipe_name(self.recipe)
        # the gradient of a weight sums over tokens, whose number need not be a multiple of 16
        config = replace(config, emulate=self.emulate, pad_inner_dim=True)
        float8.convert_to_float8_training(network, module_filter_fn=lambda layer, _: id(layer) in chosen, config=config)
        for layer in network.modules():
            if type(layer) is ours.Float8Linear:
                layer.__class__ = ours.Float8Map  # as `fully_shard` does with a module

    def require(self, network: nn.Module, device: torch.device, precision: str) -> None:
        """Check before training that it can be done; `precision` in Lightning's words.

        Raises:
            UserError: the device cannot, the precision is another, nothing is there to convert, or torchao is missing.
        """
        key = f"float8={self.recipe}"
        if not self.emulate:
            need = f"{key} needs an NVIDIA GPU of compute capability {_dotted(_CAPABILITY)} or more (Ada, Hopper)"
            if device.type != "cuda":
                raise UserError(f"{need}, and this run is on {device.type}: leave float8 out")
            if (found := torch.cuda.get_device_capability(device)) < _CAPABILITY:
                raise UserError(f"{need}, and this one has {_dotted(found)}: leave float8 out")
        if precision not in _PRECISIONS:
            raise UserError(f"{key} stands beside bfloat16, not trainer.precision={precision}: choose {_PRECISIONS[0]}")
        if not any(_fits(layer) for layer in learning(network)):
            raise UserError(
                f"{key}: no block has a linear map that learns with widths that are multiples of {_WIDTH}; leave it out"
            )
        _torchao(self.recipe)

    def told(self, network: nn.Module) -> str:
        """How much of a network, not yet converted, will be."""
        layers = learning(network)
        return f"{self.recipe}, {sum(map(_fits, layers))} of {len(layers)} linear maps in blocks"


def learning(network: nn.Module) -> list[Linear]:
    """Linear maps in blocks that take a gradient, without those that a tuning has put beside others."""
    found: dict[Linear, None] = {}
    for block in network.modules():
        if isinstance(block, Block):
            beside = {m for part in block.modules() if hasattr(type(part), "beside") for m in part.modules()}
            layers = (m for m in block.modules() if type(m) is Linear and m not in beside)
            found |= dict.fromkeys(layer for layer in layers if layer.weight.requires_grad)
    return list(found)


def ordinary_(network: M) -> M:
    """Undo the conversion, in place: for what is trained or exported outside of the run; gives the network."""
    for layer in network.modules():
        if isinstance(layer, Linear) and (before := getattr(type(layer), "before_float8", None)) is not None:
            layer.__class__ = before
    return network


def _fits(layer: Linear) -> bool:
    return layer.in_features % _WIDTH == 0 and layer.out_features % _WIDTH == 0


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def _torchao(recipe: str) -> tuple[Any, Any]:
    """The modules `torchao.float8` and our `float8_linear`, without the notice that torch prints on import."""
    notices = logging.getLogger("torch.utils._pytree")
    level = notices.level
    notices.setLevel(logging.ERROR)
    try:
        import torchao.float8

        from ssl_lab.nn import float8_linear
    except ImportError as error:
        raise UserError(f"float8={recipe} needs torchao: pip install 'ssl-lab[fp8]'") from error
    finally:
        notices.setLevel(level)
    return torchao.float8, float8_linear
