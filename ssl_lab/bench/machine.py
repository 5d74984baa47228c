"""What was measured on: a figure without it says nothing."""

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

from ssl_lab.train.metrics import peak_memory

_PACKAGES = ("torch", "lightning", "timm", "transformers", "lightly")


def facts(device: torch.device) -> dict[str, str | int]:
    """Processor or accelerator, threads, versions."""
    found: dict[str, str | int] = {"device": device_name(device), "threads": torch.get_num_threads()}
    found["python"] = platform.python_version()
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def device_name(device: torch.device) -> str:
    """Name of the accelerator, or of the processor with its widest vector unit."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()} ({torch.backends.cpu.get_cpu_capability()})" if device.type == "cpu" else device.type


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def memory_of(device: torch.device) -> int:
    """Bytes that a device has in all."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def resident() -> int:
    """Bytes of this process in memory now; where the system does not tell, the most there were."""
    statm = Path("/proc/self/statm")
    if statm.is_file():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return peak_memory(torch.device("cpu"))
