"""What an optimizer needs in order to work on divided parameters (FSDP2): single numbers and whole matrices."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from ssl_lab import dist

_BY_ELEMENT = (torch.optim.AdamW, torch.optim.SGD)  # a shard is enough for them


def adapt_(optimizer: torch.optim.Optimizer, mesh: DeviceMesh) -> None:
    """Make `optimizer` update the parameters of a method that is divided over `mesh` as it would the whole ones.

    Call once, before its first step.
    """
    for group in optimizer.param_groups:
        group["params"] = [p if isinstance(p, DTensor) else _stand_in(p, mesh) for p in group["params"]]
    if not isinstance(optimizer, _BY_ELEMENT):
        _step_on_whole_(optimizer)


def _stand_in(parameter: nn.Parameter, mesh: DeviceMesh) -> nn.Parameter:
    """A replicated DTensor on the storage of a parameter that is not divided, for an optimizer that has no mixed lists.

    It takes over the gradients, averaged over the ranks, as they arise.
    """
    twin = nn.Parameter(DTensor.from_local(parameter.data, mesh, [Replicate()], run_check=False))

    def take(p: Tensor) -> None:
        assert p.grad is not None
        grad = DTensor.from_local(dist.all_reduce_mean(p.grad), mesh, [Replicate()], run_check=False)
        twin.grad = grad if twin.grad is None else twin.grad + grad
        p.grad = None

    parameter.register_post_accumulate_grad_hook(take)
    return twin


def _step_on_whole_(optimizer: torch.optim.Optimizer) -> None:
    """Gather each parameter, its gradient and its state in turn for its update: Muon and LARS look at whole tensors.

    Every rank makes the same update and keeps its part. One tensor at a time is whole.
    """
    step: Callable[[], Any] = optimizer.step

    def stepped(closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups, state = optimizer.param_groups, optimizer.state
        try:
            for group in groups:
                for p in group["params"]:
                    if p.grad is None:
                        continue
                    piece = nn.Parameter(whole(p))
                    piece.grad = whole(p.grad)
                    held = {name: whole(value) for name, value in state[p].items()}
                    optimizer.param_groups = [group | {"params": [piece]}]
                    optimizer.state = defaultdict(dict, {piece: held})
                    step()
                    with torch.no_grad():
                        p.copy_(like(piece.detach(), p))
                    held = optimizer.state[piece]
                    state[p].update({name: x if name == "step" else like(x, p) for name, x in held.items()})
        finally:
            optimizer.param_groups, optimizer.state = groups, state
        return loss

    optimizer.step = stepped  # type: ignore[method-assign]


def collected_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's `state_dict` of whole tensors on rank 0, empty elsewhere; every rank must ask."""
    state = optimizer.state_dict()
    held = {i: collected(one) for i, one in state["state"].items()}
    return state | {"state": held} if dist.rank() == 0 else {}


def load_state_(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """`load_state_dict` of whole tensors into an optimizer of divided parameters."""
    names = [i for group in state["param_groups"] for i in group["params"]]
    owner = dict(zip(names, (p for group in optimizer.param_groups for p in group["params"]), strict=True))
    held = {
        i: {name: x if name == "step" else like(x, owner[i]) for name, x in one.items()}
        for i, one in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": held})


def collected(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Divided tensors in one piece in the CPU's memory of rank 0, one after the other; nothing elsewhere.

    Every rank must ask. What is not divided stays as it is.
    """
    found = {}
    for name, value in tensors.items():
        piece = whole(value)
        if dist.rank() == 0:
            found[name] = piece.cpu() if isinstance(value, DTensor) else piece
    return found


def whole(value: Any) -> Any:
    """A divided tensor in one piece on this rank, anything else as it is; every rank must ask."""
    return value.full_tensor().detach() if isinstance(value, DTensor) else value


def like(value: Any, owner: Tensor) -> Any:
    """This rank's part of a whole tensor, divided as `owner` is; what has another shape stays as it is."""
    if not isinstance(owner, DTensor) or not isinstance(value, Tensor) or value.shape != owner.shape:
        return value
    mesh = owner.device_mesh
    part = distribute_tensor(value.to(owner.device), mesh, owner.placements, src_data_rank=None)
    return part.clone()  # else it is a view that keeps the whole in memory
