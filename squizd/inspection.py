"""What is inside a file, in numbers: sizes by role, bits per weight, and the values of one tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .codecs import decode
from .container import File
from .container.layout import CODECS, RAW, Record, Tensor
from .errors import RequestError


@dataclass(frozen=True)
class WeightSize:
    """Parameters and stored bytes (scales and biases included, padding not), in all and by role."""

    parameters: int
    stored_bytes: int
    by_role: dict[str, tuple[int, int]]  # role -> (parameters, stored bytes)

    @property
    def bits_per_weight(self) -> float:
        """All stored weight bytes × 8 / parameters."""
        return self.stored_bytes * 8 / self.parameters


def weight_size(file: File) -> WeightSize:
    """Count parameters and stored weight bytes of `file`."""
    by_role: dict[str, list[int]] = {}

    def add(role: str, parameters: int, stored: int) -> None:
        total = by_role.setdefault(role, [0, 0])
        total[0] += parameters
        total[1] += stored

    for tensor, record in file.residents.values():
        add(tensor.role, tensor.parameters, tensor.weight_bytes if record.codec == RAW else record.stored_size)
    for layer in file.moe_layers:
        for expert in range(layer.expert_count):
            record = file.expert(layer.layer, expert)
            tensors = file.layouts[record.layout].tensors
            stored = sum(t.weight_bytes for t in tensors) if record.codec == RAW else record.stored_size
            add("expert", sum(t.parameters for t in tensors), stored)
    totals = [sum(values) for values in zip(*by_role.values(), strict=True)]
    return WeightSize(totals[0], totals[1], {role: (p, s) for role, (p, s) in sorted(by_role.items())})


def describe(file: File) -> dict[str, Any]:
    """Everything that the head tells, as plain JSON values."""
    size = weight_size(file)
    experts = {str(t.encoding) for layout in file.layouts for t in layout.tensors}
    return {
        "path": file.path,
        "size": file.size,
        "file_id": file.file_id,
        "model_type": file.metadata["model"]["config"]["model_type"],
        "parameters": size.parameters,
        "bits_per_weight": size.bits_per_weight,
        "roles": {
            role: {"parameters": p, "stored_bytes": s, "bits_per_weight": s * 8 / p}
            for role, (p, s) in size.by_role.items()
        },
        "experts": {
            "layers": len(file.moe_layers),
            "records": sum(layer.expert_count for layer in file.moe_layers),
            "encodings": ", ".join(sorted(experts)),
        },
        "record_alignment": file.record_alignment,
        "head_size": file.head_size,
        "content_flags": file.content_flags,
        "sections": [
            {
                "type": s.type.decode(),
                "offset": s.offset,
                "stored_size": s.stored_size,
                "raw_size": s.raw_size,
                "codec": CODECS[s.codec],
                "critical": s.critical,
                "digest": f"{s.digest:016x}",
            }
            for s in file.sections
        ],
        "recipe": file.metadata["recipe"],
        "source": file.metadata["provenance"].get("source", {}),
        "licence": file.metadata.get("licence", ""),
        "files": {name: record.raw_size for name, record in file.files.items()},
    }


def describe_tensor(file: File, name: str) -> list[dict[str, Any]]:
    """A resident tensor: encoding, shape, place, and statistics of its decoded values. Reads its record."""
    if name not in file.residents:
        raise RequestError(f"{file.path} has no resident tensor {name}", hint="--expert L:E shows an expert's tensors")
    tensor, record = file.residents[name]
    return [_facts(tensor, record, file.read(record, name))]


def describe_expert(file: File, layer: int, expert: int) -> list[dict[str, Any]]:
    """The same for every tensor of one expert."""
    record = file.expert(layer, expert)
    raw = file.read_expert(layer, expert)
    return [_facts(tensor, record, raw) for tensor in file.layouts[record.layout].tensors]


def _facts(tensor: Tensor, record: Record, raw: memoryview) -> dict[str, Any]:
    values = decode(tensor, raw).astype(np.float64)
    return {
        "name": tensor.name,
        "role": tensor.role,
        "encoding": str(tensor.encoding),
        "shape": list(tensor.shape),
        "parameters": tensor.parameters,
        "bytes": tensor.weight_bytes,
        "record": {
            "offset": record.offset, "stored_size": record.stored_size, "raw_size": record.raw_size,
            "codec": CODECS[record.codec], "digest": f"{record.digest:016x}",
        },
        "min": float(values.min()),
        "max": float(values.max()),
        "mean": float(values.mean()),
        "std": float(values.std()),
        "zeros": float((values == 0).mean()),
    }  # fmt: skip
