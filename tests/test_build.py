"""Compiling the kernels: what is said where it cannot be done, and that squizd is installed anyway."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from squizd.kernels import build

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the kernels are for Linux")


def run(*command: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Python with an environment of which only `env` and what Python needs is left."""
    kept = {key: value for key, value in os.environ.items() if key not in ("CXX", "PATH")}
    return subprocess.run([sys.executable, *command], env={**kept, **env}, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture
def compiler(tmp_path: Path) -> Path:
    """A compiler too old for what it is asked."""
    path = tmp_path / "old c++"
    path.write_text("#!/bin/sh\necho \"c++: error: unrecognized command-line option '-std=c++20'\" >&2\nexit 1\n")
    path.chmod(0o755)
    return path


def fake_mlx(folder: Path, version: str, library: bool = True) -> Path:
    header = folder / "include" / "mlx" / "version.h"
    header.parent.mkdir(parents=True)
    names = ("MAJOR", "MINOR", "PATCH")
    parts = zip(names, version.split("."), strict=True)
    header.write_text("#pragma once\n" + "".join(f"#define MLX_VERSION_{name} {part}\n" for name, part in parts))
    (folder / "lib").mkdir()
    if library:
        (folder / "lib" / "libmlx.so").touch()
    return folder


def test_without_a_compiler_one_line_says_so(tmp_path: Path) -> None:
    file = ROOT / "squizd" / "kernels" / "build.py"
    done = run(file, PATH=str(tmp_path))
    said = "squizd: the kernels were not built: no C++ compiler is installed"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"{said} (g++ or clang++)\n")
    done = run(file, PATH=os.environ["PATH"], CXX="/no/such/c++ -m64")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"{said} (/no/such/c++)\n")


@pytest.mark.parametrize("why", ["no compiler", "old compiler"])
def test_an_install_goes_on_without_the_kernels(tmp_path: Path, compiler: Path, why: str) -> None:
    """The step of an install that compiles, as setuptools runs it. An extension left from before does not survive."""
    pytest.importorskip("setuptools", minversion="77", reason="pyproject.toml wants setuptools 77")
    pytest.importorskip("nanobind", reason="an install puts nanobind beside the build")
    target = tmp_path / "lib" / "squizd" / "kernels"
    target.mkdir(parents=True)
    (target / build.FILE).write_text("compiled for another MLX")
    command = ["setup.py", "build_ext", "--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
    done = run(*command, PATH=str(tmp_path), **({"CXX": f"'{compiler}'"} if why == "old compiler" else {}))
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in (done.stdout + done.stderr).splitlines() if "squizd is installed without" in line]
    assert ("unrecognized" if why == "old compiler" else "no C++ compiler is installed") in line
    assert not list(target.iterdir())


def test_headers_are_those_of_the_environment_unless_it_will_get_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While pip builds, `sysconfig` names the environment squizd is for, and the import path pip's temporary one."""
    isolated = fake_mlx(tmp_path / "isolated" / "mlx", "0.40.0")
    (isolated / "__init__.py").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path / "isolated")])
    monkeypatch.delitem(sys.modules, "mlx", raising=False)
    for name, version, library, wanted in [
        ("own", "0.33.1", True, (0, 33, 1)),  # stays, so it counts
        ("too old", "0.31.2", True, (0, 40, 0)),  # will be replaced
        ("no backend", "0.40.0", False, (0, 40, 0)),
    ]:
        fake_mlx(tmp_path / name / "mlx", version, library)
        monkeypatch.setattr(build.sysconfig, "get_path", lambda kind, name=name: str(tmp_path / name))
        assert build.mlx_version(build.find_mlx()) == wanted, name
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(build.BuildError, match=r"pip install 'mlx\[cpu\]'"):
        build.find_mlx()
