"""How long to train, in the unit a person thinks in."""

import math
import re

from ssl_lab.errors import UserError

UNITS = ("epochs", "steps", "samples")


def parse_duration(duration: str) -> tuple[float, str]:
    """`"10 epochs"`, `"2000 steps"`, `"1e6 samples"` (the space may be left out) -> (amount, unit).

    Raises:
        UserError: there is no unit, the amount is not a positive number, or steps and samples are not whole.
    """
    match = re.fullmatch(r"\s*([-+.\w]*?\d\.?)\s*([A-Za-z]*)\s*", str(duration))
    unit = match[2].lower() if match else ""
    unit = unit if unit.endswith("s") else f"{unit}s"
    try:
        amount = float(match[1]) if match else math.nan
    except ValueError:
        amount = math.nan
    if unit not in UNITS or not math.isfinite(amount):
        raise UserError(f"duration={duration}: write a number and a unit, one of {', '.join(UNITS)}, as in 10epochs")
    if amount <= 0 or (unit != "epochs" and not amount.is_integer()):
        raise UserError(
            f"duration={duration}: the number of {unit} must be positive{'' if unit == 'epochs' else ' and whole'}"
        )
    return amount, unit


def steps_of(duration: str, samples_per_step: int, num_train: int) -> int:
    """Optimizer steps that last `duration`, at least 1; what does not fill a step is rounded up.

    Args:
        duration: see `parse_duration`.
        samples_per_step: global batch times accumulation.
        num_train: rows of the training set, for epochs.
    """
    amount, unit = parse_duration(duration)
    if unit == "steps":
        return int(amount)
    samples = amount * num_train if unit == "epochs" else amount
    return max(1, math.ceil(round(samples / samples_per_step, 6)))
