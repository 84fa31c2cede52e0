"""An interrupted `compress`: nothing that a reader accepts, and the same bytes once it is run again."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import CommandLine

import squizd
from squizd.checkpoint import Checkpoint
from squizd.errors import FormatError, OutputError

SLOWLY = CommandLine.environment(SQUIZD_KERNELS="0")  # the same bytes, late enough to be interrupted


class Stop(Exception):
    """Stands for whatever ends a run early."""


def stop_after(source: Path, target: Path, share: float, **options: Any) -> Path:
    """Compress until `share` of the bytes are written, then stop; returns the partial file."""

    def progress(done: int, total: int) -> None:
        if done >= share * total:
            raise Stop

    with pytest.raises(Stop):
        squizd.compress(source, target, **{"quantizer": "minmax", **options}, progress=progress)
    return rejected(target)


def rejected(target: Path) -> Path:
    """The partial file, once no reader takes it and nothing bears the final name."""
    partial = Path(f"{target}.partial")
    assert not target.exists()
    with pytest.raises(FormatError):
        squizd.open(partial)
    assert not squizd.validate(partial).ok
    return partial


def complete(source: Path, target: Path, **options: Any) -> tuple[bytes, int]:
    """The bytes that a whole run gives, and how many records it took over."""
    summary = squizd.compress(source, target, **{"quantizer": "minmax", **options})
    assert not os.path.exists(f"{target}.partial")
    return target.read_bytes(), summary.resumed


def test_killed_at_any_moment_it_resumes_to_the_same_bytes(
    tiny: Path, tmp_path: Path, cli: CommandLine, tiny_file: Callable[..., Path]
) -> None:
    whole, target = tiny_file("int4", "mse"), tmp_path / "x.squizd"
    with cli.doomed(Path(f"{target}.partial"), "compress", tiny, "-o", target) as run:
        for share in (0, 0.15, 0.35, 0.55, 0.75):
            assert run(share * whole.stat().st_size) == -signal.SIGKILL
            rejected(target)
    outcome = cli("compress", tiny, "-o", target, "--json").success()
    assert json.loads(outcome.out)["resumed"] > 0
    assert target.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("zstd", [False, True])
@pytest.mark.parametrize("share", [0, 0.02, 0.3, 0.8, 1])
def test_stopped_between_any_two_records_it_resumes(
    share: float, zstd: bool, tiny: Path, tmp_path: Path, tiny_file: Callable[..., Path]
) -> None:
    stop_after(tiny, tmp_path / "x", share, zstd=zstd)
    data, resumed = complete(tiny, tmp_path / "x", zstd=zstd)
    assert data == tiny_file(zstd=zstd).read_bytes()
    assert (resumed > 0) == (share > 0)


def test_stopped_within_a_record_or_the_head_it_resumes(
    tiny: Path, tmp_path: Path, tiny_file: Callable[..., Path]
) -> None:
    partial = stop_after(tiny, tmp_path / "x", 0.5)
    whole, half = tiny_file().read_bytes(), partial.read_bytes()
    counts = []
    for length in (0, 10, 300, 9_000, 140_000, len(half) // 2, len(half) - 1):
        partial.write_bytes(half[:length])
        data, resumed = complete(tiny, tmp_path / "x", force=True)
        assert data == whole, length
        counts.append(resumed)
    assert counts == sorted(counts)
    assert counts[0] == 0 < counts[-1]


@pytest.mark.parametrize(
    "at",
    [
        5,
        200,
        400,
        3_000,
        "index",
        100_000,
        200_000,
        -1,
    ],
)
def test_damage_in_the_partial_file_is_written_anew(
    at: int | str, tiny: Path, tmp_path: Path, tiny_file: Callable[..., Path]
) -> None:
    partial = stop_after(tiny, tmp_path / "x", 0.5)
    data = bytearray(partial.read_bytes())
    if at == "index":  # the codec of the first expert's record
        with squizd.open(tiny_file()) as f:
            at = next(s.offset for s in f.sections if s.type == b"EXPI") + 8 + 24
    data[int(at)] ^= 0x55
    partial.write_bytes(data)
    assert complete(tiny, tmp_path / "x")[0] == tiny_file().read_bytes()


def test_a_run_that_ends_early_does_not_hash_the_source_to_its_end(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gave_up = list[bool]()
    monkeypatch.setattr(Checkpoint, "hashes", lambda self, stop: gave_up.append(stop.wait(20)))
    stop_after(tiny, tmp_path / "x", 0.1)
    assert gave_up == [True]


@pytest.mark.parametrize("garbage", [b"", b"text\n" * 1000, os.urandom(300_000)], ids=["empty", "text", "random"])
def test_garbage_is_not_resumed(garbage: bytes, tiny: Path, tmp_path: Path, tiny_file: Callable[..., Path]) -> None:
    (tmp_path / "x.partial").write_bytes(garbage)
    assert complete(tiny, tmp_path / "x") == (tiny_file().read_bytes(), 0)


def test_a_complete_file_under_the_partial_name_is_not_resumed(
    tiny: Path, tmp_path: Path, tiny_file: Callable[..., Path]
) -> None:
    shutil.copy(tiny_file("int8"), tmp_path / "x.partial")
    assert complete(tiny, tmp_path / "x") == (tiny_file().read_bytes(), 0)


def test_a_folder_under_the_partial_name_is_an_error(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "x.partial").mkdir()
    with pytest.raises(OutputError, match="cannot write"):
        squizd.compress(tiny, tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"recipe": "int8"},
        {"quantizer": "mse"},
        {"overrides": ["*.down_proj=8"]},
        {"overrides": ["*.down_proj=4"]},  # the same encodings, but other metadata
        {"zstd": True},
    ],
    ids=str,
)
def test_other_arguments_start_afresh(
    options: dict[str, Any], tiny: Path, tmp_path: Path, tiny_file: Callable[..., Path]
) -> None:
    stop_after(tiny, tmp_path / "x", 0.5)
    assert complete(tiny, tmp_path / "x", **options) == (tiny_file(**options).read_bytes(), 0)


def change_source(folder: Path, how: str) -> None:
    shard = folder / "model-00001-of-00002.safetensors"
    match how:
        case "values":
            data = bytearray(shard.read_bytes())
            data[-(1 << 20) :] = bytes(1 << 20)
            shard.write_bytes(data)
        case "config":
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))
        case "card":
            (folder / "README.md").write_text("---\nlicense: mit\n---\n")
        case "tokenizer":  # shorter by less than an alignment: records would still fit, with old bytes between them
            path = folder / "tokenizer_config.json"
            path.write_text(path.read_text()[:-40])
        case "another file":
            (folder / "chat_template.jinja").write_text("{{ messages }}")


@pytest.mark.parametrize("how", ["values", "config", "card", "tokenizer", "another file"])
def test_another_source_starts_afresh(how: str, checkpoint: Path, tmp_path: Path) -> None:
    config = (checkpoint / "tokenizer_config.json").read_text()
    (checkpoint / "tokenizer_config.json").write_text(config + " " * (60 - len(config) % 64 + 64))
    stop_after(checkpoint, tmp_path / "x", 0.5)
    change_source(checkpoint, how)
    data, resumed = complete(checkpoint, tmp_path / "x")
    assert (data, 0) == complete(checkpoint, tmp_path / "y")
    assert resumed == 0
    assert squizd.validate(tmp_path / "x", deep=True).ok


def test_a_second_process_is_told_and_does_no_harm(
    tiny: Path, tmp_path: Path, cli: CommandLine, tiny_file: Callable[..., Path]
) -> None:
    target = tmp_path / "x.squizd"
    first = cli.start("compress", tiny, "-o", target, env=SLOWLY)
    partial = Path(f"{target}.partial")
    while first.poll() is None and not (partial.exists() and partial.stat().st_size):  # nothing is written unlocked
        time.sleep(0.0005)
    first.send_signal(signal.SIGSTOP)
    second = cli("compress", tiny, "-o", target)
    first.send_signal(signal.SIGCONT)
    assert f"{partial} is being written by another process" in second.failure()
    cli.finish(first).success()
    assert target.read_bytes() == tiny_file("int4", "mse").read_bytes()


def test_a_run_that_gets_the_lock_of_a_file_just_completed_does_no_harm(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_file: Callable[..., Path]
) -> None:
    lock, target = fcntl.flock, tmp_path / "x"
    stop_after(tiny, target, 0.5)

    def stop(done: int, total: int) -> None:
        raise Stop

    def late(fd: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", lock)
        complete(tiny, target)  # another process, between our open and our lock
        lock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with contextlib.suppress(OutputError, Stop):
        squizd.compress(tiny, target, quantizer="minmax", progress=stop)
    assert target.read_bytes() == tiny_file().read_bytes()
