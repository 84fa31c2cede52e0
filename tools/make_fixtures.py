"""Make the test vectors of the format: fixtures/valid and fixtures/invalid.

    python tools/make_fixtures.py [FOLDER]     default: fixtures/ of this repository
    python tools/make_fixtures.py --dump       print the worked example of the spec

Deterministic: the same bytes on every machine. Needs xxhash, but not squizd: the vectors are a second
implementation of the writing side of spec/squizd.md (`tools/vectors`).

fixtures/valid/NAME.squizd has NAME.json beside it, which lists every tensor with its encoding; the
decoded values of float tensors are NAME.npy, one float32 array for all of them (`start`, `count`); those
of integer tensors stand in the JSON. fixtures/invalid/CODE.squizd breaks the rule CODE and no other that
is checked before it, and so does CODE.MORE.squizd, in another way or with a second fault after it; index.json
says what was changed, and whether only deep validation, or only a reader with zstd, can tell.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from vectors import edges, invalid, more, valid  # noqa: F401  (more and edges add to the faults of invalid)
from vectors.build import Spec, Tensor, lay_out, raw_record, seal
from vectors.dump import dump
from vectors.tensors import INTEGERS


def describe(spec: Spec, data: bytes) -> tuple[dict[str, Any], list[float]]:
    """What a reader must find in the file, and the values of its float tensors one after another."""
    values: list[float] = []

    def entry(t: Tensor) -> dict[str, Any]:
        out: dict[str, Any] = {
            "name": t.name, "role": t.role, "mode": t.mode, "dtype": t.dtype, "bits": t.bits,
            "group_size": t.group_size, "shape": list(t.shape),
        }  # fmt: skip
        if t.dtype in INTEGERS and t.mode == "raw":
            return out | {"integers": t.values}
        out["values"] = {"start": len(values), "count": len(t.values)}
        values.extend(t.values)
        return out

    head_size = int.from_bytes(data[72:80], "little")
    facts = {
        "size": len(data), "sha256": hashlib.sha256(data).hexdigest(),
        "file_id": hashlib.sha256(data[:head_size]).hexdigest(), "record_alignment": spec.alignment,
        "content_flags": int.from_bytes(data[64:68], "little"), "metadata": json.loads(spec.metadata),
        "files": {name: hashlib.sha256(content).hexdigest() for name, content, _ in spec.files},
        "residents": [entry(t) for t, _ in spec.residents],
        "experts": [
            {"layer": layer, "expert": i, "path": path, "raw_size": len(raw_record(e.tensors)),
             "tensors": [entry(t) for t in e.tensors]}
            for layer, path, experts in spec.layers for i, e in enumerate(experts)
        ],
        "appendices": {a.type: hashlib.sha256(a.content).hexdigest() for a in spec.appendices},
    }  # fmt: skip
    return facts, values


def npy(values: list[float]) -> bytes:
    """A one-dimensional float32 array in NumPy's format, version 1.0."""
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({len(values)},), }}"
    header += " " * (-(10 + len(header) + 1) % 64) + "\n"
    body = b"".join(b"\0\0\xc0\x7f" if math.isnan(v) else struct.pack("<f", v) for v in values)
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + body


def make(folder: Path) -> None:
    """Write all vectors below `folder`."""
    for name in ("valid", "invalid"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name, maker in sorted(valid.MAKERS.items()):
        spec = maker()
        data = seal(lay_out(spec))
        facts, values = describe(spec, data)
        target = folder / "valid" / name
        target.with_suffix(".squizd").write_bytes(data)
        target.with_suffix(".json").write_text(json.dumps(facts, sort_keys=True) + "\n")
        target.with_suffix(".npy").write_bytes(npy(values))
    index = []
    for name, fault in invalid.FAULTS.items():
        code, _, _ = name.partition(".")
        (folder / "invalid" / f"{name}.squizd").write_bytes(fault.make())
        index.append(
            {"file": f"{name}.squizd", "code": code, "deep": fault.deep, "coded": fault.coded, "base": fault.base,
             "change": fault.change}
        )  # fmt: skip
    (folder / "invalid" / "index.json").write_text(json.dumps(index, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:] == ["--dump"]:
        sys.stdout.write(dump(seal(lay_out(valid.toy()))))
        sys.exit()
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent.parent / "fixtures")
