"""Visitor of a walk: what enters expert modules, which experts are chosen, and the gates they are taken with.

Gates are found without knowing any architecture: the router's block is linear in what its experts put out, so
unit vectors in place of their outputs bring the gates to light.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from .architecture import expert_modules
from .errors import SourceError
from .listening import muted
from .routed import ExpertInputs
from .scratch import Folder, Scratch


class RoutedInputs:
    """Visitor: everything that reaches the expert modules of the present layer."""

    def __init__(self, folder: Folder = None) -> None:
        self.found: list[ExpertInputs] = []
        self._folder = folder
        self._kept: dict[str, _Kept] = {}

    def enter(self, path: str, layer: nn.Module) -> None:
        self.found, self._kept = [], {}
        owners: dict[str, nn.Module] = dict(layer.named_modules())
        for name, module in expert_modules(layer).items():
            kept = self._kept.setdefault(name, _Kept(Scratch(self._folder)))
            _watch(owners[name.rpartition(".")[0]], module, kept)

    def leave(self, path: str, layer: nn.Module) -> None:
        for name, module in expert_modules(layer).items():
            kept = self._kept.pop(name)
            if not kept.gates:
                raise SourceError(f"{path}.{name} was never called: calibration cannot walk this architecture")
            chosen, gates = np.concatenate(kept.chosen), np.concatenate(kept.gates)
            self.found.append(ExpertInputs(f"{path}.{name}", module, kept.x, chosen.astype(np.int32), gates))
            kept.x = Scratch()  # the classes that `_watch` made hold it until the next garbage collection


@dataclass
class _Kept:
    """By call of a block: its experts' inputs, which were chosen, and their gates."""

    x: Scratch
    chosen: list[npt.NDArray[Any]] = field(default_factory=list)
    gates: list[npt.NDArray[np.float32]] = field(default_factory=list)


def _watch(block: nn.Module, experts: nn.Module, kept: _Kept) -> None:
    """Keep (x, chosen, gates) of every call of `block`, which calls `experts`."""
    mode: dict[str, Any] = {"stand-in": None, "seen": None}
    block_kind, experts_kind = type(block), type(experts)

    class Experts(experts_kind):  # type: ignore[valid-type,misc]
        def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
            mode["seen"] = (x, indices)
            if mode["stand-in"] is None:
                out: mx.array = super().__call__(x, indices)
                return out
            k, width = indices.shape[-1], x.shape[-1]
            rows = mx.eye(k, width) if mode["stand-in"] else mx.zeros((k, width))
            return mx.broadcast_to(rows, (*indices.shape, width))

    class Block(block_kind):  # type: ignore[valid-type,misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            lit = []
            with muted():
                for stand_in in (True, False):
                    mode["stand-in"] = stand_in
                    out = super().__call__(*args, **kwargs)
                    lit.append(out[..., : mode["seen"][1].shape[-1]])
                    mx.eval(lit)
            mode["stand-in"] = None
            out = super().__call__(*args, **kwargs)
            x, chosen = mode["seen"]
            mode["seen"] = None
            mx.eval(out)
            kept.x.append(x.reshape(-1, x.shape[-1]))
            kept.chosen.append(np.array(chosen).reshape(-1, chosen.shape[-1]))
            kept.gates.append(np.array(lit[0] - lit[1]).reshape(-1, chosen.shape[-1]))
            return out

    experts.__class__, block.__class__ = Experts, Block
