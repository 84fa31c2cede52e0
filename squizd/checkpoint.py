"""A Hugging Face checkpoint, in a folder or on the hub, as named lazy tensors.

Knows where files are and whether they are whole. Names and shapes come out as mlx-lm's `sanitize`
maps them; nothing is read from a shard before its tensor is evaluated.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import re
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import hub
from .errors import OutputError, SourceError

# Embedded in the file by bare name. Never code: nothing in a .squizd file is executed.
TOKENIZER_FILES = (
    "tokenizer*.json", "tokenizer.model", "*.tiktoken", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json",
    "special_tokens_map.json", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip
_SMALL = (*TOKENIZER_FILES, "config.json", "*.safetensors.index.json", "README.md")
# Shards at once: one core hashes 1.1 GB/s, and a GPU quantizes as much.
HASHERS = max(1, min(4, (os.cpu_count() or 1) // 4))
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass
class Checkpoint:
    """A whole checkpoint on this machine. `repo` and `revision` are empty for a local folder."""

    folder: Path
    config: dict[str, Any]
    shards: list[Path]
    repo: str = ""
    revision: str = ""
    sizes: dict[str, int] = field(default_factory=dict)
    remote: hub.Remote | None = None  # where shards come from that are stand-ins

    def bundle(self) -> dict[str, bytes]:
        """Tokenizer, chat template and generation config, by bare name."""
        names = sorted(p.name for p in self.folder.iterdir() if p.is_file())
        wanted = [n for n in names if any(fnmatch.fnmatchcase(n, pattern) for pattern in TOKENIZER_FILES)]
        contents = {name: (self.folder / name).read_bytes() for name in wanted}
        return {name: data for name, data in contents.items() if data}

    def licence(self) -> str:
        """The licence that the model card's front matter names, or an empty string."""
        card = self.folder / "README.md"
        text = card.read_text("utf-8", "replace")[:20000] if card.is_file() else ""
        front = re.match(r"---\n(.*?\n)---", text, re.DOTALL)
        line = re.compile(r"^license:[ \t]*(?:\n\s*-[ \t]+)?['\"]?([^'\"\n]+)", re.MULTILINE)
        found = line.search(front[1]) if front else None
        return found[1].strip() if found else ""

    def fingerprint(self) -> bytes:
        """Identifies the source's state cheaply: names and sizes of its shards, and its commit or else their times."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for name, size in self.files():
            digest.update(f"{name}\0{size}\0".encode())
        if self.revision:
            digest.update(f"{self.repo}\0{self.revision}".encode())
        else:
            for shard in self.shards:
                digest.update(f"{shard.stat().st_mtime_ns}\0".encode())
        return digest.digest()

    def files(self) -> list[tuple[str, int]]:
        """Name and size of every shard."""
        if self.remote is not None:
            return [(shard.name, shard.size) for shard in self.remote.shards]
        return [(shard.name, shard.stat().st_size) for shard in self.shards]

    def hashes(self, stop: threading.Event | None = None) -> list[dict[str, Any]]:
        """Name, size and SHA-256 of every shard; reads them all, or gives up soon after `stop` is set.

        Of stand-ins there are none: shards are hashed as they come (`streaming`).
        """

        def hashed(shard: Path) -> dict[str, Any]:
            digest = hashlib.sha256()
            # One buffer, for fresh memory costs nearly half as much as hashing what is read into it. Pieces are large
            # because after each a busy interpreter lets this thread wait.
            buffer = memoryview(bytearray(1 << 22))
            with shard.open("rb", buffering=0) as f:
                while (count := f.readinto(buffer)) and not (stop and stop.is_set()):
                    digest.update(buffer[:count])
            return {"name": shard.name, "size": shard.stat().st_size, "sha256": digest.hexdigest()}

        with ThreadPoolExecutor(HASHERS) as pool:
            return list(pool.map(hashed, self.shards if self.remote is None else ()))


def open_checkpoint(
    source: str | os.PathLike[str], revision: str | None = None, shards_later: Path | None = None
) -> Checkpoint:
    """A local folder, or else a repository id that huggingface_hub fetches.

    With a folder `shards_later` shards that are not in the hub's cache are not fetched: there are stand-ins in that
    folder (`hub.Shard.hollow`), and `remote`. Raises SourceError when the checkpoint is absent, incomplete or damaged.
    """
    name = os.fspath(source)
    folder, repo = Path(name), ""
    if folder.is_file():
        raise SourceError(f"{name} is a file", hint="give the folder that holds config.json, or a repository id")
    if not folder.is_dir():
        if not _REPO_ID.fullmatch(name):
            raise SourceError(
                f"{name}: no such folder", hint="give a folder with config.json, or a repository id org/name"
            )
        if shards_later is not None:
            found = _open_remote(name, revision, shards_later)
            if found is not None:
                return found
        folder, repo = hub.snapshot(name, revision, [*_SMALL, "*.safetensors"]), name
    config = _read_config(folder)
    shards = _find_shards(folder)
    checkpoint = Checkpoint(folder, config, shards, repo, _commit(folder) if repo else "")
    for shard in shards:
        checkpoint.sizes.update(_check_shard(shard))
    return checkpoint


def _open_remote(repo: str, revision: str | None, place: Path) -> Checkpoint | None:
    """A checkpoint of stand-ins; None if there is nothing to fetch."""
    folder = hub.snapshot(repo, revision, _SMALL)
    config = _read_config(folder)
    index = folder / "model.safetensors.index.json"
    names = _indexed(index) if index.is_file() else None
    remote = hub.remote(repo, folder.name, names, place)
    if remote is None:
        return None
    hollow = place / "hollow"
    try:
        hollow.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write {hollow}: {error.strerror}") from error
    checkpoint = Checkpoint(folder, config, [hollow / s.name for s in remote.shards], repo, folder.name, remote=remote)
    for shard, path in zip(remote.shards, checkpoint.shards, strict=True):
        shard.hollow(path)
        checkpoint.sizes.update(_check_shard(path))
    return checkpoint


def _first_line(error: Exception) -> str:
    """What an error says, or at least what it is."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _commit(folder: Path) -> str:
    """The commit that a hub snapshot folder is named after."""
    return folder.name if re.fullmatch(r"[0-9a-f]{40}", folder.name) else ""


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise SourceError(f"{path.parent} has no {path.name}", hint="is this a Hugging Face model folder?") from error
    except (OSError, ValueError) as error:
        raise SourceError(f"{path}: {_first_line(error)}") from error
    if not isinstance(value, dict):
        raise SourceError(f"{path} is not a JSON object")
    return value


