"""Repositories on the Hugging Face hub, through huggingface_hub: whole, or one file at a time.

Honours HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE and HF_HOME as that does. Its errors become SourceErrors of one line.
"""

from __future__ import annotations

import errno
import json
import struct
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import OutputError, SourceError


@contextmanager
def _errors(repo: str, revision: str | None) -> Iterator[None]:
    from huggingface_hub import errors

    try:
        yield
    except (SourceError, OutputError):
        raise
    except errors.GatedRepoError as error:
        raise SourceError(f"{repo} is gated", hint="accept its terms on the hub and set HF_TOKEN") from error
    except errors.RepositoryNotFoundError as error:
        raise SourceError(
            f"{repo}: no such folder, and no such repository on the hub", hint="check the name, or set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise SourceError(f"{repo} has no revision {revision}") from error
    except errors.LocalEntryNotFoundError as error:
        raise SourceError(
            f"{repo}: no such folder, and the hub cannot be reached", hint="check the network, or unset HF_HUB_OFFLINE"
        ) from error
    except Exception as error:  # OSError, and what the client's transports (httpx, hf_xet) raise as they please
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(
                f"{repo}: download failed: {error.strerror}", hint="free some space and run the same command again"
            ) from error
        refused = getattr(getattr(error, "response", None), "status_code", 0) in (401, 403)
        hint = "check HF_TOKEN" if refused else "run it again; files that are complete are kept"
        said = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise SourceError(f"{repo}: download failed: {said}", hint=hint) from error


def _bar() -> Any:
    from huggingface_hub.utils.tqdm import tqdm

    class Bar(tqdm):
        """The client's own bars, none where standard error is no terminal."""

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{"disable": None, **options})  # type: ignore[no-untyped-call]

    return Bar


def snapshot(repo: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """The folder in the hub's cache with all files of a revision that match; its name is the commit."""
    from huggingface_hub import snapshot_download

    with _errors(repo, revision):
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns), tqdm_class=_bar()))


@dataclass(frozen=True)
class Shard:
    """A file of tensors on the hub; `tensors` is its header, `sha256` what the hub says, or ""."""

    name: str
    size: int
    sha256: str
    tensors: dict[str, dict[str, Any]]

    def hollow(self, path: Path) -> None:
        """Write a file of these tensors that takes no room on the disk: all zeros, to be filled in."""
        header = json.dumps(self.tensors).encode()
        header += b" " * (-len(header) % 8)
        try:
            with path.open("wb") as f:
                f.write(struct.pack("<Q", len(header)) + header)
                f.truncate(8 + len(header) + max((e["data_offsets"][1] for e in self.tensors.values()), default=0))
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror}") from error

    def copy(self, real: Path, hollow: Path, names: Sequence[str]) -> None:
        """Fill in these tensors."""
        with real.open("rb") as source, hollow.open("rb+") as target:
            at, to = (8 + struct.unpack("<Q", f.read(8))[0] for f in (source, target))
            for name in names:
                start, end = self.tensors[name]["data_offsets"]
                source.seek(at + start)
                target.seek(to + start)
                while start < end:
                    data = source.read(min(1 << 24, end - start))
                    if not data:
                        raise SourceError(f"{real} is cut short", hint="run it again")
                    try:
                        target.write(data)
                        target.flush()
                    except OSError as error:
                        hint = "free some space and run the same command again"
                        raise OutputError(f"cannot write {hollow}: {error.strerror}", hint=hint) from error
                    start += len(data)


@dataclass(frozen=True)
class Remote:
    """Shards of one commit that are fetched one at a time, into `folder`."""

    repo: str
    commit: str
    folder: Path
    shards: tuple[Shard, ...]

    def fetch(self, shard: Shard) -> Path:
        """Download one; what an interrupted run has of it is kept."""
        from huggingface_hub import hf_hub_download

        with _errors(self.repo, self.commit):
            options = {"revision": self.commit, "local_dir": self.folder / "shard", "tqdm_class": _bar()}
            path = Path(hf_hub_download(self.repo, shard.name, **options))
        if path.stat().st_size != shard.size:
            raise SourceError(f"{path}: {path.stat().st_size} bytes where the hub says {shard.size}")
        return path

    def drop(self, path: Path) -> None:
        """Take back the room of one that was downloaded, and let the client forget it."""
        path.unlink(missing_ok=True)
        for note in (self.folder / "shard" / ".cache").rglob(path.name + ".metadata"):
            note.unlink(missing_ok=True)


def remote(repo: str, commit: str, names: Sequence[str] | None, folder: Path) -> Remote | None:
    """The shards `names` of a commit (or its model*.safetensors), or None if all are in the hub's cache already."""
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    def cached(name: str) -> bool:
        return isinstance(try_to_load_from_cache(repo, name, revision=commit), str)

    if names is not None and all(map(cached, names)):
        return None
    if constants.HF_HUB_OFFLINE:
        return None  # the cache is all there is; what is missing there is told by name
    with _errors(repo, commit):
        api = HfApi()
        files = {f.path: f for f in api.list_repo_tree(repo, revision=commit, recursive=True) if hasattr(f, "size")}
        if names is None:
            names = sorted(n for n in files if n.startswith("model") and n.endswith(".safetensors")) or sorted(
                n for n in files if n.endswith(".safetensors")
            )
            if not names or all(map(cached, names)):
                return None
        missing = [name for name in names if name not in files]
        if missing:
            raise SourceError(f"{repo}: {len(missing)} of {len(names)} shards are missing, the first is {missing[0]}")

        def describe(name: str) -> Shard:
            found = api.parse_safetensors_file_metadata(repo, name, revision=commit)
            tensors = {
                key: {"dtype": t.dtype, "shape": t.shape, "data_offsets": list(t.data_offsets)}
                for key, t in found.tensors.items()
            }
            lfs = getattr(files[name], "lfs", None)
            return Shard(name, files[name].size, lfs.sha256 if lfs else "", tensors)

        with ThreadPoolExecutor(8) as threads:
            return Remote(repo, commit, folder, tuple(threads.map(describe, names)))
