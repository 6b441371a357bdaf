"""How the C library keeps memory that training frees and takes again at every step."""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Let this process keep what it frees; returns False where the C library is not glibc.

    By default glibc maps every large block anew and gives it back when it is freed, and the kernel clears its pages
    each time: a tenth of a training step on a CPU, whose tensors are that large and live that short.
    """
    try:
        libc = ctypes.CDLL("libc.so.6", use_errno=False)
        return bool(libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1))
    except (OSError, AttributeError):
        return False
