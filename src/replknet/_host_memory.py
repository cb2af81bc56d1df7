"""Memory of the host between one training step and the next."""

import ctypes
import functools
import platform

# Of malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


@functools.cache
def keep_freed_memory() -> bool:
    """Let this process keep the memory of freed tensors for new ones, instead of giving it back to the system.

    The C library maps each large tensor anew, and the system clears its pages one by one: 10 to 22 % of a training
    step of RepLKNet-31B with 8 images on two threads (bfloat16; 10 to 15 % in float32). What is kept is what the
    largest step needed, 2 % more than before there. It holds for the whole process, to its end.

    Returns:
        Whether it was done: only glibc's allocator is known to need it and to be told so.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    # No tensor in a mapping of its own; never give the heap's end back.
    return bool(library.mallopt(_M_MMAP_MAX, 0) and library.mallopt(_M_TRIM_THRESHOLD, -1))
