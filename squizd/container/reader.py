"""Open a `.squizd` file and hand out its parts. Needs no MLX.

Reads are positioned (`pread`), never through a mapping: a file that shrinks or sits on a failing
disk gives an error here, where a mapped page would kill the process with SIGBUS.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from ..errors import ExpertReadError, FormatError, ReadError, RequestError
from . import records
from .appendices import NAMES, Document, read_lines
from .layout import Array, Layout, MoeLayer, Record, Section, Tensor
from .parse import Contents, parse
from .restricted import DocumentError


def read_at(fd: int, offset: int, size: int) -> bytes:
    """`size` bytes at `offset`, fewer only at the end of the file."""
    chunks: list[bytes] = []
    while size:
        chunk = os.pread(fd, min(size, 1 << 30), offset)
        if not chunk:
            break
        chunks.append(chunk)
        offset, size = offset + len(chunk), size - len(chunk)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


class File:
    """An open, structurally valid file. A context manager; the descriptor closes with it."""

    def __init__(self, path: str, fd: int, contents: Contents) -> None:
        self.path, self._fd, self._contents = path, fd, contents
        self._first = dict[int, tuple[int, int]]()  # layer -> (place of its first expert in EXPI, expert count)
        position = 0
        for layer in contents.moe_layers:
            self._first[layer.layer] = position, layer.expert_count
            position += layer.expert_count

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self._contents.file_size

    @property
    def file_id(self) -> str:
        """Hex SHA-256 of the head, which holds the digests of everything else (spec, "Identity")."""
        return self._contents.file_id

    @property
    def content_flags(self) -> int:
        """The header's content flags."""
        return self._contents.content_flags

    @property
    def record_alignment(self) -> int:
        """Bytes to which expert records are aligned and padded."""
        return self._contents.record_alignment

    @property
    def head_size(self) -> int:
        """Bytes of header, directory, metadata and indexes together."""
        return self._contents.head_size

    @property
    def metadata(self) -> dict[str, Any]:
        """The decoded META section."""
        return self._contents.metadata

    @property
    def sections(self) -> tuple[Section, ...]:
        """The directory, in file order."""
        return self._contents.sections

    @property
    def residents(self) -> dict[str, tuple[Tensor, Record]]:
        """Resident tensors by name, in file order."""
        return self._contents.residents

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """The shard layouts that expert records refer to."""
        return self._contents.layouts

    @property
    def moe_layers(self) -> tuple[MoeLayer, ...]:
        """The modules that hold experts, ascending by layer id."""
        return self._contents.moe_layers

    @property
    def files(self) -> dict[str, Record]:
        """Records of the embedded files by bare name."""
        return self._contents.files

    def fileno(self) -> int:
        """The descriptor, for positioned reads; valid until `close`."""
        if self._fd < 0:
            raise ReadError(f"{self.path}: the file is closed")
        return self._fd

    def expert(self, layer: int, expert: int) -> Record:
        """Where one expert's record lies; RequestError if the file has no such expert."""
        first, count = self._first.get(layer, (0, 0))
        if not 0 <= expert < count:
            listed = ", ".join(str(x.layer) for x in self.moe_layers[:8]) or "none"
            raise RequestError(
                f"{self.path} has no layer {layer} expert {expert}", hint=f"layers with experts: {listed} ..."
            )
        return _record(self._contents.experts[first + expert].item())

    def experts(self, layer: int) -> list[Record]:
        """The records of all experts of a layer, in order; RequestError if there is no such layer."""
        self.expert(layer, 0)
        first, count = self._first[layer]
        return [_record(row) for row in self._contents.experts[first : first + count].tolist()]

    def read(self, record: Record, what: str) -> memoryview:
        """Decoded bytes of `record`, digest verified. `what` names it in a ReadError or FormatError."""
        stored = self._stored(record, what)
        if not records.check_digest(stored, record):
            raise FormatError(self.path, "record-digest", record.offset, f"{what} does not match its digest")
        raw, fault = records.decode(stored, record)
        if fault is not None:
            raise FormatError(self.path, fault.code, fault.offset, f"{what}: {fault.message}")
        return raw

    def read_expert(self, layer: int, expert: int) -> memoryview:
        """Decoded bytes of one expert's record; ExpertReadError if they cannot be had intact."""
        record = self.expert(layer, expert)
        try:
            return self.read(record, f"layer {layer} expert {expert}")
        except (ReadError, FormatError) as error:
            raise ExpertReadError(self.path, layer, expert, record.offset, str(error)) from error

    def bundle(self) -> dict[str, bytes]:
        """The embedded files by bare name."""
        return {name: bytes(self.read(record, f"embedded file {name}")) for name, record in self.files.items()}

    def appendix(self, kind: bytes) -> list[Document]:
        """The lines of appendix PROF, SPRS or DRFT (spec, "Appendices"), digest verified; none if it is absent.

        Their structure is JSON, but what they say is not checked against the file: `validate` does that.
        """
        section = next((s for s in self.sections if s.type == kind and kind in NAMES), None)
        if section is None:
            return []
        record = Record(section.offset, section.stored_size, section.raw_size, section.codec, section.digest)
        try:
            return list(read_lines([self.read(record, f"section {section.label}")]))
        except DocumentError as error:
            raise FormatError(self.path, error.code, section.offset, f"section {section.label}: {error}") from error

    def array(self, name: str) -> Array:
        """A resident tensor, decoded to float32 (integers stay as they are), in its logical shape."""
        from ..codecs import decode

        if name not in self.residents:
            raise RequestError(f"{self.path} has no resident tensor {name}")
        tensor, record = self.residents[name]
        return decode(tensor, self.read(record, name))

    def expert_arrays(self, layer: int, expert: int) -> dict[str, Array]:
        """One expert's tensors by name ("gate_proj.weight"), decoded as by `array`."""
        from ..codecs import decode

        raw = self.read_expert(layer, expert)
        return {t.name: decode(t, raw) for t in self.layouts[self.expert(layer, expert).layout].tensors}

    def close(self) -> None:
        """Close the descriptor; closing twice is fine."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> File:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def _stored(self, record: Record, what: str) -> bytes:
        try:
            stored = read_at(self.fileno(), record.offset, record.stored_size)
        except OSError as error:
            raise ReadError(f"{self.path}: {what} at byte {record.offset}: {error.strerror}") from error
        if len(stored) < record.stored_size:
            raise ReadError(f"{self.path}: {what} at byte {record.offset}: {len(stored)} of {record.stored_size} bytes")
        return stored


def open_descriptor(path: str | os.PathLike[str]) -> tuple[int, int]:
    """(descriptor, size) of a regular file; ReadError otherwise."""
    name = os.fspath(path)
    try:
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise ReadError(f"{name}: {error.strerror}", hint="check the path") from error
    except ValueError as error:
        raise ReadError(f"{name!r} is no path: {error}") from error
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise ReadError(f"{name} is not a file", hint="give the path of one .squizd file")
    except BaseException:
        os.close(fd)
        raise
    return fd, info.st_size


def open(path: str | os.PathLike[str]) -> File:
    """Open a file and check its structure (header, directory, indexes; not the payload).

    Raises ReadError if the bytes cannot be read and FormatError for the first broken rule.
    """
    name = os.fspath(path)
    fd, size = open_descriptor(path)
    try:
        contents, faults = parse(lambda offset, count: read_at(fd, offset, count), size)
        _raise_first(name, faults)
    except OSError as error:
        os.close(fd)
        raise ReadError(f"{name}: {error.strerror}") from error
    except BaseException:
        os.close(fd)
        raise
    return File(name, fd, contents)


def _record(row: Any) -> Record:
    """Of an entry of EXPI."""
    _, _, (offset, stored_size, raw_size, codec, layout, _, digest) = row
    return Record(offset, stored_size, raw_size, codec, digest, layout)


def _raise_first(path: str, faults: Sequence[Any]) -> None:
    if faults:
        raise FormatError(path, faults[0].code, faults[0].offset, faults[0].message)
