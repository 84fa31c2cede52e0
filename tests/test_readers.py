"""The two readers written from the specification alone agree with the vectors and with the package."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
READERS, VALID, INVALID = ROOT / "tools" / "readers", ROOT / "fixtures" / "valid", ROOT / "fixtures" / "invalid"
RULES: list[dict[str, Any]] = json.loads((INVALID / "index.json").read_text("utf-8"))
HAS_ZSTD = sys.version_info >= (3, 14)

Command = list[str]


@pytest.fixture(scope="session")
def c_reader(tmp_path_factory: pytest.TempPathFactory) -> Command:
    """reader.c, compiled without libzstd: that header is on few machines."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler on this machine")
    out = tmp_path_factory.mktemp("readers") / "reader"
    flags = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-O1", "-DNO_ZSTD"]
    subprocess.run([compiler, *flags, str(READERS / "reader.c"), "-o", str(out), "-lm"], check=True)
    return [str(out)]


@pytest.fixture(scope="session", params=["c", "python"])
def reader(request: pytest.FixtureRequest) -> Command:
    """Each reader's command."""
    if request.param == "python":
        return [sys.executable, str(READERS / "reader.py")]
    command: Command = request.getfixturevalue("c_reader")
    return command


def verdicts(reader: Command, paths: list[Path]) -> dict[str, str]:
    """What `verify` says of each file."""
    done = subprocess.run([*reader, "verify", *map(str, paths)], capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr
    found = {}
    for line in done.stdout.splitlines():
        path, separator, verdict = line.rpartition(".squizd: ")
        if separator:
            found[Path(path).name] = verdict
    return found


def test_valid_vectors_are_valid(reader: Command) -> None:
    paths = sorted(VALID.glob("*.squizd"))
    found = verdicts(reader, paths)
    for path in paths:
        verdict = found.get(path.stem, "cannot read: built without zstd")
        assert verdict.startswith(("valid", "cannot read")), (path.stem, verdict)
    assert sum(v == "valid" for v in found.values()) >= 10


def test_only_regular_files_are_read(reader: Command, tmp_path: Path) -> None:
    """No verdict on anything else, and no waiting for the other end of a pipe."""
    os.mkfifo(tmp_path / "pipe.squizd")
    (tmp_path / "link.squizd").symlink_to(tmp_path / "pipe.squizd")
    for path in (tmp_path / "pipe.squizd", tmp_path / "link.squizd", tmp_path, Path("/dev/null"), tmp_path / "none"):
        for command in ("verify", "list"):
            done = subprocess.run([*reader, command, str(path)], capture_output=True, text=True, timeout=30)
            assert (done.returncode, "cannot read" in done.stdout + done.stderr) == (2, True), path
    (tmp_path / "empty.squizd").touch()
    assert subprocess.run([*reader, "verify", str(tmp_path / "empty.squizd")], capture_output=True).returncode == 1


def test_every_broken_rule_is_found_by_its_code(reader: Command) -> None:
    found = verdicts(reader, [INVALID / rule["file"] for rule in RULES])
    wrong = {}
    for rule in RULES:
        verdict = found.get(Path(rule["file"]).stem, "")
        if verdict.split()[:2] != ["invalid", rule["code"]] and not (rule["coded"] and not HAS_ZSTD):
            wrong[rule["file"]] = verdict
    assert not wrong


@pytest.mark.parametrize("name", ["toy", "all-affine", "microscaling-modes", "layouts", "dense"])
def test_values_are_those_of_the_vectors(reader: Command, name: str) -> None:
    """Resident tensors and experts, number for number, against NAME.npy."""
    facts, values = json.loads((VALID / f"{name}.json").read_text("utf-8")), np.load(VALID / f"{name}.npy")
    path = str(VALID / f"{name}.squizd")
    for tensor in facts["residents"][:6]:
        if "values" in tensor:
            span = tensor["values"]
            got = numbers(reader, "tensor", path, tensor["name"])
            same(got, values[span["start"] : span["start"] + span["count"]])
    for expert in facts["experts"][:2]:
        wanted = [values[t["values"]["start"] :][: t["values"]["count"]] for t in expert["tensors"] if "values" in t]
        same(numbers(reader, "expert", path, str(expert["layer"]), str(expert["expert"])), np.concatenate(wanted))


@pytest.fixture
def alone(tmp_path: Path) -> Command:
    """reader.py without deep.py beside it."""
    shutil.copy(READERS / "reader.py", tmp_path)
    return [sys.executable, str(tmp_path / "reader.py")]


def test_the_python_reader_is_short() -> None:
    assert len((READERS / "reader.py").read_text("utf-8").splitlines()) <= 300


def test_the_python_reader_alone_makes_all_structural_checks(alone: Command) -> None:
    """Every rule but the deep ones, by its code; digests beside it, and what it checked it says."""
    valid = sorted(VALID.glob("*.squizd"))
    found = verdicts(alone, [*valid, *(INVALID / rule["file"] for rule in RULES)])
    structural = {Path(rule["file"]).stem: rule["code"] for rule in RULES if not rule["deep"]}
    assert {name: found[name].split()[:2] for name in structural} == {n: ["invalid", c] for n, c in structural.items()}
    assert found["record-digest"].split()[:2] == ["invalid", "record-digest"]
    assert {found[path.stem] for path in valid} == {"valid (structure and digests)"}


def test_the_python_reader_alone_finds_the_values(alone: Command) -> None:
    facts, values = json.loads((VALID / "toy.json").read_text("utf-8")), np.load(VALID / "toy.npy")
    path, span = str(VALID / "toy.squizd"), facts["residents"][0]["values"]
    wanted = values[span["start"] : span["start"] + span["count"]]
    same(numbers(alone, "tensor", path, facts["residents"][0]["name"]), wanted)
    wanted = [values[t["values"]["start"] :][: t["values"]["count"]] for t in facts["experts"][5]["tensors"]]
    same(numbers(alone, "expert", path, "1", "1"), np.concatenate(wanted))


def numbers(reader: Command, *arguments: str) -> np.ndarray:
    """The hexadecimal floats that a reader prints, one on a line."""
    done = subprocess.run([*reader, *arguments], capture_output=True, text=True, timeout=60, check=True)
    lines = (line.strip() for line in done.stdout.splitlines())
    floats = [float.fromhex(line) for line in lines if line.lstrip("-").startswith(("0x", "nan", "inf"))]
    return np.array(floats, np.float32)


def same(got: np.ndarray, wanted: np.ndarray) -> None:
    assert got.shape == wanted.shape
    np.testing.assert_array_equal(got, wanted)
    assert np.array_equal(np.signbit(got), np.signbit(wanted))
