"""A checkpoint's tensors under the names that mlx-lm's model gives them, lazy: nothing is read before it is evaluated.

Shared by compress, calibration and evaluation. mlx-lm's `sanitize` maps names and stacks experts.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .checkpoint import Checkpoint
from .errors import SourceError


def read(checkpoint: Checkpoint, model: nn.Module) -> dict[str, mx.array]:
    """Lazy arrays by parameter name of `model`, in the types the checkpoint stores.

    An array that was evaluated stays in memory for as long as this dictionary holds it: pop it, or read anew.
    Raises SourceError for shards that MLX cannot read and tensors that `model` cannot take.
    """
    where = str(checkpoint.repo or checkpoint.folder)
    weights: dict[str, mx.array] = {}
    for shard in checkpoint.shards:
        try:
            loaded: Any = mx.load(str(shard))
        except (RuntimeError, ValueError) as error:
            raise SourceError(f"{shard}: MLX cannot read it: {error}") from error
        weights.update(loaded)
    if hasattr(model, "sanitize"):
        try:
            weights = model.sanitize(weights)
        except (KeyError, ValueError, IndexError, TypeError, AttributeError) as error:
            raise SourceError(f"{where}: tensors do not fit {checkpoint.config['model_type']}: {error!r}") from error
    return weights
