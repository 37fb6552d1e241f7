"""Memory that is freed and taken again in every update, and how to keep the kernel out of that.

A gradient of a wide layer is tens of megabytes. glibc's malloc takes blocks above 32 MiB (the most that `M_MMAP_THRESHOLD` may be) from
the kernel and gives them back when they are freed, smaller ones at times (`M_TRIM_THRESHOLD`); the kernel then clears each page at its
first touch, in every update anew. On 2 CPU cores that was 13 % of an update with a head of 4096 units, and 16 % with 8192 (mallopt(3)).
"""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> bool:
    """Lets this process keep the memory that it frees, to take it again; returns whether its allocator could be told so.

    What must go back to the kernel has to be mapped by its owner, as a replay's frames are.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    return mallopt is not None and bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
