"""A repository compressed shard by shard: the disk holds the file, one shard, and what is still needed of earlier ones.

Every shard has a hollow stand-in from the start, a file of its header and zeros that takes no room, so names, shapes
and mlx-lm's `sanitize` are those of the whole checkpoint. A unit (a tensor, or one layer's experts) is due when the
last shard that it is made from is there; what later units need of a shard is copied into its stand-in.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from .architecture import build
from .checkpoint import Checkpoint
from .errors import SourceError
from .hub import Remote, Shard
from .weights import read, sources

_HASHES = "hashes.json"


def by_shard(
    checkpoint: Checkpoint,
    remote: Remote,
    units: Mapping[Hashable, list[str]],
    write: Callable[[Hashable, dict[str, mx.array]], None],
) -> list[dict[str, Any]]:
    """Call `write(unit, weights)` for every unit as soon as its tensors are there; returns the shards' hashes.

    `units`: the names, in mlx-lm's model, of the tensors that each is made from. Raises SourceError for a shard that is
    not what the hub says it is.
    """
    model = build(checkpoint.config, remote.repo)
    traced = sources(checkpoint, model)
    home = {name: k for k, shard in enumerate(remote.shards) for name in shard.tensors}
    needs = {unit: set().union(*(traced[name] for name in names)) for unit, names in units.items()}
    due = {unit: max(home[name] for name in names) for unit, names in needs.items()}
    hashes = _Hashes(remote.folder / _HASHES)
    left = set(units)
    for k, shard in enumerate(remote.shards):
        wanted = {name for unit in left for name in needs[unit] if home[name] == k}
        if not wanted and hashes.of(shard):
            continue
        real = remote.fetch(shard)
        hashes.add(shard, real)
        weights = read(replace(checkpoint, shards=[*checkpoint.shards[:k], real, *checkpoint.shards[k + 1 :]]), model)
        for unit in units:
            if unit in left and due[unit] == k:
                write(unit, weights)
                left.discard(unit)
        weights.clear()  # the disk takes back the room of a file once nobody has it open
        later = [name for name in shard.tensors if any(name in needs[unit] for unit in left)]
        shard.copy(real, checkpoint.shards[k], later)
        remote.drop(real)
        for i in range(k):
            if not any(home[name] == i for unit in left for name in needs[unit]):
                remote.shards[i].hollow(checkpoint.shards[i])
    return [{"name": s.name, "size": s.size, "sha256": hashes.of(s)} for s in remote.shards]


class _Hashes:
    """SHA-256 by shard, kept beside the stand-ins."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._found = dict(json.loads(path.read_text()))
        except (OSError, ValueError):
            self._found = {}

    def of(self, shard: Shard) -> str:
        """The hub's own, or what was found before, or ""."""
        return shard.sha256 or str(self._found.get(shard.name, ""))

    def add(self, shard: Shard, path: Path) -> None:
        """Hash a file; SourceError if the hub says otherwise."""
        with path.open("rb") as f:
            found = hashlib.file_digest(f, "sha256").hexdigest()
        if shard.sha256 and found != shard.sha256:
            path.unlink()
            raise SourceError(f"{shard.name} was damaged on its way: its SHA-256 is not the hub's", hint="run it again")
        self._found[shard.name] = found
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(self._found))
        partial.replace(self._path)
