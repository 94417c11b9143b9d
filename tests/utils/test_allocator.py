"""Freed memory is used again, where the C library is glibc."""

import json
import platform
import resource
import subprocess
import sys

import pytest

FAULTS = """
import json, resource, torch
from pyro_scvi.utils.allocator import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        tensors = [torch.zeros(2**19) for _ in range(20)]  # 2 MB each
        del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_freed_memory()
print(json.dumps([faults(), faults()]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc learns from what is freed")
def test_freed_memory_is_not_given_back_and_taken_again():
    """The pages of twenty tensors once; without, at least those of the first round twice."""
    run = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    first, second = json.loads(run.stdout)
    pages = 20 * 2**21 / resource.getpagesize()
    assert pages <= first < 1.5 * pages
    assert second < 100
