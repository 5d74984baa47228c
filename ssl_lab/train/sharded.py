"""FSDP2: parameters, gradients and optimizer state divided among the ranks, block by block.

torch's `fully_shard` (the successor of Zhao et al., 2023, arXiv:2304.11277) gathers the weights of a block for its
forward and backward only. Checkpoints are what the other strategies write: whole tensors, in one file of rank 0.
"""

import contextlib
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from ssl_lab.errors import UserError
from ssl_lab.nn.block import Block

_OPTIMIZERS = (torch.optim.AdamW, torch.optim.SGD)  # element by element: a shard is enough for them


class Sharded(ModelParallelStrategy):
    """Lightning's strategy of sharded modules, with the lab's checkpoints.

    Not Lightning's own gathering: it makes the state of a fresh optimizer by a step on zeros, which counts as one.

    Args:
        timeout: how long ranks wait for one that died.
    """

    def __init__(self, timeout: timedelta = timedelta(minutes=10)) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, timeout=timeout)

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup(self, trainer: L.Trainer) -> None:
        """Shard the method, then make its optimizer.

        Raises:
            UserError: it holds what cannot be divided: single numbers, an average of weights, another optimizer.
        """
        assert self.model is not None
        if any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            raise UserError("ema= keeps whole copies of the weights and does not go with strategy=fsdp2; leave one out")
        shard_(self.model, self.device_mesh["data_parallel"])
        super().setup(trainer)
        for optimizer in self.optimizers:
            if not isinstance(optimizer, _OPTIMIZERS):
                raise UserError(
                    f"strategy=fsdp2 does not go with {type(optimizer).__name__}, which looks at whole matrices: "
                    "choose optim.name=adamw or sgd, or strategy=ddp"
                )

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole tensors on rank 0, nothing elsewhere; every rank must ask."""
        assert self.model is not None
        return self._kept({name: whole(value) for name, value in self.model.state_dict().items()})

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.model is not None
        own = self.model.state_dict()
        divided = {name: like(value, own[name]) for name, value in checkpoint["state_dict"].items() if name in own}
        rest = {name: value for name, value in checkpoint["state_dict"].items() if name not in own}
        self.model.load_state_dict(divided | rest, strict=strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """As `lightning_module_state_dict`, in the form of the optimizer's own `state_dict`."""
        state = (optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer).state_dict()
        held = {
            i: {name: whole(x) if isinstance(x, Tensor) else x for name, x in one.items()}
            for i, one in state["state"].items()
        }
        return self._kept(state | {"state": held})

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            names = [i for group in state["param_groups"] for i in group["params"]]
            owners = [p for group in optimizer.param_groups for p in group["params"]]
            owner = dict(zip(names, owners, strict=True))
            held = {
                i: {name: like(x, owner[i]) if isinstance(x, Tensor) else x for name, x in one.items()}
                for i, one in state["state"].items()
            }
            optimizer.load_state_dict(state | {"state": held})

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)

    def on_train_end(self) -> None:
        """Training went well: what follows finds an ordinary method with all of its weights on every rank."""
        assert self.model is not None
        restore_(self.model)

    def _kept(self, state: dict[str, Any]) -> dict[str, Any]:
        return state if self.is_global_zero else {}


def shard_(method: nn.Module, mesh: DeviceMesh) -> None:
    """Divide every `Block` of `method`, then what is left of it, over `mesh`; `training_step` gathers the latter.

    Raises:
        UserError: a parameter without dimensions.
    """
    if scalars := [name for name, p in method.named_parameters() if p.ndim == 0]:
        raise UserError(
            f"strategy=fsdp2 cannot divide {scalars[0]}, a single number: train this method with strategy=ddp"
        )
    for module in method.modules():
        if isinstance(module, Block):
            fully_shard(module, mesh=mesh)
    fully_shard(method, mesh=mesh)
    register_fsdp_forward_method(method, "training_step")


@contextlib.contextmanager
def gathered(method: nn.Module) -> Iterator[None]:
    """All weights on every rank meanwhile, so that any rank may call any part of a sharded method by itself.

    Between two training steps; every rank must enter. Anything else than a sharded method stays as it is.
    """
    parts = [module for module in method.modules() if isinstance(module, FSDPModule)]
    # The hooks keep an order of forwards, which a rank that has more of them than the others would have alone.
    hooks = [held for part in parts for held in (part._forward_pre_hooks, part._forward_hooks)]
    former = [held.copy() for held in hooks]
    for part in parts:
        part.unshard()
    for held in hooks:
        held.clear()
    try:
        yield
    finally:
        for held, before in zip(hooks, former, strict=True):
            held.update(before)
        for part in parts:
            part.reshard()


def restore_(method: nn.Module) -> None:
    """Undo `shard_`: plain parameters, the former classes, no hooks. torch has no call for it."""
    if not isinstance(method, FSDPModule):
        return
    for part in method.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
    made: dict[int, nn.Parameter] = {}  # a parameter in two places stays one
    divided = [*method.named_parameters(remove_duplicate=False)]
    for name, value in divided:
        if id(value) not in made:
            made[id(value)] = nn.Parameter(whole(value), requires_grad=value.requires_grad)
        owner, _, leaf = name.rpartition(".")
        method.get_submodule(owner).register_parameter(leaf, made[id(value)])
    for part in [*method.modules()]:
        if isinstance(part, FSDPModule):
            part.__class__ = part.__class__.__bases__[1]  # (FSDPModule, its own)
            for hooks in (part._forward_pre_hooks, part._forward_hooks, part._state_dict_pre_hooks):
                hooks.clear()
            part._forward_pre_hooks_with_kwargs.clear()
            part._forward_hooks_always_called.clear()
            part._load_state_dict_pre_hooks.clear()
    del method.training_step  # that of its class comes back


def whole(value: Any) -> Any:
    """A divided tensor in one piece on this rank, anything else as it is; every rank must ask."""
    return value.full_tensor().detach() if isinstance(value, DTensor) else value


def like(value: Any, owner: Tensor) -> Any:
    """This rank's part of a whole tensor, divided as `owner` is; what has another shape stays as it is."""
    if not isinstance(owner, DTensor) or not isinstance(value, Tensor) or value.shape != owner.shape:
        return value
    mesh = owner.device_mesh
    return distribute_tensor(value.to(owner.device), mesh, owner.placements, src_data_rank=None)
