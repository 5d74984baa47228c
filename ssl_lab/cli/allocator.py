"""Memory that is kept for the next step: on a CPU, giving it back to the system costs up to a sixth of the time."""

import contextlib
import ctypes
import os
import platform

# mallopt's names, from glibc's malloc.h
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_KEPT, _STEP = 1 << 30, 1 << 26  # bytes


def keep_memory() -> bool:
    """Ask glibc to keep up to 1 GiB of freed memory instead of returning what is above some MiB; whether it will.

    Tensors of a step are freed and made anew all the time. By default each of some MiB comes from the system in pages
    that are touched, and cleared, one by one: up to a sixth of a training step (`docs/performance.md`). The peak
    stays the same. Nothing is done where the user has set one of glibc's own variables, or where there is no glibc.
    """
    if platform.libc_ver()[0] != "glibc" or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        set_ = ((_MMAP_THRESHOLD, _KEPT), (_TRIM_THRESHOLD, _KEPT), (_TOP_PAD, _STEP))
        return all([libc.mallopt(name, value) == 1 for name, value in set_])
    return False
