"""Run Mixture-of-Experts language models that do not fit in memory, without changing their answers.

Everything public is here and loaded on first use: `squizd.open` and `squizd.validate` need no MLX.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .allocation import Plan
    from .compression import Summary, compress, plan
    from .container import File, Report, open, validate
    from .errors import SquizdError
    from .evaluation import Result, evaluate
    from .fitting import fit
    from .generation import Conversation, Part, Sampling, Session, generate, stream_generate
    from .guide import Calibration
    from .measuring import bench
    from .profiling import profile
    from .runtime.load import load

_HOMES = {
    "compress": ".compression", "plan": ".compression", "Summary": ".compression", "Plan": ".allocation",
    "Calibration": ".guide", "evaluate": ".evaluation", "Result": ".evaluation",
    "open": ".container", "validate": ".container", "File": ".container", "Report": ".container",
    "SquizdError": ".errors",
    "generate": ".generation", "stream_generate": ".generation", "Session": ".generation",
    "Conversation": ".generation", "Part": ".generation", "Sampling": ".generation",
    "load": ".runtime.load", "profile": ".profiling", "fit": ".fitting", "bench": ".measuring",
}  # fmt: skip
_WITHOUT_MLX = (".container", ".errors")

__all__ = [
    "Calibration", "Conversation", "File", "Part", "Plan", "Report", "Result", "Sampling", "Session", "SquizdError",
    "Summary", "__version__", "bench", "compress", "evaluate", "fit", "generate", "load", "open", "plan", "profile",
    "stream_generate", "validate",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'squizd' has no attribute {name!r}")
    from importlib import import_module

    if _HOMES[name] not in _WITHOUT_MLX:
        from .backend import require

        require()
    value = globals()[name] = getattr(import_module(_HOMES[name], __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
