"""What reached the experts of one module, and sums over it by expert.

An expert's error counts in the layer's output as often and as much as it is heard, so everything is weighted by
the square of the gate with which the router takes its output.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
from mlx_lm.models.switch_layers import SwitchGLU

from .moments import products
from .scratch import Scratch
from .single import alone

Floats = npt.NDArray[np.float32]

# Tokens of the whole layer's statistics that every expert's are mixed with: an expert that was never routed
# has the layer's, one with thousands of tokens its own. On unseen text 128 to 512 leave 0.1 to 0.2 dB less error
# than 32 does.
PRIOR_TOKENS = 512.0
PIECE = 1 << 12  # tokens of one expert that are in memory at once: most of a text may go to one expert


@dataclass
class ExpertInputs:
    """What reached the experts of one module: x [tokens, in] and, by token, the chosen experts and their gates.

    x and gates [tokens, k] float32, `chosen` int32 [tokens, k].
    """

    path: str
    module: nn.Module
    x: Scratch
    chosen: npt.NDArray[np.int32]
    gates: Floats

    def __post_init__(self) -> None:
        flat = self.chosen.reshape(-1)
        self._order = np.argsort(flat, kind="stable")
        self._ends = np.cumsum(np.bincount(flat, minlength=self.count))

    @property
    def count(self) -> int:
        """Number of experts."""
        return int(self.first["weight"].shape[0])

    @property
    def first(self) -> nn.Module:
        """One of the projections that take the module's input."""
        found: nn.Module = self.module[self.first_name]
        return found

    @property
    def first_name(self) -> str:
        """Its name."""
        return "up_proj" if isinstance(self.module, SwitchGLU) else "fc1"

    @property
    def last(self) -> str:
        """Name of the projection that does not take the module's input but what the others made of it."""
        return "down_proj" if isinstance(self.module, SwitchGLU) else "fc2"

    def rows(self, expert: int) -> tuple[npt.NDArray[np.intp], Floats]:
        """Tokens that an expert got, and their gates."""
        start = self._ends[expert - 1] if expert else 0
        pairs = self._order[start : self._ends[expert]]
        return pairs // self.chosen.shape[1], self.gates.reshape(-1)[pairs]

    def hidden(self, x: mx.array, expert: int, module: nn.Module | None = None) -> mx.array:
        """What the last projection of an expert gets for inputs x [tokens, in]; `module` in place of its own."""
        one, indices = alone(module or self.module, expert), mx.zeros(x.shape[0], mx.uint32)
        # Not x[:, None]: of such a view MLX 0.32's sorted gather_mm reads the wrong rows on GPUs (its issue 4253).
        x = mx.contiguous(x).reshape(x.shape[0], 1, -1)
        if isinstance(self.module, SwitchGLU):
            up, gate = (one[name](x, indices, sorted_indices=True) for name in ("up_proj", "gate_proj"))
            out = one.activation(up, gate)
        else:
            out = one.activation(one["fc1"](x, indices, sorted_indices=True))
        flat: mx.array = out.reshape(x.shape[0], -1)
        return flat

    def pieces(self, expert: int) -> Iterator[tuple[mx.array, mx.array]]:
        """An expert's inputs [tokens, in] and gates [tokens, 1], `PIECE` tokens at most at a time; zeros if none."""
        tokens, gates = self.rows(expert)
        if not len(tokens):
            yield mx.zeros_like(self.x.rows(np.zeros(1, np.intp))), mx.zeros((1, 1))
        for start in range(0, len(tokens), PIECE):
            part = slice(start, start + PIECE)
            yield self.x.rows(tokens[part]), mx.array(gates[part])[:, None]

    def of(self, expert: int, projection: str) -> Iterator[mx.array]:
        """Inputs [tokens, in] of one expert's projection, times their gates, in pieces."""
        for x, gates in self.pieces(expert):
            yield (self.hidden(x, expert) if projection == self.last else x) * gates

    def hessians(self, projection: str, experts: Sequence[int]) -> mx.array:
        """Sum over tokens of gate² x xᵀ by expert, [experts, in, in], float32, evaluated."""
        stacked = mx.stack([_total(products(x) for x in self.of(expert, projection)) for expert in experts])
        mx.eval(stacked)
        return stacked

    def disturbed(self, experts: Sequence[int], module: nn.Module) -> tuple[mx.array, mx.array]:
        """Of the last projection, whose input y is x where `module` takes the place of the experts' own.

        Sums over tokens of gate² x xᵀ and gate² (y - x) xᵀ by expert, [experts, in, in] each, float32, evaluated.
        """

        def sums(expert: int) -> Iterator[mx.array]:
            for inputs, gates in self.pieces(expert):
                exact, x = (self.hidden(inputs, expert, m) * gates for m in (None, module))
                yield mx.stack([products(x), products(exact - x, x)])

        found = mx.stack([_total(sums(expert)) for expert in experts], axis=1)
        mx.eval(found)
        return found[0], found[1]

    def mixed(self, hessians: mx.array, layer: mx.array) -> mx.array:
        """`hessians` with `PRIOR_TOKENS` tokens of average gate of the layer's added."""
        return hessians + PRIOR_TOKENS * self.mean_square_gate() * layer

    def mean_square_gate(self) -> float:
        """Average gate² over tokens and their experts."""
        return float(np.mean(self.gates.astype(np.float64) ** 2))

    def layer_hessian(self, projection: str) -> mx.array:
        """The sum of all experts' `hessians` per unit of gate², [in, in]."""
        squares = np.square(self.gates.astype(np.float64)).sum(axis=-1)
        total = mx.zeros(())
        if projection == self.last:
            for expert in range(self.count):
                total = total + self.hessians(projection, [expert])[0]
                mx.eval(total)
        else:  # all experts have the same inputs: every token once, by the sum of its gates² is enough
            start, weights = 0, np.sqrt(squares).astype(np.float32)[:, None]
            for x in self.x:
                end = start + x.shape[0]
                total, start = total + products(x * mx.array(weights[start:end])), end
                mx.eval(total)
        return total / max(float(squares.sum()), 1e-30)


def _total(pieces: Iterable[mx.array]) -> mx.array:
    """Their sum, evaluated as it grows."""
    total = mx.zeros(())
    for piece in pieces:
        total = total + piece
        mx.eval(total)
    return total
