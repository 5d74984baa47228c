"""FSDP2: parameters, gradients and optimizer state divided among the ranks, block by block.

torch's `fully_shard` (the successor of Zhao et al., 2023, arXiv:2304.11277) gathers the weights of a block for its
forward and backward only. Checkpoints are what the other strategies write: whole tensors, in one file of rank 0.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.optim import Optimizer

from ssl_lab.nn.block import Block
from ssl_lab.train.sharded_optim import adapt_, collected, collected_state, like, load_state_, whole


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
        """Shard the method and its average, then make its optimizer."""
        assert self.model is not None
        mesh = self.device_mesh["data_parallel"]
        shard_(self.model, mesh)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, WeightAveraging) and callback._average_model is not None:
                divide_as_(callback._average_model.module, self.model)
        super().setup(trainer)
        for optimizer in self.optimizers:
            adapt_(optimizer, mesh)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole tensors on rank 0, nothing elsewhere; every rank must ask."""
        assert self.model is not None
        return collected(self.model.state_dict())

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.model is not None
        load_(self.model, checkpoint["state_dict"], strict=strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """As `lightning_module_state_dict`, in the form of the optimizer's own `state_dict`."""
        return collected_state(optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            load_state_(optimizer, state)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)

    def on_train_end(self) -> None:
        """Training went well: what follows finds an ordinary method with all of its weights on every rank."""
        assert self.model is not None
        restore_(self.model)


def shard_(method: nn.Module, mesh: DeviceMesh) -> None:
    """Divide every `Block` of `method`, then what is left of it, over `mesh`; `training_step` gathers the latter.

    Parameters without dimensions stay whole on every rank; `adapt_` sees to their gradients.
    """
    numbers = {p for p in method.parameters() if p.ndim == 0}
    for module in method.modules():
        if isinstance(module, Block):
            fully_shard(module, mesh=mesh, ignored_params=numbers)
    fully_shard(method, mesh=mesh, ignored_params=numbers)
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
    _replace_(method, lambda name, value: whole(value))
    for part in [*method.modules()]:
        if isinstance(part, FSDPModule):
            part.__class__ = part.__class__.__bases__[1]  # (FSDPModule, its own)
            for hooks in (part._forward_pre_hooks, part._forward_hooks, part._state_dict_pre_hooks):
                hooks.clear()
            part._forward_pre_hooks_with_kwargs.clear()
            part._forward_hooks_always_called.clear()
            part._load_state_dict_pre_hooks.clear()
    del method.training_step  # that of its class comes back


def divide_as_(copy: nn.Module, method: nn.Module) -> None:
    """Divide the parameters of a whole copy of `method` as its own are, without anything that would gather them."""
    owners = dict(method.named_parameters(remove_duplicate=False))
    _replace_(copy, lambda name, value: like(value.detach(), owners[name]))


def load_(module: nn.Module, state: Mapping[str, Any], strict: bool = True) -> None:
    """`load_state_dict` of whole tensors, into divided parameters too."""
    own = module.state_dict()
    divided = {name: like(value, own[name]) if name in own else value for name, value in state.items()}
    module.load_state_dict(divided, strict=strict)


def _replace_(module: nn.Module, make: Callable[[str, nn.Parameter], Tensor]) -> None:
    """Put new parameters in the place of all; one in two places stays one."""
    made: dict[int, nn.Parameter] = {}
    former = [*module.named_parameters(remove_duplicate=False)]
    for name, value in former:
        if id(value) not in made:
            made[id(value)] = nn.Parameter(make(name, value), requires_grad=value.requires_grad)
        owner, _, leaf = name.rpartition(".")
        module.get_submodule(owner).register_parameter(leaf, made[id(value)])
