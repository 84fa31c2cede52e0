"""A token that runs through the GPU without stopping at the host: see `kernels/src/exchange.h`.

In place of a read-back, each paged layer has a kernel that writes the router's choice into host memory and waits
there for the slots, which a thread of the compiled library answers within microseconds; what is missing it copies
from pinned memory into its slot as it is read. Python builds the graph of the whole token meanwhile. A kernel that
waits longer than `PATIENCE` goes on, and the token fails. Native code then decides what lies in which
slot, until `give_back`: as with `lending`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from ..errors import ExpertReadError, ReadError, RequestError
from .policy import FOLLOWING, MEMORY, STEPS, WEIGHT

if TYPE_CHECKING:
    from .pager import Pager, Slots
    from .transfer import Transfer

PATIENCE, FIRST_PATIENCE = 60_000, 200  # milliseconds; the first token is a trial
MOST_CHOICES = 30
SCHEDULED = 4  # layers at once: scheduling one by itself costs the host more than it gains the GPU
_BAD_CHOICE = -4

Lock = AbstractContextManager[bool]
# (choice, note) -> slots, both uint32 [..., k]: how a computation sends its choice and waits for the slots. The note,
# uint32 [NOTE], begins with the address of the layer's box, low word first; the rest is zero at first, and the asker's.
Ask = Callable[[mx.array, mx.array], mx.array]
NOTE = 256

# Block 0 talks with the host, whose memory is far away, and tells the other blocks by the note.
# In 32-bit words of a Box (see kernels/src/exchange.h): 0 sent, 1 experts, 31 lost, 32 answered, 33 slots, 63 patience,
# 64 count, 65 parts, 66 table, 68 records. Of the note: 0 the box, 2 number of the last choice that all blocks are
# through with, 3 how many are, 4 number that was answered, 5 count, 6 parts, 8 records, 128 table.
_ASK = """
    volatile unsigned* note = const_cast<unsigned*>(about);
    const unsigned long long place = note[0] | static_cast<unsigned long long>(note[1]) << 32;
    volatile unsigned* box = reinterpret_cast<volatile unsigned*>(place);
    volatile unsigned long long* table = reinterpret_cast<volatile unsigned long long*>(note + 128);
    __shared__ unsigned number, count, parts, lost;
    __shared__ unsigned long long source, slot, row[64];
    auto wait = [&](volatile unsigned* word) {  // for the host
      unsigned long long began, now;
      asm volatile("mov.u64 %0, %globaltimer;" : "=l"(began));
      while (*word != number && !lost) {
        __nanosleep(100);
        asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
        if (now - began > box[63] * 1000000ull) box[31] = lost = 1;
      }
      __threadfence_system();
    };
    if (threadIdx.x == 0) {
      number = note[2] + 1;
      lost = 0;
    }
    __syncthreads();
    if (blockIdx.x == 0) {
      if (threadIdx.x < K) box[1 + threadIdx.x] = chosen[threadIdx.x];
      __threadfence_system();
      __syncthreads();
      if (threadIdx.x == 0) {
        box[0] = number;
        parts = box[65];
      }
      __syncthreads();
      if (note[6] == 0 && threadIdx.x < 4 * parts)  // for the first time
        table[threadIdx.x] = (*reinterpret_cast<volatile unsigned long long* volatile*>(box + 66))[threadIdx.x];
      __threadfence();
      __syncthreads();
      if (threadIdx.x == 0) {
        wait(box + 32);
        count = lost ? 0 : box[64];
        note[6] = parts;
        note[5] = count;
        __threadfence();
        note[4] = number;
      }
      __syncthreads();
      if (threadIdx.x < K) slots[threadIdx.x] = lost ? 0 : box[33 + threadIdx.x];
    } else if (threadIdx.x == 0) {
      while (note[4] != number) __nanosleep(50);
      __threadfence();
      parts = note[6];
      count = note[5];
    }
    __syncthreads();
    if (count > 0 && threadIdx.x < 4 * parts) row[threadIdx.x] = table[threadIdx.x];
    const unsigned first = blockIdx.x * blockDim.x + threadIdx.x, step = gridDim.x * blockDim.x;
    for (unsigned r = 0; r < count; r++) {
      __syncthreads();
      if (threadIdx.x == 0) {
        volatile unsigned* told = note + 8 + 4 * r;
        if (blockIdx.x == 0) {
          volatile unsigned* coming = box + 68 + 4 * r;
          wait(coming + 3);
          source = lost ? 0 : *reinterpret_cast<volatile unsigned long long*>(coming);
          slot = coming[2];
          *reinterpret_cast<volatile unsigned long long*>(told) = source;
          told[2] = static_cast<unsigned>(slot);
          __threadfence();
          told[3] = number;
        } else {
          while (told[3] != number) __nanosleep(50);
          __threadfence();
          source = *reinterpret_cast<volatile unsigned long long*>(told);
          slot = told[2];
        }
      }
      __syncthreads();
      if (source == 0) continue;
      for (unsigned p = 0; p < parts; p++) {
        const uint4* from = reinterpret_cast<const uint4*>(source + row[4 * p]);
        uint4* to = reinterpret_cast<uint4*>(row[4 * p + 2] + row[4 * p + 3] * slot);
        const unsigned units = row[4 * p + 1] / 16;
        unsigned i = first;
        for (; i + 3 * step < units; i += 4 * step) {  // four loads under way in each thread
          const uint4 a = __ldcg(from + i), b = __ldcg(from + i + step);
          const uint4 c = __ldcg(from + i + 2 * step), d = __ldcg(from + i + 3 * step);
          to[i] = a;
          to[i + step] = b;
          to[i + 2 * step] = c;
          to[i + 3 * step] = d;
        }
        for (; i < units; i += step) to[i] = __ldcg(from + i);
      }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      __threadfence();
      if (atomicAdd(const_cast<unsigned*>(about) + 3, 1) == gridDim.x - 1) {
        note[3] = 0;
        __threadfence();
        note[2] = number;
      }
    }
