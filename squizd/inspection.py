"""What is inside a file, in numbers: sizes by role, bits per weight. Reads the head only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .container import File
from .container.layout import RAW


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
        "sections": [
            {"type": s.type.decode(), "offset": s.offset, "stored_size": s.stored_size, "critical": s.critical}
            for s in file.sections
        ],
        "recipe": file.metadata["recipe"],
        "source": file.metadata["provenance"].get("source", {}),
        "licence": file.metadata.get("licence", ""),
        "files": {name: record.raw_size for name, record in file.files.items()},
    }
