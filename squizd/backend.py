"""Whether MLX can compute on this machine as installed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from .errors import BackendError

if TYPE_CHECKING:
    import mlx.core as mx


def require() -> None:
    """Raise BackendError, with the command that helps, unless MLX can be imported."""
    try:
        import mlx.core  # noqa: F401
    except ImportError as error:
        try:
            what = f"MLX {version('mlx')} is installed without a backend for this machine"
        except PackageNotFoundError:
            what = "MLX is not installed"
        raise BackendError(what) from error


def on_cpu() -> bool:
    """Whether MLX computes on the CPU by default."""
    import mlx.core as mx

    return bool(mx.default_device().type == mx.DeviceType.cpu)


def on_cuda() -> bool:
    """Whether MLX computes on an NVIDIA GPU by default."""
    import mlx.core as mx

    return not on_cpu() and bool(mx.cuda.is_available())


def kind_of_device() -> str:
    """Where MLX computes by default: "cpu", "cuda" or "metal"."""
    return "cpu" if on_cpu() else "cuda" if on_cuda() else "metal"


def current_stream() -> mx.Stream:
    """Where this thread computes by default."""
    import mlx.core as mx

    return mx.default_stream(mx.default_device())
