"""The compiled library that needs neither Python nor MLX: `kernels/src/transfer_api.cpp`, called through ctypes."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from typing import Any

from ..kernels.build import TRANSFER, sources_digest


@cache
def compiled() -> Any:
    """The library, or the reason why there is none."""
    try:
        found = ctypes.CDLL(os.fspath(TRANSFER))
    except OSError:
        return "its transfers are not compiled (python -m squizd.kernels.build)"
    found.squizd_sources.restype = ctypes.c_char_p
    if found.squizd_sources().decode() != sources_digest():
        return "its transfers were compiled from other sources than are here (python -m squizd.kernels.build)"
    for name in ("squizd_transfer_open", "squizd_shelf_open", "squizd_exchange_open"):
        getattr(found, name).restype = ctypes.c_void_p
    found.squizd_exchange_box.restype = ctypes.c_uint64
    for name in ("begin", "finish", "stop"):
        getattr(found, f"squizd_exchange_{name}").restype = None
    for name in ("squizd_fetch", "squizd_widen_codes"):
        getattr(found, name).restype = None
    return found


def pointer(array: Any) -> ctypes.c_void_p:
    """The address of a NumPy array."""
    return ctypes.c_void_p(array.ctypes.data)
