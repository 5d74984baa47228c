"""What accelerators can do by their data sheets: the yardstick of a plan for a machine that is not here."""

from dataclasses import dataclass

from ssl_lab.errors import UserError


@dataclass(frozen=True)
class Accelerator:
    """Dense peaks in FLOP/s, memory in bytes, bandwidths in bytes/s per device and direction, price per hour.

    Attributes:
        half: FLOP/s of bf16 or fp16 matrix products with float32 sums, without sparsity.
        single: FLOP/s of float32 matrix products; TF32 where the device has it.
        memory: bytes.
        within: bytes/s to the other devices of its machine.
        between: bytes/s to the devices of other machines.
        per_machine: devices that share `within`.
        price: US dollars per hour, a typical list price of on-demand cloud machines in 2026; yours differs.
    """

    half: float
    single: float
    memory: float
    within: float
    between: float
    per_machine: int
    price: float


_T, _G, _GiB = 1e12, 1e9, 2**30

# Peaks and memory: NVIDIA's and AMD's data sheets. Between machines: 400 Gb/s a device where such cards usually stand
# in a cluster, about 100 Gb/s a machine elsewhere.
ACCELERATORS: dict[str, Accelerator] = {
    "t4": Accelerator(65 * _T, 8.1 * _T, 15 * _GiB, 16 * _G, 6 * _G, 4, 0.4),
    "v100": Accelerator(125 * _T, 15.7 * _T, 32 * _GiB, 150 * _G, 3 * _G, 8, 1.5),
    "l4": Accelerator(121 * _T, 60 * _T, 23 * _GiB, 32 * _G, 6 * _G, 8, 0.7),
    "a10g": Accelerator(70 * _T, 35 * _T, 23 * _GiB, 32 * _G, 3 * _G, 8, 1.0),
    "rtx3090": Accelerator(71 * _T, 35.6 * _T, 24 * _GiB, 32 * _G, 3 * _G, 4, 0.3),
    "rtx4090": Accelerator(165 * _T, 82.6 * _T, 24 * _GiB, 32 * _G, 3 * _G, 4, 0.5),
    "l40s": Accelerator(362 * _T, 183 * _T, 45 * _GiB, 32 * _G, 12 * _G, 8, 1.2),
    "a100": Accelerator(312 * _T, 156 * _T, 80 * _GiB, 300 * _G, 25 * _G, 8, 1.8),
    "h100": Accelerator(989 * _T, 494 * _T, 80 * _GiB, 450 * _G, 50 * _G, 8, 2.8),
    "h200": Accelerator(989 * _T, 494 * _T, 141 * _GiB, 450 * _G, 50 * _G, 8, 3.5),
    "b200": Accelerator(2250 * _T, 1125 * _T, 180 * _GiB, 900 * _G, 50 * _G, 8, 5.0),
    "mi300x": Accelerator(1307 * _T, 653 * _T, 192 * _GiB, 448 * _G, 50 * _G, 8, 2.5),
}


def accelerator(name: str) -> Accelerator:
    """The listed accelerator of that name.

    Raises:
        UserError: it is not listed.
    """
    if name.lower() not in ACCELERATORS:
        raise UserError(f"gpu={name} is not listed; there are {', '.join(ACCELERATORS)}, or null for this machine")
    return ACCELERATORS[name.lower()]
