"""How the C library gives memory back: training frees and takes the same tensors in every step."""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Final

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_KEPT: Final = 1 << 30


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed for the next step instead of giving pages back and faulting them in again.

    On virtual machines, where a page fault is dear, a step on the CPU may take half the time. What the user has set in
    the environment (`MALLOC_TRIM_THRESHOLD_`, `MALLOC_MMAP_THRESHOLD_`) stands.

    Returns:
        Whether it is so now; False where the C library is another one.
    """
    if not sys.platform.startswith("linux") or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # musl has none
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _KEPT)) and bool(mallopt(_M_TRIM_THRESHOLD, _KEPT))
