"""Freed memory is kept for the next step, unless the user has said how."""

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import torch
from ssl_lab.cli.allocator import keep_memory
print(keep_memory())
def touched():
    begin = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.zeros(48 << 18)  # 48 MiB, above every default threshold
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - begin
for _ in range(4):  # the first ones find their places
    touched()
print(touched())
"""


def run(**env: str) -> tuple[str, int]:
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run([sys.executable, "-c", FAULTS], env=plain | env, capture_output=True, text=True, check=True)
    said, faults = done.stdout.split()
    return said, int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator of glibc is asked")
def test_what_was_touched_once_is_not_touched_again():
    said, faults = run()
    assert said == "True" and faults < 1000
    said, faults = run(MALLOC_ARENA_MAX="1")
    assert said == "False" and faults > 5000  # of 4 x 12,288 pages, or of 4 x 24 huge ones and what is around them