def _read_config(folder: Path) -> dict[str, Any]:
    config = _read_json(folder / "config.json")
    if not isinstance(config.get("model_type"), str):
        raise SourceError(f"{folder / 'config.json'} names no model_type")
    return config


def _indexed(index: Path) -> list[str]:
    """Names of the shards that an index lists."""
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{index} has no weight_map")
    return sorted({os.path.basename(str(name)) for name in weight_map.values()})


def _find_shards(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = _indexed(index)
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise SourceError(
                f"{folder}: {len(missing)} of {len(names)} shards are missing, the first is {missing[0]}",
                hint="download the missing files",
            )
        return [folder / name for name in names]
    shards = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))
    if not shards:
        raise SourceError(
            f"{folder} holds no .safetensors file", hint="pickled .bin checkpoints are not read; convert them first"
        )
    return shards


def _check_shard(path: Path) -> dict[str, int]:
    """Bytes by tensor name from a shard's header; SourceError unless the file is as long as it says."""
    size = path.stat().st_size
    try:
        with path.open("rb") as f:
            (length,) = struct.unpack("<Q", f.read(8))
            if length > size - 8:
                raise ValueError("the header is cut short")
            header = json.loads(f.read(length))
        spans = {name: e["data_offsets"] for name, e in header.items() if name != "__metadata__"}
        end = 8 + length + max((end for _, end in spans.values()), default=0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise SourceError(f"{path}: not a whole safetensors file: {error}", hint="fetch it again") from error
    if end != size:
        raise SourceError(f"{path}: {size} bytes where its header says {end}", hint="fetch it again")
    return {name: stop - start for name, (start, stop) in spans.items()}
