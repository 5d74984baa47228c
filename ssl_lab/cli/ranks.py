"""What a process of a run is among the others: the first, which owns the run folder, or one that follows it."""

import os

from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig

from ssl_lab.cli.trainer import quiet
from ssl_lab.errors import UserError
from ssl_lab.train.signals import end_with_parent


def join(trainer: DictConfig) -> bool:
    """Whether this process is the first of its run. The others, and all of torchrun's, end with what started them.

    Raises:
        UserError: several machines and nothing that counts the ranks on all of them, another number of ranks, or
            torchrun would start ranks again that then wait for those that died.
    """
    with quiet():
        elastic, srun = TorchElasticEnvironment.detect(), SLURMEnvironment.detect()
    if trainer.num_nodes > 1 and not elastic and not srun:
        raise UserError(
            f"trainer.num_nodes={trainer.num_nodes}: start the ranks with torchrun or srun on each machine, "
            "as docs/cluster.md shows"
        )
    again, shared = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"), os.environ.get("TORCHELASTIC_USE_AGENT_STORE")
    if elastic and again != "0" and shared == "True":  # one store for all tries keeps addresses of the dead
        raise UserError(
            f"torchrun --max-restarts={again}: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment, or ranks "
            "that start again look for those that died (PyTorch issue 135712)"
        )
    started = os.environ.get("WORLD_SIZE" if elastic else "SLURM_STEP_NUM_TASKS", "")  # the latter is srun's
    if (
        str(trainer.devices).isdigit()
        and started.isdigit()
        and int(trainer.devices) * trainer.num_nodes != int(started)
    ):
        raise UserError(
            f"{started} ranks were started for trainer.devices={trainer.devices} x num_nodes={trainer.num_nodes}: the "
            "numbers must be the same, and more than one need strategy=ddp or fsdp2"
        )
    first: bool = getattr(rank_zero_only, "rank", 0) == 0
    if elastic or not first:
        end_with_parent()
    return first
