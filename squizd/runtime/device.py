"""All that differs between MLX's backends: number types, buffers, memory. The only module that asks which one runs.

CPU computes bfloat16 and float16 in software (moe-82m at 4 bits: 16 tokens/s in bf16, 3 in f16, 90 in
f32), so there every float is widened to float32 when it is loaded. Elsewhere numbers stay as stored.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .. import kernels
from ..backend import on_cpu, on_cuda
from ..kernels import layers, replay
from ..kernels.replay import Replay
from . import transfer as transfers
from .asking import Ask, cuda_ask
from .lending import Lending
from .source import Bytes
from .transfer import Transfer, cuda_library

_TYPES: Final = {
    "f32": mx.float32, "f16": mx.float16, "bf16": mx.bfloat16,
    "u8": mx.uint8, "i8": mx.int8, "u16": mx.uint16, "i16": mx.int16, "u32": mx.uint32, "i32": mx.int32,
    "u64": mx.uint64, "i64": mx.int64,
}  # fmt: skip


_as_stored = False


def widened(stored: str) -> str:
    """`stored` (f16 or bf16) if it must become f32 on this device, else ""; see `io.Part`."""
    return stored if stored in ("f16", "bf16") and on_cpu() and not _as_stored else ""


@contextmanager
def as_stored() -> Iterator[None]:
    """A model loaded inside keeps the file's number types, also on CPU: what mlx-lm does, to compare with."""
    global _as_stored
    before, _as_stored = _as_stored, True
    try:
        yield
    finally:
        _as_stored = before


def compute_type(stored: str) -> mx.Dtype:
    """The MLX type in which numbers stored as `stored` take part in computation."""
    return mx.float32 if widened(stored) else _TYPES[stored]


def allocate(shape: tuple[int, ...], dtype: mx.Dtype) -> tuple[mx.array, Bytes]:
    """An evaluated array of zeros and a writable view of its bytes, [first dimension, bytes of one row].

    The view keeps the buffer alive. Write to it only while nothing in flight reads the array.
    """
    base = mx.zeros(shape or (1,), mx.uint16 if dtype == mx.bfloat16 else dtype)  # NumPy has no bfloat16
    mx.eval(base)
    view = np.array(base, copy=False).reshape(len(base) if shape else 1, -1).view(np.uint8)
    array = base.view(dtype) if base.dtype != dtype else base
    if not shape:
        array = array.reshape(())
    mx.eval(array)
    return array, view


def transfer(record_bytes: int) -> Transfer | None:
    """What fills expert slots, records of up to `record_bytes`, where writing to an array's view is slow."""
    return Transfer(record_bytes, cuda_library()) if on_cuda() and cuda_library() and not transfers.missing() else None


def drafts(views: Sequence[Bytes]) -> Sequence[Bytes]:
    """Where to put what is meant for `views`: there, or in buffers that `publish` takes from."""
    return [np.empty_like(view) for view in views] if on_cuda() and cuda_library() else views


def publish(written: Sequence[Bytes], views: Sequence[Bytes]) -> None:
    """Move what was written to `drafts(views)` to `views`. OSError if the GPU cannot."""
    for source, target in zip(written, views, strict=True):
        if source is not target:
            transfers.copy(target, source)


def defers() -> bool:
    """Whether waiting late for routers pays: where computing is asynchronous to the host."""
    return not on_cpu()


def ask() -> Ask | None:
    """How a computation can ask the host for something and wait, if this device can. Not with SQUIZD_EXCHANGE=0."""
    return cuda_ask() if on_cuda() and os.environ.get("SQUIZD_EXCHANGE") != "0" else None


def small_mail() -> bool:
    """Whether only small arrays can be shared with the host for nothing: see `mailbox`."""
    return on_cuda()


def fuses() -> bool:
    """Whether one product of twice the rows is faster than two."""
    return not on_cpu()


def accelerate(model: nn.Module, lending: Lending | None = None) -> Replay | None:
    """Let squizd's kernels compute what they can of `model` where MLX's are slow: on Linux CPUs, if compiled.

    With `lending`, of its paged layers if it has any, single tokens are replayed without their graph.
    """
    if sys.platform == "linux" and on_cpu() and layers.adopt(model) and lending is not None:
        lending.shelve(kernels.native())
        return replay.install(model, lending)
    return None


def fuses_attention() -> bool:
    """Whether attention is computed without an array of its scores."""
    return sys.platform == "linux" and on_cpu() and not kernels.missing()


def scratch_bytes() -> int:
    """Memory that `accelerate` keeps besides MLX's own: part of a budget."""
    return kernels.scratch_bytes() if sys.platform == "linux" and on_cpu() else 0


def arithmetic() -> str:
    """What computes on this device, for a statistics line; the reason where squizd's kernels could and do not."""
    if sys.platform != "linux" or not on_cpu():
        slow = transfers.missing() if on_cuda() else ""
        return f"MLX; experts are copied slowly: {slow}" if slow else "MLX"
    reason = kernels.missing()
    return f"MLX: {reason}" if reason else kernels.describe()


def available_memory() -> int:
    """Bytes that a model may reasonably take now: free memory of this process's device, cgroup limits respected."""
    if not on_cpu():
        info = mx.device_info()
        total = info.get("max_recommended_working_set_size") or info.get("memory_size") or info.get("total_memory")
        if total:
            return int(total) - mx.get_active_memory()
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    limit, used = _lines("/sys/fs/cgroup/memory.max"), _lines("/sys/fs/cgroup/memory.current")
    if limit and used and limit[0].isdigit() and used[0].isdigit():
        free = min(free, int(limit[0]) - int(used[0]))
    return max(free, 0)


def limit_buffer_cache(size: int) -> None:
    """Let MLX keep at most `size` bytes of freed buffers; process-wide."""
    mx.set_cache_limit(size)


def trim() -> None:
    """Give freed memory back to the system where the allocator would keep it: after a prompt, not after each token.

    Caches grow by copying, and what they leave behind is too small and scattered for glibc to return by itself:
    in a conversation over 2,600 tokens a resident set that should not grow grew by a third.
    """
    if on_cpu() and _libc is not None:
        _libc.malloc_trim(0)


def _find_libc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL(None)
    except (OSError, TypeError):  # TypeError: Windows
        return None
    return libc if hasattr(libc, "malloc_trim") else None  # glibc only


_libc = _find_libc()


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
