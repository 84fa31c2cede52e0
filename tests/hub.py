"""A Hugging Face hub on this machine: the part of its HTTP that `huggingface_hub.snapshot_download` speaks.

What the client asks, in this order (huggingface_hub 2.4, seen on the wire):

    GET  /api/models/ORG/NAME/revision/REV                 {"id", "sha", ...}; left out if REV is a commit
    GET  /api/models/ORG/NAME/tree/SHA?recursive=True...   [{"type", "path", "size", "oid", "lfs"}], Link: next page
    HEAD /ORG/NAME/resolve/SHA/PATH                        X-Repo-Commit, ETag, Content-Length, or for a large file
                                                           302 with X-Linked-Etag and X-Linked-Size to the store
    GET  the same URL, or the store's                      the bytes; 206 from where "Range: bytes=N-" says

and for the headers of safetensors files, `HfApi.parse_safetensors_file_metadata`:

    GET  /ORG/NAME/resolve/SHA/PATH                        with "Range: bytes=0-100000"

Errors are a status and X-Error-Code: 401 RepoNotFound, 401 GatedRepo, 404 RevisionNotFound, 404 EntryNotFound;
a bearer token that nobody was given is a 401 with X-Error-Message alone.
No answer carries an X-Xet-Hash, so the client downloads over plain HTTP. Its other questions (/api/agent-harnesses)
get a 404, which it takes well.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import struct
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

PAGE = 4  # entries of a tree listing; the real hub has 1000
LARGE = 1 << 20  # from here on a file lies in the store, behind a redirect


@dataclass
class Repo:
    """Commits (hash to files by path), branches and tags (name to hash), and who may read."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    token: str = ""  # readable by its bearer alone, if there is one
    gated: bool = False  # everyone sees that it is there; its files are for the bearer

    def commit(self, folder: Path, branch: str = "main", changes: Mapping[str, bytes] | None = None) -> str:
        """Add the files of `folder`, with `changes`, as a commit to `branch`; returns its hash."""
        files = {p.name: p.read_bytes() for p in sorted(folder.iterdir())} | dict(changes or {})
        sha = hashlib.sha1(
            repr(sorted((n, hashlib.sha1(d).hexdigest()) for n, d in files.items())).encode()
        ).hexdigest()
        self.commits[sha] = files
        self.refs[branch] = sha
        return sha


@dataclass
class Hub:
    """The server's state. `seen` holds (method, path, bearer token, range) of every request."""

    url: str = ""
    store: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    seen: list[tuple[str, str, str, str]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)  # "close" or "reset": what befalls the next large files midway

    def blob(self, digest: str) -> bytes:
        """The large file with this SHA-256."""
        blobs = (data for repo in self.repos.values() for files in repo.commits.values() for data in files.values())
        return next(data for data in blobs if hashlib.sha256(data).hexdigest() == digest)


class _Refusal(Exception):
    """An HTTP error in the hub's way."""

    def __init__(self, status: int, code: str, message: str = "") -> None:
        super().__init__(code)
        self.status, self.headers = status, {"X-Error-Code": code} | ({"X-Error-Message": message} if message else {})


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: `Hub.seen` has it."""

    def _answer(self) -> None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.hub.seen.append((self.command, self.path, token, self.headers.get("Range", "")))
        url = urlsplit(self.path)
        path, query = unquote(url.path), parse_qs(url.query)
        try:
            if found := re.fullmatch(r"/store/([0-9a-f]{64})", path):
                self._send_stored(found[1])
            elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
                sha, files = self._find(found[1], found[2] or "main", token)
                self._send_json({"id": found[1], "sha": sha, "siblings": [{"rfilename": name} for name in files]}, {})
            elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
                self._send_tree(*self._find(found[1], found[2], token), int(query.get("cursor", ["0"])[0]))
            elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                sha, files = self._find(found[1], found[2], token)
                if found[3] not in files:
                    raise _Refusal(404, "EntryNotFound")
                self._send_file(sha, files[found[3]])
            else:
                raise _Refusal(404, "")
        except _Refusal as refusal:
            self._send(refusal.status, refusal.headers, b"")

    def _find(self, name: str, revision: str, token: str) -> tuple[str, dict[str, bytes]]:
        """The commit that `revision` names; what the reader may not see does not exist, unless it is gated."""
        repo = self.hub.repos.get(name)
        if token and token not in {r.token for r in self.hub.repos.values()}:
            raise _Refusal(401, "", "Invalid credentials in Authorization header")
        if repo is None or (repo.token and token != repo.token and not repo.gated):
            raise _Refusal(401, "RepoNotFound")
        sha = repo.refs.get(revision, revision)
        if sha not in repo.commits:
            raise _Refusal(404, "RevisionNotFound")
        if repo.token and token != repo.token and not self.path.startswith("/api/"):
            raise _Refusal(401, "GatedRepo")  # as on the real hub: its listing is public
        return sha, repo.commits[sha]

    def _send_tree(self, sha: str, files: dict[str, bytes], start: int) -> None:
        names = sorted(files)
        entries = [_entry(name, files[name]) for name in names[start : start + PAGE]]
        more = f'<{self.hub.url}{urlsplit(self.path).path}?recursive=True&cursor={start + PAGE}>; rel="next"'
        self._send_json(entries, {"Link": more} if start + PAGE < len(names) else {})

    def _send_file(self, sha: str, data: bytes) -> None:
        digest = hashlib.sha256(data).hexdigest()
        if len(data) < LARGE:
            etag = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            self._send(200, {"X-Repo-Commit": sha, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}, data)
            return
        linked = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data))}
        self._send(302, {"X-Repo-Commit": sha, "Location": f"{self.hub.store}/{digest}", **linked}, b"")

    def _send_stored(self, digest: str) -> None:
        data = self.hub.blob(digest)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        if asked and asked[2]:  # of the headers of tensors
            end = min(int(asked[2]) + 1, len(data))
            part = {"Content-Range": f"bytes {start}-{end - 1}/{len(data)}"}
            self._send(206, {"ETag": f'"{digest}"'} | part, data[start:end])
            return
        headers = {"ETag": f'"{digest}"', "Accept-Ranges": "bytes"}
        if asked:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self._send(206 if asked else 200, headers, data[start:], self.hub.faults.pop(0) if self.hub.faults else "")

    def _send_json(self, value: object, headers: dict[str, str]) -> None:
        self._send(200, {"Content-Type": "application/json", **headers}, json.dumps(value).encode())

    def _send(self, status: int, headers: dict[str, str], body: bytes, fault: str = "") -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body[: len(body) // 2] if fault else body)
        self.close_connection = self.close_connection or bool(fault)
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())


def _entry(name: str, data: bytes) -> dict[str, object]:
    """A file in a tree listing."""
    oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    entry: dict[str, object] = {"type": "file", "path": name, "size": len(data), "oid": oid}
    if len(data) >= LARGE:
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return entry


@contextmanager
def serve() -> Iterator[Hub]:
    """A hub that answers on a free port of this machine until the block ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    # Another host name for the store: the client must not send its token there.
    hub.url, hub.store = f"http://127.0.0.1:{server.server_port}", f"http://localhost:{server.server_port}/store"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
