"""Arrays too large for memory, for as long as one pass over a model needs them.

In a file without a name, which the system takes back however the process ends; on a GPU with memory of its own they
stay there. Knows nothing of what they hold.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from .backend import on_cuda
from .errors import OutputError

Folder = str | os.PathLike[str] | None


class Scratch:
    """A list of float32 arrays [..., width] of one width; the same bits come back.

    `folder` is where the file lies, None for the system's temporary folder. Raises OutputError if the disk is full.
    """

    def __init__(self, folder: Folder = None) -> None:
        self._shapes: list[tuple[int, ...]] = []
        self._starts = [0]  # in numbers
        self._folder, self._file = folder, -1
        self._here: list[mx.array] | None = [] if on_cuda() else None

    def __del__(self) -> None:
        if self._file >= 0:
            os.close(self._file)

    def __len__(self) -> int:
        return len(self._shapes)

    def append(self, array: mx.array) -> None:
        """One more."""
        self._shapes.append(array.shape)
        self._starts.append(self._starts[-1] + array.size)
        if self._here is not None:
            self._here.append(array)
        self[len(self) - 1] = array

    def __setitem__(self, position: int, array: mx.array) -> None:
        if array.dtype != mx.float32 or array.shape != self._shapes[position]:
            raise ValueError(f"{array.dtype} {array.shape} in place of float32 {self._shapes[position]}")
        if self._here is not None:
            self._here[position] = array
            mx.eval(array)
            return
        data = memoryview(np.array(mx.contiguous(array), copy=False)).cast("B")
        at = 4 * self._starts[position]
        try:
            if self._file < 0:
                if self._folder is not None:
                    os.makedirs(self._folder, exist_ok=True)
                self._file, name = tempfile.mkstemp(dir=self._folder)
                os.unlink(name)
            while data:
                count = os.pwrite(self._file, data, at)
                data, at = data[count:], at + count
        except OSError as error:
            raise OutputError(
                f"cannot write intermediate results to {self._folder or tempfile.gettempdir()}: {error.strerror}",
                hint="free some space and run the same command again",
            ) from error

    def __getitem__(self, position: int) -> mx.array:
        if self._here is not None:
            return self._here[position]
        found = np.empty(self._shapes[position], np.float32)
        self._read(found, self._starts[position])
        return mx.array(found)

    def __iter__(self) -> Iterator[mx.array]:
        return (self[i] for i in range(len(self)))

    def rows(self, numbers: npt.NDArray[np.intp]) -> mx.array:
        """Rows [n, width], counted through all arrays; what was appended may be one array from then on."""
        width = self._shapes[0][-1]
        if self._here is not None:
            if len(self) > 1:
                joined = mx.concatenate([a.reshape(-1, width) for a in self._here])
                mx.eval(joined)
                self._here, self._shapes, self._starts = [joined], [joined.shape], [0, joined.size]
            return mx.take(self._here[0].reshape(-1, width), mx.array(numbers.astype(np.int32)), axis=0)
        found = np.empty((len(numbers), width), np.float32)
        # Rows that lie one after another are one read.
        breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
        for start, end in zip([0, *breaks], [*breaks, len(numbers)], strict=True):
            if start < end:
                self._read(found[start:end], int(numbers[start]) * width)
        return mx.array(found)

    def _read(self, into: npt.NDArray[np.float32], at: int) -> None:
        view, at = memoryview(into).cast("B"), 4 * at
        while view:
            count = os.preadv(self._file, [view], at)
            if not count:
                raise OutputError("intermediate results are cut short")
            view, at = view[count:], at + count
