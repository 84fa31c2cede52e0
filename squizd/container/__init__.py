"""The container: bytes, offsets, digests. stdlib, numpy, zstandard and xxhash only; no MLX, no hub."""

from .reader import File, open
from .validator import Report, validate
from .writer import Plan, Writer

__all__ = ["File", "Plan", "Report", "Writer", "open", "validate"]
