"""Where the bytes of records come from: positioned reads of the file, or a mapping of it. No MLX.

Both can be told ahead what will be read, which is what keeps a disk busy: a thread that waits for one extent
leaves it with nothing else to do. `benchmarks/io.py` measures both; `open_source` has chosen by that.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from ..container.reader import File

MOST_BUFFERS: Final = 512  # of one `fill`; POSIX lets a system stop at 1024 (IOV_MAX)
_LEAST, _MOST = 1 << 17, 1 << 19  # bytes of one announcement; longer ones were no faster
_POPULATE_READ = 22  # MADV_POPULATE_READ of Linux 5.14, which Python has no name for

Bytes = npt.NDArray[np.uint8]


class Source(Protocol):
    """An open file. Threads share it."""

    step: int  # bytes that can be announced in one call

    def announce(self, offset: int, size: int) -> None:
        """Have the system begin to read an extent, if it can be asked to; returns at once."""

    def fill(self, buffers: Sequence[Bytes], offset: int) -> int:
        """Bytes read from `offset` into at most MOST_BUFFERS `buffers`, one after another; fewer than they hold only at
        the end of the file. Raises OSError."""

    def close(self) -> None:
        """Let go of what is not the file's own."""


def _step(fd: int) -> int:
    """Linux cuts a longer announcement short to what the device takes at once (or 128 KiB, if that is more)."""
    device = os.fstat(fd).st_dev
    where = f"/sys/dev/block/{os.major(device)}:{os.minor(device)}"
    for queue in ("queue", "../queue"):  # of a disk, of a partition
        try:
            most = int(Path(where, queue, "max_sectors_kb").read_text()) << 10
        except (OSError, ValueError):
            continue
        return max(_LEAST, min(_MOST, most))
    return _LEAST


class Positioned:
    """`preadv` into the buffers."""

    def __init__(self, file: File) -> None:
        self._file = file
        self.step = _step(file.fileno())

    def announce(self, offset: int, size: int) -> None:
        """`posix_fadvise`, where there is one."""
        if sys.platform == "linux":
            fd = self._file.fileno()
            for at in range(offset, offset + size, self.step):
                os.posix_fadvise(fd, at, min(self.step, offset + size - at), os.POSIX_FADV_WILLNEED)

    def fill(self, buffers: Sequence[Bytes], offset: int) -> int:
        """See `Source`."""
        fd, wanted = self._file.fileno(), sum(buffer.size for buffer in buffers)
        got = os.preadv(fd, buffers, offset)
        while got < wanted:  # a signal, or more than the system reads at once
            rest, skip = [], got
            for buffer in buffers:
                if skip < buffer.size:
                    rest.append(buffer[skip:])
                skip = max(0, skip - buffer.size)
            more = os.preadv(fd, rest, offset + got)
            if more == 0:
                break
            got += more
        return got

    def close(self) -> None:
        """Nothing: the descriptor is the file's."""


class Mapped:
    """Pages brought into a mapping in one call, copied from there, and let go, or they would count as this process's.

    A file that shrinks between that call and the copy kills the process (SIGBUS), as with every mapping.
    """

    def __init__(self, file: File) -> None:
        self._file = file
        self.step = _step(file.fileno())
        self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._bytes: Bytes = np.frombuffer(self._map, np.uint8)
        self._advise = ctypes.CDLL(None, use_errno=True).madvise  # mmap.madvise would hold Python's lock meanwhile

    def announce(self, offset: int, size: int) -> None:
        """`madvise(MADV_WILLNEED)`."""
        for at in range(offset, offset + size, self.step):
            self._call(at, min(self.step, offset + size - at), mmap.MADV_WILLNEED)

    def fill(self, buffers: Sequence[Bytes], offset: int) -> int:
        """See `Source`."""
        wanted = sum(buffer.size for buffer in buffers)
        there = max(0, min(wanted, os.fstat(self._file.fileno()).st_size - offset, self._bytes.size - offset))
        error = self._call(offset, there, _POPULATE_READ) if sys.platform == "linux" else 0
        if error:
            raise OSError(error, os.strerror(error))
        at = offset
        for buffer in buffers:
            size = min(buffer.size, offset + there - at)
            buffer[:size] = self._bytes[at : at + size]
            at += size
        self._call(offset, there, mmap.MADV_DONTNEED)
        return there

    def _call(self, offset: int, size: int, advice: int) -> int:
        """`madvise` on the pages of an extent; 0 or the error's number."""
        start = offset // mmap.PAGESIZE * mmap.PAGESIZE
        place = ctypes.c_void_p(self._bytes.ctypes.data + start)
        failed = size and self._advise(place, ctypes.c_size_t(offset + size - start), ctypes.c_int(advice))
        return ctypes.get_errno() if failed else 0

    def close(self) -> None:
        """Unmap, once no thread copies any more."""
        self._bytes = np.empty(0, np.uint8)
        self._map.close()


def open_source(file: File) -> Source:
    """What is faster on this platform: positioned reads on Linux (RESULTS); on macOS too, by what is documented.

    There, a mapping has no call that brings in an extent with one wait, only advice followed by faults.
    """
    return Positioned(file)
