"""Compile the kernels in place: `python -m squizd.kernels.build`.

Needs a C++20 compiler, nanobind, and the headers that MLX's own wheel ships. Knows nothing of the
rest of the package and imports no MLX.
"""

from __future__ import annotations

import os
import platform
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
_COMMON = ["-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-DNDEBUG", "-pthread"]
# One object per instruction set. No contraction: every fused multiply-add is written as one.
_EXACT = ["-ffp-contract=off", "-fno-exceptions"]
_SETS = {
    "x86_64": {
        "avx512": ["-DSQUIZD_AVX512", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma"],
        "avx2": ["-DSQUIZD_AVX2", "-mavx2", "-mfma"],
        "plain": [],
    },
    "aarch64": {"neon": ["-DSQUIZD_NEON"], "plain": []},
}


class BuildError(Exception):
    """The kernels cannot be compiled here; the message says what is missing."""


def find_mlx() -> Path:
    """The folder of an installed MLX with headers and library: this environment's, even in an isolated build."""
    found = [Path(sysconfig.get_path(kind)) / "mlx" for kind in ("purelib", "platlib")]
    spec = util.find_spec("mlx")
    found += [Path(place) for place in (spec.submodule_search_locations or () if spec else ())]
    for folder in found:
        if (folder / "include" / "mlx" / "mlx.h").exists() and (folder / "lib" / "libmlx.so").exists():
            return folder
    raise BuildError("MLX's headers are not installed (Linux: pip install 'mlx[cpu]')")


def find_nanobind() -> Path:
    """nanobind's folder of sources."""
    spec = util.find_spec("nanobind")
    if spec is None or spec.origin is None:
        raise BuildError("nanobind is not installed (pip install nanobind)")
    return Path(spec.origin).parent


def find_compiler() -> str:
    """$CXX, g++, clang++ or c++."""
    for name in (os.environ.get("CXX", "").split(" ")[0], "g++", "clang++", "c++"):
        if name and shutil.which(name):
            return name
    raise BuildError("no C++ compiler is installed (g++ or clang++)")


def build(target: Path) -> Path:
    """Compile into the folder `target`; returns the file. Raises BuildError."""
    if sys.platform != "linux":
        raise BuildError("the kernels are for Linux; elsewhere MLX's own are fast")
    sets = _SETS.get(platform.machine(), {"plain": []})
    compiler, mlx, nanobind = find_compiler(), find_mlx(), find_nanobind()
    python = [f"-I{sysconfig.get_path('include')}"]
    binding = [
        f"-I{nanobind}/include",
        f"-I{nanobind}/ext/robin_map/include",
        "-DNB_DOMAIN=mlx",
        "-DNB_COMPACT_ASSERTIONS",
        *python,
    ]
    jobs = {name: [*_COMMON, *_EXACT, *flags, str(SOURCES / "arithmetic.cpp")] for name, flags in sets.items()}
    jobs["choose"] = [*_COMMON, str(SOURCES / "choose.cpp")]
    jobs["work"] = [*_COMMON, str(SOURCES / "work.cpp")]
    jobs["mlx"] = [*_COMMON, *binding, "-isystem", f"{mlx}/include", str(SOURCES / "mlx.cpp")]
    jobs["nanobind"] = [*_COMMON, "-O1", *binding, "-fno-strict-aliasing", str(nanobind / "src" / "nb_combined.cpp")]
    with tempfile.TemporaryDirectory() as folder:
        objects = {name: f"{folder}/{name}.o" for name in jobs}
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            list(pool.map(lambda job: _run([compiler, *job[1], "-c", "-o", objects[job[0]]]), jobs.items()))
        library = f"{folder}/{FILE}"
        # mlx.core has loaded libmlx before; the search path is for tools that look at the file alone.
        where = ["-L", f"{mlx}/lib", "-lmlx", "-Wl,-rpath,$ORIGIN/../../mlx/lib", "-Wl,-s", "-pthread"]
        _run([compiler, "-shared", *objects.values(), *where, "-o", library])
        target.mkdir(parents=True, exist_ok=True)
        partial = target / (FILE + ".partial")
        shutil.copyfile(library, partial)
        return partial.replace(target / FILE)


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise BuildError(f"{command[0]}: {error}") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["failed"]
        raise BuildError(f"{command[0]} stopped: {lines[0]}")


if __name__ == "__main__":
    try:
        print(build(Path(__file__).parent))
    except BuildError as error:
        print(f"squizd: the kernels were not built: {error}", file=sys.stderr)
        sys.exit(1)
