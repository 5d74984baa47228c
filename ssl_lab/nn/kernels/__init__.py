"""Attention kernels. `eager` is the definition; every other one is tested against it."""
