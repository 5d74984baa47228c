"""One cell of `ssl-lab scaling`, in a process of its own: an ordinary run, then what it was, in `cell.json`."""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch.distributed as td
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf, open_dict

from ssl_lab.bench.flops import DRAWS, count
from ssl_lab.bench.step import MethodStep
from ssl_lab.cli.compose import perform
from ssl_lab.cli.main import performed
from ssl_lab.cli.rehearsal import batch_of, rehearsal
from ssl_lab.cli.trainer import quiet
from ssl_lab.errors import UserError
from ssl_lab.files import write_text
from ssl_lab.nn.block import Block
from ssl_lab.train import checkpoint
from ssl_lab.train.signals import end_with_parent

FACTS = "cell.json"
_ROWS = 2  # of the batch whose FLOPs are counted


def run(cfg: DictConfig) -> None:
    """Train as `ssl-lab train` does, and write down parameters, samples, tokens and FLOPs."""
    perform("train", cfg)
    if getattr(rank_zero_only, "rank", 0) > 0:
        return
    if td.is_initialized():
        td.destroy_process_group()  # the other ranks have left, and a step that is counted must not wait for them
    found = facts(cfg)
    write_text(Path(cfg.out) / FACTS, json.dumps(found, indent=1) + "\n")


def facts(cfg: DictConfig) -> dict[str, Any]:
    """Of a finished run: trained parameters, those in blocks, steps, samples, tokens (samples where there is no text).

    `flops` are those of one sample, forward and backward.
    """
    saved = checkpoint.facts(checkpoint.find(cfg.out) or cfg.out)
    plain = DictConfig(OmegaConf.to_container(cfg))
    with open_dict(plain):
        plain.trainer.devices, plain.trainer.strategy, plain.compile = 1, "auto", False
        plain.float8 = None  # FLOPs are counted as those of the products that it stands for
        if "num_workers" in plain.data:
            plain.data.num_workers = 0
    with tempfile.TemporaryDirectory(prefix="ssl-lab-cell-") as folder, quiet():
        training = rehearsal(plain, str(Path(folder) / "run"), 1)
        method, batch = training.method, batch_of(training, _ROWS)
        method.configure_model()
        device = training.trainer.strategy.root_device
        step = MethodStep(method, batch, device=device, precision=cfg.trainer.precision)
        flops = count(step.forward_backward, method, draws=DRAWS) / _ROWS
    text = "tokens" in batch and "image" not in batch
    samples = int(saved["step"]) * int(saved["samples_per_step"])
    inside = {p for block in method.modules() if isinstance(block, Block) for p in block.parameters()}
    return {
        "trained": sum(p.numel() for p in method.parameters() if p.requires_grad),
        "blocks": sum(p.numel() for p in inside if p.requires_grad),
        "steps": int(saved["step"]),
        "samples": samples,
        "tokens": samples * (batch["tokens"].numel() // _ROWS if text else 1),
        "epochs": samples / max(1, training.data.num_train),
        "flops": flops,
    }


def main(file: str) -> int:
    """Exit code of the cell that is described in a YAML file."""
    end_with_parent()
    try:
        return performed("cell", DictConfig(OmegaConf.load(file)))
    except UserError as error:
        print(f"ssl-lab: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
