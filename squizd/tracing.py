"""Which experts a model's routers choose for a text, recorded while the text runs through the model.

Works for every architecture of mlx-lm: an expert module (`SwitchGLU`, `PagedSwitch`) is called with
indices, whatever its router looks like, so it is there that they are seen. Gate weights are applied
outside of it; they are measured by calling the block around the module again with the module's answers
replaced by unit vectors. What cannot be measured so is None, never a guess.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
from mlx_lm.models.cache import make_prompt_cache

from .kernels import replay
from .runtime.load import state

_TOLERANCE = 1e-3  # of the largest gate weight: beyond that a block does more than add weighted answers
_UNIT = 4096.0  # large beside what a shared expert adds, so that 16-bit floats lose little in the difference

Experts = npt.NDArray[np.uint16]
Gates = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Routing:
    """What the routers chose for consecutive tokens.

    `experts[i]`: uint16 [tokens, k] of the i-th expert module in the order of MOEL, in the router's order;
    `gates[i]`: float32 [tokens, k], the weight of each answer, or None where it cannot be observed.
    A module that no token reached (multi-token prediction) has arrays of no rows.
    """

    experts: tuple[Experts, ...]
    gates: tuple[Gates | None, ...]

    @property
    def tokens(self) -> int:
        """How many tokens went through the model."""
        return max((len(x) for x in self.experts), default=0)


class _Tap:
    """What is seen of one expert module during a forward pass. `mode`: "record", or what the module answers instead."""

    def __init__(self) -> None:
        self.mode = "record"
        self.indices: list[mx.array] = []
        self.gates: list[mx.array | None] = []

    def take(self) -> tuple[Experts, Gates | None]:
        """What was recorded since the last time."""
        indices, gates = self.indices, self.gates
        self.indices, self.gates = [], []
        if not indices:
            return np.empty((0, 0), np.uint16), None
        width = indices[0].shape[-1]
        experts = np.concatenate([np.array(x).reshape(-1, width) for x in indices]).astype(np.uint16)
        if len(gates) != len(indices):
            return experts, None
        parts = [_weights(g, width) for g in gates]
        known = [p for p in parts if p is not None]
        return experts, np.concatenate(known) if len(known) == len(parts) else None


def _weights(difference: mx.array | None, width: int) -> Gates | None:
    """Gate weights [tokens, k] from a block's answer to unit vectors; None if that is no such weights."""
    if difference is None:
        return None
    rows = np.array(difference.astype(mx.float32)).reshape(-1, difference.shape[-1]) / _UNIT
    weights, rest = rows[:, :width], rows[:, width:]
    limit = _TOLERANCE * float(np.abs(weights).max(initial=0))
    if not np.isfinite(rows).all() or np.abs(rest).max(initial=0) > limit or weights.min(initial=0) < -limit:
        return None
    positive: Gates = np.maximum(weights, 0)
    return positive


@contextmanager
def recording(model: nn.Module) -> Iterator[list[_Tap]]:
    """One tap for each expert module of a loaded model while inside; single tokens are not replayed meanwhile.

    Modules change their class, so everything else about them stays. One thread at a time.
    """
    taps, changed = [], []
    modules = dict(model.named_modules())
    try:
        with replay.paused():
            for layer in state(model).file.moe_layers:
                tap = _Tap()
                taps.append(tap)
                parent = layer.path.rpartition(".")[0]
                for path, make in ((layer.path, _tapped_switch), (parent, _tapped_block)):
                    module = modules.get(path)
                    if module is not None:
                        changed.append((module, type(module)))
                        module.__class__ = make(type(module), tap)
            yield taps
    finally:
        for module, kind in reversed(changed):
            module.__class__ = kind


def _tapped_switch(base: Any, tap: _Tap) -> type:
    class Tapped(base):
        def __call__(self, x: mx.array, indices: mx.array, *args: Any, **options: Any) -> Any:
            if tap.mode == "record":
                tap.indices.append(indices)
                return base.__call__(self, x, indices, *args, **options)
            width = indices.shape[-1]
            answer = mx.zeros((1, 1), x.dtype)
            if tap.mode == "units":
                answer = _UNIT * mx.eye(width, x.shape[-1], dtype=x.dtype)
            return mx.broadcast_to(answer, (*indices.shape, x.shape[-1]))

    return Tapped


def _tapped_block(base: Any, tap: _Tap) -> type:
    """The module around an expert module: called twice more, with unit vectors and with zeros for the experts' answers.

    Only where its arguments are arrays and nothing else: a whole decoder layer would write to its cache again.
    """

    class Tapped(base):
        def __call__(self, *args: Any, **options: Any) -> Any:
            before = len(tap.indices)
            out = base.__call__(self, *args, **options)
            if len(tap.indices) == before + 1:
                tap.gates.append(self._difference(*args) if not options else None)
            return out

        def _difference(self, *args: Any) -> mx.array | None:
            if not all(isinstance(x, mx.array) for x in args):
                return None
            answers = []
            try:
                for tap.mode in ("units", "zeros"):
                    answers.append(base.__call__(self, *args))
            except Exception:  # whatever a block makes of answers that are none
                return None
            finally:
                tap.mode = "record"
            fine = all(isinstance(a, mx.array) for a in answers) and answers[0].shape == answers[1].shape
            return answers[0] - answers[1] if fine and answers[0].shape[-1] > tap.indices[-1].shape[-1] else None

    return Tapped


def trace(model: nn.Module, texts: Iterable[Sequence[int]], *, chunk: int | None = None) -> Iterator[list[Routing]]:
    """Run each text (token ids) through a loaded model from an empty cache; yields the routing of its chunks.

    `chunk` tokens (default: the budget's prefill chunk) are computed at once, which changes nothing: routing in
    one pass over a text is that of its tokens one by one. A text must fit the context that was reserved. Raises
    ExpertReadError as the model does.
    """
    size = chunk or state(model).prefill_step_size
    with recording(model) as taps:
        for ids in texts:
            cache = make_prompt_cache(model)
            parts = []
            for start in range(0, len(ids), size):
                out = model(mx.array(list(ids[start : start + size]))[None], cache=cache)
                mx.eval(out, [tap.indices for tap in taps], [g for tap in taps for g in tap.gates if g is not None])
                seen = [tap.take() for tap in taps]
                parts.append(Routing(tuple(e for e, _ in seen), tuple(g for _, g in seen)))
            yield parts


def join(parts: Sequence[Routing]) -> Routing:
    """Consecutive routings as one."""
    if not parts:
        return Routing((), ())
    experts, gates = [], []
    for i in range(len(parts[0].experts)):
        pieces = [p for p in parts if len(p.experts[i])]
        experts.append(np.concatenate([p.experts[i] for p in pieces]) if pieces else parts[0].experts[i])
        known = [g for p in pieces if (g := p.gates[i]) is not None]
        gates.append(np.concatenate(known) if pieces and len(known) == len(pieces) else None)
    return Routing(tuple(experts), tuple(gates))
