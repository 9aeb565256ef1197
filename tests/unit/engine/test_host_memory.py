"""Freed memory stays with the process, which page faults show."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

PROBE = """
import resource, sys
import numpy as np
from npr_megatron.engine.compute.host_memory import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()
    keep_freed_memory()
def step(size):
    blocks = [np.ones(size + 100 * number, np.uint8) for number in range(4)]
    del blocks
for size in range(2_000_000, 2_100_000, 10_000):
    step(size)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for size in range(2_100_000, 2_600_000, 10_000):
    step(size)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(how: str) -> int:
    command = [sys.executable, "-c", PROBE, how]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")
def test_blocks_of_a_step_are_allocated_without_asking_the_kernel_again():
    steps, pages_per_step = 50, 4 * 2_000_000 // 4096
    assert page_faults("keep") < steps * pages_per_step / 10
    assert page_faults("give back") > steps * pages_per_step / 2
