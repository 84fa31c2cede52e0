"""A file that fails under a running model: an error that names the expert, no wrong token, and a session that goes on.

Faults are real ones: bytes flipped or cut off on disk, a descriptor that cannot be read (EBADF), one whose reads
fail (EIO, as `/proc/self/mem` answers where nothing is mapped).
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import squizd
from squizd import kernels
from squizd.errors import ExpertReadError, ReadError
from squizd.generation import Conversation
from squizd.kernels import layers
from squizd.runtime import pager

PROMPT = "The city was founded in the year"
LONG = PROMPT * 12
SECOND = 1.0
needs_kernels = pytest.mark.skipif(bool(kernels.missing()), reason=kernels.missing() or "-")
MODES = [
    pytest.param("mlx", id="mlx"),
    pytest.param("graph", id="graph", marks=needs_kernels),
    pytest.param("replay", id="replay", marks=needs_kernels),
    pytest.param("readers", id="readers"),
]


@dataclass
class Damage:
    """A session over a file that can be broken and mended. `records` are those of the experts that will be broken."""

    session: squizd.Session
    path: Path
    whole: bytes
    kept: int  # a duplicate of the session's descriptor

    def __post_init__(self) -> None:
        file = self.session.state.file
        self.records = [file.expert(x.layer, e) for x in file.moe_layers for e in range(x.expert_count)]

    def flip(self) -> None:
        """One bit in the middle of every expert."""
        with self.path.open("r+b") as f:
            for record in self.records:
                f.seek(record.offset + record.stored_size // 2)
                byte = f.read(1)[0]
                f.seek(-1, os.SEEK_CUR)
                f.write(bytes([byte ^ 4]))

    def cut(self) -> None:
        """No expert is left."""
        os.truncate(self.path, self.records[0].offset)

    def ebadf(self) -> None:
        self._replace("/dev/null", os.O_WRONLY)

    def eio(self) -> None:
        self._replace("/proc/self/mem", os.O_RDONLY)

    def _replace(self, path: str, flags: int) -> None:
        other = os.open(path, flags)
        os.dup2(other, self.session.state.file.fileno())
        os.close(other)

    def mend(self) -> None:
        self.path.write_bytes(self.whole)
        os.dup2(self.kept, self.session.state.file.fileno())


FAULTS: dict[str, tuple[Callable[[Damage], None], str]] = {
    "flip": (Damage.flip, "the bytes do not match their digest"),
    "cut": (Damage.cut, "the file is cut short"),
    "ebadf": (Damage.ebadf, "Bad file descriptor"),
    "eio": (Damage.eio, "Input/output error"),
}
if sys.platform != "linux":
    del FAULTS["eio"]


def copied(tiny_file: Any, folder: Path, zstd: bool = False) -> Path:
    path = folder / "m.squizd"
    path.write_bytes(Path(tiny_file(zstd=zstd)).read_bytes())
    return path


def opened(path: Path, mode: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Damage]:
    if mode == "readers":
        monkeypatch.setattr(pager, "INLINE_BYTES", 0)
    with (
        layers.switched_off() if mode == "mlx" else nullcontext(),
        squizd.Session(path, resident="25%", context=512) as session,
    ):
        if mode != "replay" and session.state.replay is not None:
            session.state.replay.reason = "for this test"
        kept = os.dup(session.state.file.fileno())
        try:
            yield Damage(session, path, path.read_bytes(), kept)
        finally:
            os.close(kept)


@pytest.fixture(
    params=[*MODES, pytest.param("zstd mlx", id="zstd mlx"), pytest.param("zstd readers", id="zstd readers")]
)
def damage(
    request: pytest.FixtureRequest, tiny_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Damage]:
    """One session for each way to compute and read; encoded records are always read by Python."""
    path = copied(tiny_file, tmp_path, zstd="zstd" in request.param)
    yield from opened(path, request.param.split()[-1], monkeypatch)


def tokens(session: squizd.Session, prompt: str, count: int = 16) -> list[int]:
    return [part.token for part in session.stream(prompt, max_tokens=count)]


def failing(stream: Iterator[Any], path: Path, message: str) -> list[int]:
    """The tokens before the error, which comes within a second and names what failed."""
    found, began = [], time.perf_counter()
    with pytest.raises(ExpertReadError, match=message) as caught:
        for part in stream:
            found.append(part.token)
            began = time.perf_counter()
    assert time.perf_counter() - began < SECOND
    assert str(path) in str(caught.value)
    assert f"layer {caught.value.layer} expert {caught.value.expert} at byte" in str(caught.value)
    return found


def test_no_wrong_token_and_the_session_goes_on(damage: Damage) -> None:
    """While decoding, while a long prompt is read, in a conversation, and for a token that nobody waits for."""
    right = tokens(damage.session, PROMPT, 40)
    for strike, message in FAULTS.values():
        _fails_and_goes_on(damage, strike, message, right)
    assert damage.session.stats.misses > 0


def _fails_and_goes_on(damage: Damage, strike: Callable[[Damage], None], message: str, right: list[int]) -> None:
    session = damage.session
    stream = session.stream(PROMPT, max_tokens=40)
    found = [next(stream).token for _ in range(5)]
    strike(damage)
    found += failing(stream, damage.path, message)
    assert found == right[: len(found)]
    assert len(found) < 40
    assert failing(session.stream(LONG), damage.path, message) == []
    damage.mend()
    assert tokens(session, PROMPT) == right[:16]

    conversation, fresh = Conversation(), Conversation()
    for each in (conversation, fresh):
        list(session.reply(each, "One.", max_tokens=2))
    before = list(conversation.messages)
    strike(damage)
    failing(session.reply(conversation, "Tell me more about the river.", max_tokens=40), damage.path, message)
    assert conversation.messages == before
    damage.mend()
    one, two = ([p.token for p in session.reply(c, "Go on.", max_tokens=4)] for c in (conversation, fresh))
    assert one == two

    for count in (2, 3, 5):
        stream = session.stream(PROMPT, max_tokens=40)
        found = [next(stream).token for _ in range(count)]
        strike(damage)
        try:
            found.append(next(stream).token)
        except ExpertReadError:
            pass
        stream.close()
        assert found == right[: len(found)]
        damage.mend()
        assert tokens(session, PROMPT, 4) == right[:4]


@pytest.mark.parametrize("mode", MODES)
def test_a_broken_session_can_be_closed(
    mode: str, tiny_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for damage in opened(copied(tiny_file, tmp_path), mode, monkeypatch):
        stream = damage.session.stream(PROMPT, max_tokens=40)
        for _ in range(3):
            next(stream)
        damage.cut()
        began = time.perf_counter()
        damage.session.close()
        assert time.perf_counter() - began < SECOND
        with pytest.raises(ReadError):
            for _ in stream:
                pass


def follow(
    session: squizd.Session, prompt: str, found: list[int], errors: list[Exception], begun: threading.Barrier
) -> None:
    """One thread's stream: its tokens into `found`, and what ends it early into `errors`."""
    try:
        stream = squizd.stream_generate(session.model, session.tokenizer, prompt, max_tokens=60)
        found.append(next(stream).token)
        begun.wait()
        for part in stream:
            found.append(part.token)
    except Exception as error:
        errors.append(error)


