"""What this machine has, asked of the system and of the installed libraries; `doctor` prints it."""

import importlib
import importlib.metadata as metadata
import netrc
import os
import platform
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from ssl_lab.errors import UserError

GIB = 1024**3
NEEDED = ("torch", "torchvision", "lightning", "timm", "hydra-core", "datasets", "torchmetrics", "safetensors")
WANTED = {
    "transformers": "ssl-lab export to=hf",
    "wandb": "logger=wandb",
    "tensorboard": "logger=tensorboard",
    "torchao": "float8=tensorwise",
}
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16", "bf16", "asimd", "sve")


@dataclass(frozen=True)
class Finding:
    """One line of the report; `problem` says what is wrong and what to do, None when all is well."""

    name: str
    value: str
    problem: str | None = None


def versions() -> list[Finding]:
    """Python, the libraries that are needed, and those that are needed for one thing."""
    found = [Finding("python", platform.python_version()), Finding("ssl-lab", _version("ssl-lab") or "source tree")]
    for name in NEEDED:
        version = _version(name)
        problem = None if version else f"{name} is not installed: pip install -e . in the checkout"
        found.append(Finding(name, version or "missing", problem or (_pair() if name == "torchvision" else None)))
    return found + [Finding(name, _version(name) or f"missing (for {use})") for name, use in WANTED.items()]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _pair() -> str | None:
    """None when torchvision was made for the installed torch and loads beside it."""
    wanted = [m[1] for line in metadata.requires("torchvision") or [] if (m := re.match(r"torch==([\d.]+)", line))]
    installed = metadata.version("torch").partition("+")[0]
    remedy = "install both in one command: pip install -U torch torchvision"
    if wanted and wanted[0] != installed:
        return f"torchvision was made for torch {wanted[0]}, not {installed}: {remedy}"
    try:
        importlib.import_module("torchvision").ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    except (ImportError, RuntimeError) as error:
        return f"torchvision does not load beside this torch ({error}): {remedy}"
    return None


def devices() -> list[Finding]:
    """Processor, memory, accelerators, and whether torch.compile has a compiler."""
    model, flags = _processor()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = [
        Finding("processor", f"{model}, {cores} cores; threads of torch: {torch.get_num_threads()}"),
        Finding("instructions", f"{torch.backends.cpu.get_cpu_capability()} ({' '.join(flags) or 'flags unknown'})"),
        Finding("bf16 on the CPU", _bf16(flags)),
    ]
    if (memory := _memory()) is not None:
        found.append(Finding("memory", f"{memory[0]:.1f} GiB free of {memory[1]:.1f}"))
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        room = f"{free / GIB:.0f} of {total / GIB:.0f} GiB free"
        text = f"{facts.name}, {room}, compute capability {facts.major}.{facts.minor}"
        found.append(Finding(f"cuda:{index}", text))
    if not torch.cuda.is_available():
        no_driver = torch.version.cuda is not None and shutil.which("nvidia-smi") is not None
        problem = (
            "a GPU driver is here but torch cannot use it: check its version with nvidia-smi" if no_driver else None
        )
        found.append(Finding("cuda", "none", problem))
    if torch.backends.mps.is_available():
        found.append(Finding("mps", "available"))
    return [*found, _compiler()]


def _processor() -> tuple[str, list[str]]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine(), []
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    have = set(flags[1].split()) if flags else set()
    return model[1].strip() if model else platform.machine(), [flag for flag in CPU_FLAGS if flag in have]


def _bf16(flags: list[str]) -> str:
    if "amx_bf16" in flags:
        return "fast (AMX): trainer.precision=bf16-mixed"
    if "avx512_bf16" in flags or "bf16" in flags:
        return "faster than fp32: trainer.precision=bf16-mixed"
    return "emulated, slower than fp32: keep trainer.precision=32-true"


def _memory() -> tuple[float, float] | None:
    try:
        text = Path("/proc/meminfo").read_text()
        free, total = (int(re.findall(rf"{key}:\s+(\d+)", text)[0]) / 1024**2 for key in ("MemAvailable", "MemTotal"))
    except (OSError, IndexError):
        return None
    return free, total


def _compiler() -> Finding:
    name = os.environ.get("CXX") or next((c for c in ("g++", "c++", "clang++") if shutil.which(c)), None)
    if name is None:
        return Finding("torch.compile", "no C++ compiler", "compile=true needs a C++ compiler: apt-get install g++")
    if torch.cuda.is_available() and importlib.util.find_spec("triton") is None:
        return Finding("torch.compile", f"{name}, no triton", "compile=true on a GPU needs triton: pip install triton")
    return Finding("torch.compile", f"available ({name})")


def data(path: str | None) -> list[Finding]:
    """The embedded sets, the set of images at `path`, and what the Hugging Face cache holds."""
    found = [Finding("shapes, tones", "built in")]
    if path is not None:
        import datasets

        from ssl_lab.data.tables import open_table

        datasets.disable_progress_bars()
        try:
            table = open_table(path, "train")
            found.append(Finding(path, f"{len(table):,} training images, {len(table.classes)} classes"))
        except UserError as error:
            found.append(Finding(path, "not usable", str(error)))
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    kept = [p.name for folder in ("hub", "datasets") for p in sorted((home / folder).glob("*")) if p.is_dir()]
    kept = [name for name in kept if not name.startswith(".") and name != "downloads"]
    found.append(
        Finding("Hugging Face cache", f"{home}: {', '.join(kept[:8]) or 'empty'}{' ...' if len(kept) > 8 else ''}")
    )
    return found


def tracking() -> list[Finding]:
    """Can results go to Weights & Biases?"""
    version = _version("wandb")
    if version is None:
        return [Finding("wandb", "not installed", "logger=wandb needs it: pip install wandb")]
    key = "key found" if _has_key() else "no key: runs stay on this disk, `wandb login` stores one"
    mode = f", WANDB_MODE={os.environ['WANDB_MODE']}" if "WANDB_MODE" in os.environ else ""
    return [Finding("wandb", f"{version}{mode}, {key}")]


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").partition("://")[2]
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def disk(out: Path) -> list[Finding]:
    """Room for runs and for the workers' shared memory; may `out` be written?"""
    place = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(place).free / GIB
    low = "less than 2 GiB: checkpoints may not fit, choose another place with out=..." if free < 2 else None
    found = [Finding("free disk", f"{free:.1f} GiB at {place}", low)]
    try:
        with tempfile.TemporaryFile(dir=place):
            found.append(Finding("run folder", f"{out} can be written"))
    except OSError as error:
        told = f"{place} cannot be written ({error.strerror}): choose another place with out=..."
        found.append(Finding("run folder", f"{out} cannot be written", told))
    shm = Path("/dev/shm")
    if shm.is_dir():
        size = shutil.disk_usage(shm).total / GIB
        small = "less than 1 GiB: workers may die with a bus error; data.num_workers=0, or docker run --shm-size=8g"
        found.append(Finding("/dev/shm", f"{size:.1f} GiB", small if size < 1 else None))
    return found
