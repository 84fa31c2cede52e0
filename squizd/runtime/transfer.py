"""Expert records into GPU memory that the host cannot write fast: the library compiled from `kernels/src/transfer.cpp`.

On CUDA, MLX's arrays that the host has looked at are managed memory. Written through a NumPy view their pages move by
faults at some 2 GB/s; `cudaMemcpyAsync` to the same address from pinned memory runs at 30 GB/s and more. So records
are read in chunks by many threads into pinned buffers, copied from there, and their digests computed beside that:
`fetch` returns before they are known, and `settle` must be asked before anything is concluded from the bytes.
Only documented calls of the CUDA runtime API are used, from the library that MLX itself has loaded.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np

from ..container.layout import Record
from .io import Part
from .library import compiled, pointer
from .source import Bytes

BUFFERS = 32  # pinned, each for any record
MOST_THREADS = 8
_SPINS = 10_000  # some 300 us, a layer's time: waking a thread takes a fifth of that
_WRONG_DIGEST = -3
_REASONS = {
    -1: "the file is cut short",
    -2: "the copy to the GPU failed",
    _WRONG_DIGEST: "the bytes do not match their digest",
    -5: "the GPU waited for it too long",
}
_MOST_FAILURES = 256
_ALIGNED = 64  # as in the file, so that a GPU can copy in whole units


@cache
def cuda_library() -> str:
    """The name under which the CUDA runtime can be loaded here; "" if it cannot."""
    for name in ("libcudart.so.13", "libcudart.so.12", "libcudart.so"):
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return name
    return ""


def missing() -> str:
    """Why there can be no Transfer here; "" if there can."""
    found = compiled()
    return found if isinstance(found, str) else ""


def copy(to: Bytes, source: Bytes) -> None:
    """Copy host bytes to the managed memory behind `to`, of the same size, now. OSError if CUDA fails."""
    cuda = ctypes.CDLL(cuda_library())
    source = np.ascontiguousarray(source)
    code = cuda.cudaMemcpy(
        ctypes.c_void_p(to.ctypes.data), ctypes.c_void_p(source.ctypes.data), ctypes.c_size_t(source.nbytes), 1
    )  # 1: host to device
    if code:
        raise OSError(f"CUDA error {code} while copying to the GPU")


def slot_form(layouts: Sequence[Sequence[Part]]) -> list[Part]:
    """The parts of a record as slots hold it, and as native code lays it out: as in the file, if some are stored so."""
    for parts in layouts:
        if not any(part.bits for part in parts):
            return list(parts)
    found, end = list[Part](), 0
    for part in layouts[0]:
        found.append(Part(end, part.target_bytes))
        end += -(-part.target_bytes // _ALIGNED) * _ALIGNED
    return found


def buffer_bytes(layouts: Sequence[Sequence[Part]], stored_sizes: Sequence[int]) -> int:
    """What a buffer must hold of records of these layouts and sizes: as stored, or as slots hold them."""
    return max([*stored_sizes, *(part.offset + part.size for part in slot_form(layouts))])


class Transfer:
    """Threads, pinned buffers and streams of one open file. Calls of `fetch` and `settle` must not overlap."""

    def __init__(self, record_bytes: int, cuda: str) -> None:
        """`record_bytes`: the most of `buffer_bytes`. `cuda`: the CUDA runtime; "" copies in plain memory.

        OSError if there is no compiled library, or it cannot have the memory.
        """
        self.native = compiled()
        if isinstance(self.native, str):
            raise OSError(self.native)
        cores = len(os.sched_getaffinity(0))
        threads = max(2, min(MOST_THREADS, cores // 2))
        spins = _SPINS if cores > threads else 0
        self.handle: int | None = self.native.squizd_transfer_open(
            threads, spins, BUFFERS, ctypes.c_uint64(max(record_bytes, 1)), cuda.encode()
        )
        if not self.handle:
            raise OSError(f"cannot have {BUFFERS} pinned buffers of {record_bytes} bytes")
        self._shelves: list[int] = []
        self.before_close: list[Callable[[], None]] = []  # of those who use it

    def shelf(
        self, fd: int, banks: Sequence[Bytes], layouts: Sequence[Sequence[Part]], records: Sequence[tuple[Record, int]]
    ) -> int:
        """Describe a layer: banks [slots, bytes], the parts of each layout in their order, records with their layouts.

        A handle for `fetch`. Codes are widened, floats must not have to be.
        """
        assert not any(part.widen for parts in layouts for part in parts)
        where = np.array(
            [(p.offset, p.size, b.ctypes.data, b.strides[0]) for p, b in zip(slot_form(layouts), banks, strict=True)],
            np.uint64,
        )
        stored = np.array([[(p.offset, p.size, *(p.bits or (1, 1))) for p in parts] for parts in layouts], np.uint64)
        what = np.array([(r.offset, r.stored_size, r.digest, layout) for r, layout in records], np.uint64)
        handle: int = self.native.squizd_shelf_open(
            fd, len(where), pointer(where), len(stored), pointer(stored), len(what), pointer(what)
        )
        self._shelves.append(handle)
        return handle

    def fetch(self, shelf: int, taken: Sequence[tuple[int, int]]) -> list[str]:
        """Read (expert, slot) pairs; returns for each why it failed, or "". Their digests may still be computed."""
        count = len(taken)
        kind = ctypes.c_int * count
        status = kind()
        self.native.squizd_fetch(
            ctypes.c_void_p(self.handle),
            ctypes.c_void_p(shelf),
            count,
            kind(*[expert for expert, _ in taken]),
            kind(*[slot for _, slot in taken]),
            status,
        )
        return [self.reason(code) if code else "" for code in status]

    @staticmethod
    def reason(status: int) -> str:
        """What a status of native code means."""
        return _REASONS.get(status) or os.strerror(status)

    def settle(self) -> list[tuple[int, int, str]]:
        """Wait for all digests: (shelf, expert, reason) of every record fetched since the last call that fails."""
        shelves, experts = (ctypes.c_void_p * _MOST_FAILURES)(), (ctypes.c_int * _MOST_FAILURES)()
        count = self.native.squizd_settle(ctypes.c_void_p(self.handle), _MOST_FAILURES, shelves, experts)
        found = min(count, _MOST_FAILURES)
        return [(int(shelves[i] or 0), int(experts[i]), _REASONS[_WRONG_DIGEST]) for i in range(found)]

    def close(self) -> None:
        """End the threads and free the buffers; twice is fine."""
        handle, self.handle = self.handle, None
        if handle:
            for call in self.before_close:
                call()
            self.native.squizd_transfer_close(ctypes.c_void_p(handle))
            for shelf in self._shelves:
                self.native.squizd_shelf_close(ctypes.c_void_p(shelf))