@pytest.mark.parametrize("last", [False, True], ids=["every layer", "the last layer"])
@pytest.mark.parametrize("mode", MODES[1:3])
def test_threads_that_share_a_model_each_learn_of_it(
    mode: str, last: bool, tiny_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error is raised once: in the thread whose token failed, and not in another that waits for it by chance."""
    prompts = ["The city was", "In the year", "The river was"]
    for damage in opened(copied(tiny_file, tmp_path), mode, monkeypatch):
        session = damage.session
        right = [tokens(session, p, 60) for p in prompts]
        if last:
            damage.records = damage.records[-32:]
        for delay in range(4):
            found: list[list[int]] = [[] for _ in prompts]
            errors: list[list[Exception]] = [[] for _ in prompts]
            begun = threading.Barrier(len(prompts) + 1)

            threads = [
                threading.Thread(target=follow, args=(session, p, f, e, begun))
                for p, f, e in zip(prompts, found, errors, strict=True)
            ]
            for thread in threads:
                thread.start()
            begun.wait(30)
            time.sleep(0.005 * delay)
            damage.flip()
            for thread in threads:
                thread.join(30)
            assert not any(thread.is_alive() for thread in threads)
            damage.mend()
            for got, want, error in zip(found, right, errors, strict=True):
                assert got == want[: len(got)]
                assert got == want if not error else isinstance(error[0], ExpertReadError), error
            assert [tokens(session, p, 10) for p in prompts] == [r[:10] for r in right]
