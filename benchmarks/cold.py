"""A file that the system has nothing of in its cache. Linux only."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Sequence

import numpy as np

from squizd.container.layout import Record


def cached_share(fd: int, records: Sequence[Record]) -> float:
    """Share of the records' pages that lie in the system's cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    with mmap.mmap(fd, 0, access=mmap.ACCESS_READ) as mapped:
        view = np.frombuffer(mapped, np.uint8)
        there = np.zeros(-(-len(mapped) // mmap.PAGESIZE), np.uint8)
        if libc.mincore(
            ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(len(mapped)), ctypes.c_void_p(there.ctypes.data)
        ):
            raise OSError(ctypes.get_errno(), "mincore")
        del view
    pages = [there[r.offset // mmap.PAGESIZE : -(-(r.offset + r.stored_size) // mmap.PAGESIZE)] & 1 for r in records]
    return float(np.concatenate(pages).mean())


def drop(fd: int, records: Sequence[Record]) -> None:
    """Have nothing of the file in the system's cache."""
    for _ in range(20):  # pages that are just being read cannot go yet
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        share = cached_share(fd, records)
        if share <= 0.01:
            return
        time.sleep(0.05)
    raise SystemExit(f"{share:.0%} of the extents are still in the system's cache: somebody has the file mapped")
