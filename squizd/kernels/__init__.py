"""Fast arithmetic for MLX on Linux CPUs: quantized and plain linear layers, experts, attention, norms, rotations.

Used unless SQUIZD_KERNELS=0. Sums are added in another order than MLX's, so logits differ from mlx-lm's by about
1e-6 of the largest; among themselves they are the same bit for bit, whatever is paged, batched or threaded.

A compiled extension (`src/`), built when squizd is installed where there is a C++ compiler, or later by
`python -m squizd.kernels.build`. Where it is absent, `missing()` says why, in one line, and everything runs
through MLX. Its operations are lazy MLX operations in float32; which of them are used, and where, is
the business of `layers`.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from importlib.metadata import version as version_of
from types import ModuleType

_KEPT_PER_THREAD = 768 << 10  # decoded weights (four rows of up to 32,768), attention tiles, small buffers
_HINT = "python -m squizd.kernels.build"


def wanted() -> bool:
    """Whether the kernels may be used: unless the user turned them off."""
    return os.environ.get("SQUIZD_KERNELS") != "0"


def _import() -> tuple[ModuleType | None, str]:
    if not wanted():
        return None, "the kernels are off (SQUIZD_KERNELS=0)"
    if sys.platform != "linux":
        return None, "the kernels are for Linux"
    import mlx.core as mx

    from .build import sources_digest  # here: a module that was imported already does not run cleanly with -m

    try:
        _native = import_module("._native", __name__)
    except ModuleNotFoundError:
        return None, f"the kernels are not compiled ({_HINT})"
    except ImportError as error:
        if "undefined symbol" in str(error):  # MLX's functions have other signatures, or are gone
            return None, f"the kernels were compiled for another MLX than is installed ({_HINT})"
        return None, f"the compiled kernels do not load: {error} ({_HINT})"
    version = version_of("mlx").partition(".dev")[0]
    if _native.mlx_version != version:
        return None, f"the kernels were compiled for MLX {_native.mlx_version}, {version} is installed ({_HINT})"
    if getattr(_native, "sources", "") != sources_digest():
        return None, f"the kernels were compiled from other sources than are here ({_HINT})"
    try:  # another nanobind than MLX's own would not know its arrays
        _native.rms_norm(mx.zeros((1,)), None, 0.0)
    except TypeError:
        return None, f"the kernels were compiled with another nanobind than MLX ({_HINT})"
    _native.set_threads(int(os.environ.get("SQUIZD_THREADS") or len(os.sched_getaffinity(0))))
    return _native, ""


_found: tuple[ModuleType | None, str] | None = None


def native() -> ModuleType | None:
    """The extension, or None if it cannot be used here."""
    global _found
    if _found is None:
        _found = _import()
    return _found[0]


def missing() -> str:
    """Why the extension cannot be used here, in one line; "" if it can."""
    native()
    return _found[1] if _found else ""


def scratch_bytes() -> int:
    """An upper bound of what the threads keep between operations. What grows with the input is MLX's memory."""
    found = native()
    return (found.threads() + 1) * _KEPT_PER_THREAD if found else 0


def describe() -> str:
    """What computes, for a statistics line: "squizd kernels (AVX-512, 2 threads)" or "MLX"."""
    found = native()
    return f"squizd kernels ({found.in_use()}, {found.threads()} threads)" if found else "MLX"
