"""The loss of a step together with what a network's mixtures of experts add to it."""

from torch import Tensor, nn

from ssl_lab.nn.experts import Mixture, aux_loss
from ssl_lab.types import Step


def with_experts(loss: Tensor, network: nn.Module) -> Step:
    """`loss` as it is, or plus the auxiliary losses of the latest forward pass, which are then logged as `experts`."""
    if not any(isinstance(module, Mixture) for module in network.modules()):
        return Step(loss)
    aux = aux_loss(network)
    return Step(loss + aux, {"token": loss.detach(), "experts": aux.detach()})
