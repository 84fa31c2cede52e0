"""Compile the kernels: in place by `python -m squizd.kernels.build`, into a wheel from `setup.py`.

Needs a C++20 compiler, Python's headers, nanobind, and the headers that MLX's own wheel ships. Knows nothing of the
rest of the package and imports no MLX: `setup.py` loads this file by its path.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib import util
from pathlib import Path

SOURCES = Path(__file__).parent / "src"
FILE = "_native" + (sysconfig.get_config_var("EXT_SUFFIX") or ".so")
# No Python module, and needs neither Python nor MLX; named like one so that setuptools installs it.
TRANSFER = Path(__file__).parent / ("_transfer" + (sysconfig.get_config_var("EXT_SUFFIX") or ".so"))
_OLDEST = (0, 32)  # MLX, as in pyproject.toml
_COMMON = ["-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-DNDEBUG", "-pthread"]
# One object per instruction set. No contraction: every fused multiply-add is written as one.
_EXACT = ["-ffp-contract=off", "-fno-exceptions"]
_SETS = {
    "x86_64": {
        "avx512": ["-DSQUIZD_AVX512", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma"],
        "avx2": ["-DSQUIZD_AVX2", "-mavx2", "-mfma"],
        "plain": ["-O2"],  # half the time to compile
    },
    "aarch64": {"neon": ["-DSQUIZD_NEON"], "plain": ["-O2"]},
}


class BuildError(Exception):
    """The kernels cannot be compiled here; the message says what is missing."""


def mlx_version(folder: Path) -> tuple[int, ...]:
    """The version of the MLX whose headers are in `folder`; () if none are, or no library to link to."""
    header = folder / "include" / "mlx" / "version.h"
    if not header.is_file() or not (folder / "lib" / "libmlx.so").is_file():
        return ()
    return tuple(map(int, re.findall(r"#define MLX_VERSION_(?:MAJOR|MINOR|PATCH) (\d+)", header.read_text("utf-8"))))


def sources_digest() -> str:
    """Tells one state of the sources from another; the extension holds that of its own."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def find_mlx() -> Path:
    """The folder of an installed MLX with headers and library.

    The compiled kernels work with that version only. While pip builds, the environment they are for comes first,
    if pip will leave its MLX as it is; else pip's temporary one with the newest MLX, which it then installs here too.
    """
    found = [Path(sysconfig.get_path(kind)) / "mlx" for kind in ("purelib", "platlib")]
    spec = util.find_spec("mlx")
    found += [Path(place) for place in (spec.submodule_search_locations or () if spec else ())]
    for folder in found:
        if mlx_version(folder) >= _OLDEST:
            return folder
    raise BuildError("MLX's headers are not installed (Linux: pip install 'mlx[cpu]')")


def find_nanobind() -> Path:
    """nanobind's folder of sources."""
    spec = util.find_spec("nanobind")
    if spec is None or spec.origin is None:
        raise BuildError("nanobind is not installed (pip install 'nanobind>=3.1,<3.2')")
    return Path(spec.origin).parent


def find_python() -> Path:
    """The folder of Python's headers."""
    folder = Path(sysconfig.get_path("include"))
    if not (folder / "Python.h").is_file():
        raise BuildError("Python's headers are not installed (Debian: apt install python3-dev)")
    return folder


def find_compiler() -> list[str]:
    """The command of a C++ compiler: $CXX, which may have arguments, or else g++, clang++ or c++."""
    chosen = shlex.split(os.environ.get("CXX", ""))
    for command in [chosen] if chosen else (["g++"], ["clang++"], ["c++"]):
        if shutil.which(command[0]):
            return command
    raise BuildError(f"no C++ compiler is installed ({chosen[0] if chosen else 'g++ or clang++'})")


def build(target: Path) -> Path:
    """Compile into the folder `target`; returns the file. Raises BuildError."""
    if sys.platform != "linux":
        raise BuildError("the kernels are for Linux; elsewhere MLX's own are fast")
    sets = _SETS.get(platform.machine(), {"plain": []})
    compiler, python, mlx, nanobind = find_compiler(), find_python(), find_mlx(), find_nanobind()
    binding = [
        f"-I{nanobind}/include",
        f"-I{nanobind}/ext/robin_map/include",
        "-DNB_DOMAIN=mlx",
        "-DNB_COMPACT_ASSERTIONS",
        f"-I{python}",
    ]
    jobs = {name: [*_COMMON, *_EXACT, *flags, str(SOURCES / "arithmetic.cpp")] for name, flags in sets.items()}
    headers = [*binding, "-isystem", f"{mlx}/include", f'-DSQUIZD_SOURCES="{sources_digest()}"']
    for name in ("elementary", "program", "module", "primitives", "operations"):  # they arrange work: no loop is hot
        jobs[name] = [*_COMMON, "-O1", *headers, str(SOURCES / f"{name}.cpp")]
    for name in ("shelf", "slots", "records", "codes", "recall", "work", "choose"):
        jobs[name] = [*_COMMON, str(SOURCES / f"{name}.cpp")]
    jobs["nanobind"] = [*_COMMON, "-O1", *binding, "-fno-strict-aliasing", str(nanobind / "src" / "nb_combined.cpp")]
    with tempfile.TemporaryDirectory() as folder:
        objects = {name: f"{folder}/{name}.o" for name in jobs}
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            list(pool.map(lambda job: _run([*compiler, *job[1], "-c", "-o", objects[job[0]]]), jobs.items()))
        library = f"{folder}/{FILE}"
        # mlx.core has loaded libmlx before; the search path is for tools that look at the file alone.
        where = ["-L", f"{mlx}/lib", "-lmlx", "-Wl,-rpath,$ORIGIN/../../mlx/lib", "-Wl,-s", "-pthread"]
        _run([*compiler, "-shared", *objects.values(), *where, "-o", library])
        target.mkdir(parents=True, exist_ok=True)
        partial = target / (FILE + ".partial")
        shutil.copyfile(library, partial)
        return partial.replace(target / FILE)


def build_transfer(target: Path) -> Path:
    """Compile what fills a GPU's memory into the folder `target`; returns the file. Raises BuildError."""
    if sys.platform != "linux":
        raise BuildError("transfers are for CUDA on Linux; elsewhere memory is shared")
    flags = ["-static-libstdc++", "-static-libgcc", "-Wl,-s", "-shared", f'-DSQUIZD_SOURCES="{sources_digest()}"']
    sources = [
        str(SOURCES / f"{name}.cpp") for name in ("transfer", "exchange", "slots", "recall", "codes", "transfer_api")
    ]
    target.mkdir(parents=True, exist_ok=True)
    partial = target / (TRANSFER.name + ".partial")
    _run([*find_compiler(), *_COMMON, *flags, *sources, "-o", str(partial), "-ldl"])
    return partial.replace(target / TRANSFER.name)


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise BuildError(f"{command[0]}: {error}") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["failed"]
        raise BuildError(f"{command[0]} stopped: {lines[0]}")


def main() -> None:
    """Compile beside this file."""
    try:
        build_transfer(Path(__file__).parent)
        file = build(Path(__file__).parent)
    except (BuildError, OSError) as error:
        print(f"squizd: the kernels were not built: {error}", file=sys.stderr)
        sys.exit(1)
    print(f"{file}, for MLX {'.'.join(map(str, mlx_version(find_mlx())))}")


if __name__ == "__main__":
    main()
