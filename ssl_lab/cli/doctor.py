"""`ssl-lab doctor`: versions, devices, attention kernels, data, tracking and disk, with a remedy for each problem."""

import warnings
from pathlib import Path

import torch
from omegaconf import DictConfig
from rich.table import Table
from rich.text import Text

from ssl_lab.cli import machine
from ssl_lab.cli.doctor_sound import sound
from ssl_lab.cli.machine import Finding
from ssl_lab.cli.screen import screen
from ssl_lab.errors import UserError
from ssl_lab.nn.attend import KERNELS, KernelName, attend, choose, supports
from ssl_lab.nn.mask import FULL

HEAD_DIM, LENGTH = 64, 64


def run(cfg: DictConfig) -> None:
    """Print the report. Problems are listed at the end; the exit code is 0 all the same."""
    console = screen()
    sections = {
        "Versions": machine.versions(),
        "Devices": machine.devices(),
        "Data": _data(cfg),
        "Tracking": machine.tracking(),
        "Disk": machine.disk(Path(str(cfg.out))),
    }
    for title, findings in sections.items():
        console.print(_section(title, findings), Text())
    for part in _kernels():
        console.print(part)
    problems = [finding.problem for findings in sections.values() for finding in findings if finding.problem]
    console.print(Text(f"\n{len(problems)} problem{'' if len(problems) == 1 else 's'}", style="bold"))
    for problem in problems:
        console.print(Text(f"  {problem}", style="red"), soft_wrap=True)


def _data(cfg: DictConfig) -> list[Finding]:
    """What is at `data.path`: recordings, or else images."""
    if cfg.data.path is None:
        return machine.data(None)
    path, tokenizer = str(cfg.data.path), None if cfg.data.tokenizer is None else str(cfg.data.tokenizer)
    try:
        found = sound(path, tokenizer)
    except UserError as error:
        asked = tokenizer is not None or "soundfile" in str(error)
        return [*([Finding(path, "not usable as sound", str(error))] if asked else []), *machine.data(path)]
    first, *others = machine.data(None)
    return [first, *found, *others]


def _section(title: str, findings: list[Finding]) -> Table:
    table = Table("", "", title=title, title_justify="left", title_style="bold", show_header=False, box=None)
    for finding in findings:
        table.add_row(finding.name, Text(finding.value, style="red" if finding.problem else ""))
    return table


def _kernels() -> list[Table | Text]:
    """Which kernel can train here, by device and dtype; the reasons of those that cannot are numbered below."""
    places = [("cpu", torch.float32), ("cpu", torch.bfloat16)]
    if torch.cuda.is_available():
        places += [("cuda", torch.float32), ("cuda", torch.bfloat16), ("cuda", torch.float16)]
    table = Table("attention=", title="Attention kernels", title_justify="left", title_style="bold", box=None)
    for device, dtype in places:
        table.add_column(f"{device} {str(dtype).removeprefix('torch.')}")
    reasons: list[str] = []
    for kernel in KERNELS:
        cells = []
        for device, dtype in places:
            reason = unavailable(kernel, device, dtype)
            if reason is not None and reason not in reasons:
                reasons.append(reason)
            cells.append("yes" if reason is None else f"no ({reasons.index(reason) + 1})")
        table.add_row(kernel, *cells)
    table.add_row(f"auto, {LENGTH} tokens", *(choose(*_sample(device, dtype), FULL) for device, dtype in places))
    return [table, *(Text(f"  ({n}) {reason}", style="dim") for n, reason in enumerate(reasons, 1))]


def unavailable(kernel: KernelName, device: str, dtype: torch.dtype) -> str | None:
    """None when a forward and a backward pass work, else why not. FlexAttention is asked, not tried: it compiles."""
    reason = supports(kernel, dtype=dtype, device=device, head_dim=HEAD_DIM, mask=FULL)
    if reason is not None or kernel == "flex":
        return reason
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            q, k = _sample(device, dtype)
            torch.autograd.backward(attend(q, k, k, kernel=kernel).sum())
    except Exception as error:
        return f"torch says: {str(error).splitlines()[0]}"
    return None


def _sample(device: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys (1, 2, 64, 64)."""
    q = torch.ones(1, 2, LENGTH, HEAD_DIM, dtype=dtype, device=device, requires_grad=True)
    return q, q.detach()
