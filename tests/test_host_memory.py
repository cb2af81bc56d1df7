"""Memory of freed tensors, in processes of their own: the setting holds to a process's end."""

import platform
import subprocess
import sys

import pytest

COUNT = """
import resource, torch
{setting}
def pages():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.set_num_threads(1)
before = pages()
for _ in range(20):
    torch.ones(2**24)
print(pages() - before)
"""
KEEP = "from replknet._host_memory import keep_freed_memory; assert keep_freed_memory()"
OPTIMIZE = "import replknet; replknet.optimize(torch.nn.Conv2d(3, 3, 1), {mode!r})"


def new_pages(setting: str) -> int:
    """Pages that twenty tensors of 64 MiB, one after the other, took of the system."""
    command = [sys.executable, "-c", COUNT.format(setting=setting)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is told to keep memory")
def test_training_on_a_cpu_keeps_freed_memory():
    given_back = new_pages(OPTIMIZE.format(mode="inference"))
    # Small objects come to lie in the hole that a tensor left: the next one then takes another, but not every one does.
    assert new_pages(KEEP) < given_back / 4
    assert new_pages(OPTIMIZE.format(mode="training")) < given_back / 4
