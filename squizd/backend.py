"""Whether MLX can compute on this machine as installed."""

from __future__ import annotations

import importlib.util

from .errors import BackendError


def require() -> None:
    """Raise BackendError, with the command that helps, unless MLX and mlx-lm can be imported."""
    try:
        import mlx.core  # noqa: F401
    except ImportError as error:
        installed = importlib.util.find_spec("mlx") is not None
        what = "MLX is installed without a backend for this machine" if installed else "MLX is not installed"
        raise BackendError(what) from error
