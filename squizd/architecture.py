"""The mlx-lm model that a config describes, built without materialising a weight.

Shared by compress (what tensors must there be?) and runtime (where do they go?). mlx-lm owns the
architectures; this module only finds things in them.
"""

from __future__ import annotations

import re
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP
from mlx_lm.utils import _decode_tagged_floats, _get_classes

from .errors import SourceError


def build(config: dict[str, Any], where: str) -> nn.Module:
    """An mlx-lm model with lazy random weights; SourceError, naming `where`, if mlx-lm cannot build it."""
    if "model_file" in config:
        raise SourceError(f"{where} wants to run its own code ({config['model_file']}); squizd never does")
    config = _decode_tagged_floats(config)  # {"__float__": "Infinity"} is how JSON says infinity
    try:
        model_class, args_class = _get_classes(config)
    except (ValueError, AttributeError) as error:
        raise SourceError(
            f"{where}: unknown architecture {config.get('model_type')!r}",
            hint="a newer mlx-lm may know it: pip install -U mlx-lm",
        ) from error
    try:
        model: nn.Module = model_class(args_class.from_dict(config))
    except (TypeError, ValueError, KeyError, AttributeError, ZeroDivisionError, AssertionError) as error:
        raise SourceError(f"{where}: mlx-lm cannot build {config['model_type']}: {error}") from error
    model.eval()
    return model


def expert_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that route tokens to experts, by path, in model order. Found by type, never by name."""
    return {path: module for path, module in _walk(model) if isinstance(module, SwitchGLU | SwitchMLP)}


def _walk(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """All modules by path in the order in which their parameters are listed."""
    modules: dict[str, nn.Module] = dict(model.named_modules())
    ordered: dict[str, nn.Module] = {}
    for name, _ in tree_flatten(model.parameters()):
        pieces = name.split(".")
        for i in range(len(pieces)):
            path = ".".join(pieces[:i])
            if path in modules and path not in ordered:
                ordered[path] = modules[path]
    return list(ordered.items())


def layer_ids(paths: list[str]) -> list[int]:
    """An id for each expert module: its decoder layer's number where those ascend, else its position."""
    found = [re.search(r"layers\.(\d+)\.", path) for path in paths]
    numbers = [int(m[1]) if m else -1 for m in found]
    ascending = all(a < b for a, b in zip([-1, *numbers], numbers, strict=False))
    return numbers if ascending else list(range(len(paths)))


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` where `path` is in `model`."""
    at, _, leaf = path.rpartition(".")
    parent: Any = model
    for piece in at.split(".") if at else ():
        parent = parent[int(piece)] if isinstance(parent, list) else getattr(parent, piece)
    if isinstance(parent, list):
        parent[int(leaf)] = module
    else:
        setattr(parent, leaf, module)
