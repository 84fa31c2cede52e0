"""How a GPU in the middle of a token asks the host for slots, waits, and fetches what is missing: one CUDA kernel.

What it does is described where it is used (`exchange`); the memory it shares with the host is a Box of
`kernels/src/exchange.h`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

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