"""
_BLOCKS, _THREADS = 8, 512  # 48 GB/s on an H100, as fast as more


def cuda_ask() -> Ask:
    """`Ask` as a CUDA kernel that asks, waits, and copies what is missing into its slots."""
    make: Any = mx.fast.cuda_kernel
    asking = make(name="squizd_ask", input_names=["chosen", "about"], output_names=["slots"], source=_ASK)

    def ask(chosen: mx.array, note: mx.array) -> mx.array:
        (slots,) = asking(
            inputs=[chosen, note],
            template=[("K", chosen.size)],
            grid=(_BLOCKS * _THREADS, 1, 1),
            threadgroup=(_THREADS, 1, 1),
            output_shapes=[chosen.shape],
            output_dtypes=[mx.uint32],
        )
        return slots  # type: ignore[no-any-return]

    return ask


class Exchange:
    """The paged layers of one model in the hands of native code; the pager's borrower between tokens."""

    def __init__(
        self, pager: Pager, layers: Sequence[tuple[Slots, int]], ask: Ask, lock: Lock, moved: Callable[[], bool]
    ) -> None:
        """`layers`: slots, and how many experts a token has. `lock`: held for a whole token.

        `moved`: whether a slot is no longer where it was. OSError if native code cannot serve these.
        """
        self._pager, self._ask, self._lock, self._moved = pager, ask, lock, moved
        self._slots = [slots for slots, _ in layers]
        transfer = pager.transfer
        if transfer is None or any(slots.shelf_handle is None for slots in self._slots):
            raise OSError("its experts are stored in a way that only Python reads")
        self._transfer: Transfer = transfer
        shape = np.array([(slots.count, k) for slots, k in layers], np.int32)
        steps, following = np.array(STEPS, np.uint64), np.array(FOLLOWING, np.uint64)
        handles = (ctypes.c_void_p * len(layers))(*[slots.shelf_handle for slots in self._slots])
        self._handle: int | None = transfer.native.squizd_exchange_open(
            ctypes.c_void_p(transfer.handle), len(layers), handles, _pointer(shape), len(steps), _pointer(steps),
            len(following), _pointer(following), ctypes.c_uint64(WEIGHT), MEMORY,
        )  # fmt: skip
        if not self._handle:
            raise OSError("it has layers with more choices than slots, or than there is room for")
        transfer.before_close.append(self._close)
        native = transfer.native
        boxes = [native.squizd_exchange_box(ctypes.c_void_p(self._handle), i) for i in range(len(layers))]
        self._notes = [mx.array([box & 0xFFFFFFFF, box >> 32] + [0] * (NOTE - 2), mx.uint32) for box in boxes]
        self._notes = [note + 0 for note in self._notes]  # computed, so that it lies in the device's own memory
        mx.eval(self._notes)
        self._asked = 0

    def rows(self, layer: int, indices: mx.array) -> mx.array:
        """The slots of the experts `indices`, once it is computed and they are resident: uint32 of the same shape."""
        self._asked += 1
        return self._ask(indices if indices.dtype == mx.uint32 else indices.astype(mx.uint32), self._notes[layer])

    @property
    def due(self) -> bool:
        """Whether what has been built of the token should be scheduled, so that the GPU has work."""
        return self._asked % SCHEDULED == 1 % SCHEDULED

    def begin(self, trial: bool) -> None:
        """A token begins."""
        if self._pager.closed:
            raise ReadError(f"{self._pager.file.path}: the model is closed")
        if self._pager.borrower is not self:
            if self._moved():
                raise RequestError(
                    f"{self._pager.file.path}: the host has read arrays of paged experts, which moves them",
                    hint="load the model again, and leave the parameters of paged layers alone",
                )
            self._pager.reclaim()
            self._pager.stop_warming()
            for index, slots in enumerate(self._slots):
                self._arrange(index, slots)
            self._pager.borrower = self
        self._asked = 0
        self._transfer.native.squizd_exchange_begin(self._at(), FIRST_PATIENCE if trial else PATIENCE)

    def finish(self) -> None:
        """All of the token is scheduled: wait until its experts are there and verified. Raises what failed first."""
        failure = (ctypes.c_int * 3)()
        self._transfer.native.squizd_exchange_finish(self._at(), self._asked, failure)
        index, expert, status = failure
        if not status:
            return
        slots, path = self._slots[index], self._pager.file.path
        if status == _BAD_CHOICE:
            raise RequestError(f"{slots.layer.path}: the router chose expert {expert}; there are {len(slots.records)}")
        reason = self._transfer.reason(status)
        raise ExpertReadError(path, slots.layer.layer, expert, slots.records[expert].offset, reason)

    def abandon(self) -> None:
        """The token came to nothing; the GPU is idle."""
        self._transfer.native.squizd_exchange_stop(self._at())

    def give_back(self) -> None:
        """Let Python decide again, once no token is under way."""
        with self._lock:
            if self._pager.borrower is self:
                self._collect()
                self._pager.borrower = None

    def _collect(self) -> None:
        stats = self._pager.stats
        for index, slots in enumerate(self._slots):
            resident = np.empty(slots.count, np.int32)
            counts, numbers = np.empty(len(slots.records), np.uint64), np.empty(8, np.uint64)
            history = np.empty(MEMORY * MOST_CHOICES, np.uint32)
            self._transfer.native.squizd_exchange_state(
                self._at(), index, _pointer(resident), _pointer(counts), _pointer(history), _pointer(numbers)
            )
            token, choices, tokens, hits, misses, evictions, size, nanoseconds = numbers.tolist()
            order = [(int(expert), slot) for slot, expert in enumerate(resident) if expert >= 0]
            slots.restore(order, (counts.tolist(), token, history[: tokens * choices].tolist(), choices))
            stats.hits += hits
            stats.misses += misses
            stats.evictions += evictions
            stats.bytes_read += size
            stats.read_seconds += nanoseconds / 1e9

    def _arrange(self, index: int, slots: Slots) -> None:
        counts, token, history, choices = slots.state()
        pairs = np.array(list(slots.slot_of.items()), np.int32).reshape(-1, 2).T.copy()
        weights, remembered = np.array(counts, np.uint64), np.array(history, np.uint32)
        tokens = len(history) // choices if choices else 0
        if self._transfer.native.squizd_exchange_arrange(
            self._at(), index, pairs.shape[1], _pointer(pairs[0]), _pointer(pairs[1]), _pointer(weights),
            token, _pointer(remembered), tokens, choices,
        ):  # fmt: skip
            raise AssertionError("Slots in a state that native code does not know")

    def _at(self) -> ctypes.c_void_p:
        return ctypes.c_void_p(self._handle)

    def _close(self) -> None:
        handle, self._handle = self._handle, None
        if handle:
            mx.synchronize()
            self._transfer.native.squizd_exchange_close(ctypes.c_void_p(handle))


def _pointer(array: Any) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
