"""Where a run stands: nothing yet, half-way, or done. The same command goes on from there, another one is refused."""

import contextlib
import fcntl
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from ssl_lab.errors import UserError
from ssl_lab.files import write_text
from ssl_lab.train import checkpoint
from ssl_lab.train.base import Base

IDENTITY = ("method", "tuning", "data", "optim", "seed", "duration", "ema", "float8")
IDENTITY_TRAINER = ("precision", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm")
FREE = ("num_workers", "augment_on_device", "kernel")  # how it is computed, not what
SHARED_OUT = ("data.batch_size", "trainer.accumulate_grad_batches")  # their product with the devices counts


@dataclass(frozen=True)
class Standing:
    """The checkpoint to go on from, None at the start, and the optimizer steps that it has behind it.

    `own` tells whether it is one of this run.
    """

    path: Path | None
    step: int
    own: bool = True


def standing(
    out: Path, config: Mapping[str, Any], samples_per_step: int, start: str | None = None, *, world_size: int = 1
) -> Standing:
    """Where the run in `out` stands; `start` is a checkpoint to begin from while `out` has none of its own.

    On another number of devices than before, the batches of each may be of another size.

    Raises:
        UserError: `out` holds a run with other settings, every checkpoint in it is damaged, or `start` goes on with
            another optimizer.
    """
    path = checkpoint.find(out)
    facts = checkpoint.facts(path) if path else {}
    step = int(facts.get("step", 0))
    if step or (out / "last.safetensors").exists():
        require_same(out, config, SHARED_OUT if facts.get("world_size", world_size) != world_size else ())
    own = step > 0
    if not own and start is not None:
        path = checkpoint.find(start)
        if path is None:
            raise UserError(f"ckpt={start}: there is no checkpoint; give a .ckpt file or a run folder")
        content = checkpoint.read(path, lazy=True)
        step = int(content.get("global_step", 0))
        _require_same_optimizer(path, content.get("config") or {}, config)
    if not step or path is None:
        return Standing(None, 0)
    before = checkpoint.facts(path).get("samples_per_step")
    if before not in (None, samples_per_step):
        raise UserError(
            f"{path} was trained on {before} samples per step, this command has {samples_per_step}: "
            "data and learning rate would jump; keep data.batch_size x devices x accumulate_grad_batches the same"
        )
    return Standing(path, step, own)


def require_left(standing: Standing, start: str | None, steps: int, method: Mapping[str, Any]) -> None:
    """A run of `steps` must train at least one itself, else another run's weights would be called its own.

    Raises:
        UserError: the checkpoint `start` of another run has as many steps behind it.
    """
    if standing.own or standing.step < steps:
        return
    parts = () if "weights" in method else ("encoder", "decoder", "model")  # LLaVA and its kin take a whole run
    part = next((f"{name}." for name in parts if name in method), "")
    raise UserError(
        f"ckpt={start} has {standing.step} steps behind it, and duration comes to {steps}: give a longer one, or begin "
        f"from its weights alone with method.{part}weights={start}"
    )


def require_fit(path: Path, method: nn.Module, base: Base | None = None) -> None:
    """Check that a checkpoint was made by such a method; `base` is what a tuned one's leaves out.

    Raises:
        UserError: names and shapes of the weights differ.
    """
    here = {name: tuple(value.shape) for name, value in method.state_dict().items()}
    content = checkpoint.read(path, lazy=True)
    state = (content if base is None else base.put_back(content, path))["state_dict"]
    there = {name: tuple(value.shape) for name, value in state.items()}
    if wrong := sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name)):
        raise UserError(
            f"{path} does not fit this {type(method).__name__}: {len(wrong)} tensors differ, first {wrong[0]}; "
            "train the method that it was made by, or start from its encoder with weights="
        )


@contextlib.contextmanager
def holding(out: Path) -> Iterator[None]:
    """Keep other processes out of a run folder until the end of this one, however it ends.

    Raises:
        UserError: another process trains there, or nothing can be written there.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(out / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"out={out}: {error.strerror}; give a folder that can be written to") from error
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # forked workers do not inherit it
            except BlockingIOError:
                raise UserError(f"another process is training in {out}; stop it, or give another out=") from None
        yield
    finally:
        os.close(descriptor)


def save_config(out: Path, config: Mapping[str, Any]) -> None:
    """Write `config.yaml`, all interpolations resolved."""
    write_text(out / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False))


def require_same(
    out: Path, config: Mapping[str, Any], free: Collection[str] = (), *, file: str = "config.yaml"
) -> None:
    """Compare what makes the run what it is, except the keys in `free`, with the `file` in its folder.

    Raises:
        UserError: they differ.
    """
    try:
        former = yaml.safe_load((out / file).read_text())
    except (OSError, yaml.YAMLError):
        return  # nothing to compare with
    there, here = _identity(former), _identity(yaml.safe_load(yaml.safe_dump(dict(config))))
    differing = [key for key in {**there, **here} if key not in free and there.get(key) != here.get(key)]
    if differing:
        unset = "not set"
        told = "; ".join(f"{key}: {there.get(key, unset)} there, {here.get(key, unset)} here" for key in differing[:3])
        more = f"; and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise UserError(f"{out} holds a run with other settings: {told}{more}; give another out=, or remove the folder")


def _require_same_optimizer(path: Path, former: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """The state of an optimizer holds its rates, so that those of the command would be ignored."""
    there, here = (dict(flat({"optim": each.get("optim")})) for each in (former, config))
    differing = [key for key in {**there, **here} if there.get(key) != here.get(key)]
    if former.get("optim") and differing:
        raise UserError(
            f"ckpt={path} goes on with its own optimizer, of which {differing[0]} is {there.get(differing[0])}, here "
            f"{here.get(differing[0])}: leave it as it was, or begin from its weights alone (method...weights=)"
        )


def _identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted key -> value of everything that decides what is learned."""
    trainer = config.get("trainer") or {}
    kept = {key: config.get(key) for key in IDENTITY} | {"trainer": {key: trainer.get(key) for key in IDENTITY_TRAINER}}
    return {key: value for key, value in flat(kept) if key.rpartition(".")[2] not in FREE}


def flat(node: Any, key: str = "") -> list[tuple[str, Any]]:
    """(dotted key, value) of everything in nested mappings and lists."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else None
    if items is None:
        return [(key, node)]
    return [pair for name, value in items for pair in flat(value, f"{key}.{name}" if key else str(name))]
