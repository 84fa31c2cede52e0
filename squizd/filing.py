"""What a file is to hold, as the container's writer wants it: records, embedded files, metadata, provenance."""

from __future__ import annotations

import hashlib
from functools import cache
from typing import Any

from mlx_lm.utils import _encode_tagged_floats

from . import __version__
from .architecture import layer_ids
from .checkpoint import Checkpoint
from .container import Plan
from .container.layout import RAW, ZSTD, MoeLayer, make_layout
from .container.metadata import MetadataError
from .container.writer import choose_alignment
from .errors import SourceError
from .guide import Guide
from .inventory import QUANTIZATION_KEYS, Inventory
from .recipe import Recipe


def plan_of_file(
    checkpoint: Checkpoint, job: Inventory, recipe: Recipe, quantizer: str, zstd: bool, guide: Guide
) -> Plan:
    """The container's plan; hashes of the source are zeros, to be filled in when all of it was read.

    Its fingerprint changes with everything that stored bytes depend on. Raises SourceError for a config that the
    format cannot hold.
    """
    paths = list(job.experts)
    make = cache(make_layout)  # most experts are laid out alike
    layouts = {
        path: [make(tuple(item.entry(expert) for item in items)) for expert in range(job.counts[path])]
        for path, items in job.experts.items()
    }
    distinct = list(dict.fromkeys(layout for some in layouts.values() for layout in some))
    number = {layout: i for i, layout in enumerate(distinct)}
    bundle = checkpoint.bundle()
    agreed = (
        recipe,
        quantizer,
        zstd,
        guide.digest(),
        __version__,
        [(name, hashlib.sha256(d).digest()) for name, d in bundle.items()],
    )
    try:
        return Plan(
            _metadata(checkpoint, recipe, quantizer, guide),
            [item.entry() for item in job.residents],
            bundle,
            distinct,
            [MoeLayer(i, path, job.counts[path]) for i, path in zip(layer_ids(paths), paths, strict=True)],
            [[number[layout] for layout in layouts[path]] for path in paths],
            choose_alignment(layout.raw_size for path in paths for layout in layouts[path]),
            ZSTD if zstd else RAW,
            fingerprint=hashlib.sha256(checkpoint.fingerprint() + repr(agreed).encode()).digest(),
        )
    except MetadataError as error:
        raise SourceError(f"config.json cannot be stored: {error}") from error


def _metadata(checkpoint: Checkpoint, recipe: Recipe, quantizer: str, guide: Guide) -> dict[str, Any]:
    files = [{"name": name, "size": size, "sha256": "0" * 64} for name, size in checkpoint.files()]
    source: dict[str, Any] = {"files": files}
    if checkpoint.repo:
        source |= {"repo": checkpoint.repo, "revision": checkpoint.revision}
    config = {key: value for key, value in checkpoint.config.items() if key not in QUANTIZATION_KEYS}
    metadata: dict[str, Any] = {
        "model": {"config": _encode_tagged_floats(config)},
        "recipe": {**recipe.describe(), "quantizer": quantizer},
        "provenance": {"tool": "squizd", "version": __version__, "source": source},
    }
    if guide.statistics is not None:
        metadata["provenance"]["calibration"] = guide.statistics.source
    if licence := checkpoint.licence():
        metadata["licence"] = licence
    return metadata
