"""A checkpoint's forward pass over many windows of text, one layer in memory at a time, for any model of mlx-lm.

The model is called once per batch with stand-ins for its layers, which pass their input on and note what else they were
given (masks, caches). After that each layer runs by itself: its weights are read and widened to float32, it
computes every batch, and it is dropped. Between layers only the hidden states are alive: windows × context ×
width × 4 bytes. What is recorded on the way is the business of `Visitor`s.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from .architecture import build
from .checkpoint import Checkpoint
from .errors import SourceError
from .runtime import device
from .weights import read as read_weights

BATCH_TOKENS = 4096  # computed at once: bounds the work space of a layer


class Visitor(Protocol):
    """Looks at a layer while it computes; `path` is its name in the model."""

    def enter(self, path: str, layer: nn.Module) -> None:
        """Before the layer runs; it has its weights."""

    def leave(self, path: str, layer: nn.Module) -> None:
        """After it has computed every batch."""


class _Stand(nn.Module):
    """In a layer's place: notes its other arguments, passes on its input, or what it is told to put out."""

    def __init__(self) -> None:
        super().__init__()
        self._state: dict[str, Any] = {"entered": None, "others": ((), {}), "out": None}

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        self._state["entered"], self._state["others"] = x, (args, kwargs)
        return x if self._state["out"] is None else self._state["out"]


class Walk:
    """One pass over `windows` (equally long lists of token ids).

    Raises SourceError for a model whose layers are not called one after another with hidden states first.
    """

    def __init__(self, checkpoint: Checkpoint, windows: Sequence[Sequence[int]]) -> None:
        self.where = str(checkpoint.repo or checkpoint.folder)
        self.model = build(checkpoint.config, self.where)
        self._weights = read_weights(checkpoint, self.model)
        self.root, self._layers = self._find_layers()
        size = max(1, BATCH_TOKENS // len(windows[0]))
        self.batches = [mx.array([list(w) for w in windows[i : i + size]]) for i in range(0, len(windows), size)]
        self._modules = list(self._layers)
        self._stands = [_Stand() for _ in self._modules]
        self._layers[:] = self._stands
        self._fill([n for n in self._weights if not n.startswith(self.root + ".")], self.model, "", widen=False)
        self.states: list[mx.array] = []
        self.entered: list[mx.array] = []  # the states that entered the present layer
        self._others: list[list[Any]] = []

    def _find_layers(self) -> tuple[str, list[Any]]:
        """Path and list of the decoder layers."""
        first = self.model.layers[0]
        for path, module in self.model.named_modules():
            if module is first and path.endswith(".0"):
                owner: Any = self.model
                for piece in path.split(".")[:-1]:
                    owner = owner[int(piece)] if isinstance(owner, list) else getattr(owner, piece)
                return path.removesuffix(".0"), owner
        raise SourceError(f"{self.where}: its layers are in no list; calibration cannot walk this architecture")

    def _fill(self, names: Sequence[str], module: nn.Module, prefix: str, widen: bool) -> None:
        """Give `module` its arrays; those not widened stay lazy."""
        arrays = []
        for name in names:
            array = self._weights.pop(name)
            if widen and mx.issubdtype(array.dtype, mx.floating):
                array = array.astype(mx.float32)
                mx.eval(array)
            arrays.append((name.removeprefix(prefix), array))
        module.update(tree_unflatten(arrays))

    def layers(self, visitors: Sequence[Visitor] = ()) -> Iterator[tuple[str, nn.Module]]:
        """Run the layers in order; yields (path, layer), with its weights, once it has computed every batch.

        The layer is dropped when the next one is asked for.
        """
        for batch in self.batches:
            self.model(batch)  # lazily: of this only what enters the first layer is ever computed
            entered = [s._state["entered"] for s in self._stands]
            if any(x is not entered[0] for x in entered):
                raise SourceError(
                    f"{self.where}: calibration cannot walk this architecture: its layers are not in a row"
                )
            state = entered[0].astype(mx.float32)
            arguments = [s._state["others"] for s in self._stands]
            mx.eval(state, [a for args, kwargs in arguments for a in (*args, *kwargs.values()) if _is_array(a)])
            self.states.append(state)
            self._others.append(arguments)
        for position, layer in enumerate(self._modules):
            path = f"{self.root}.{position}"
            names = [f"{path}.{name}" for name, _ in tree_flatten(layer.parameters())]
            self._fill(names, layer, path + ".", widen=True)
            device.accelerate(layer)
            for visitor in visitors:
                visitor.enter(path, layer)
            self.entered = list(self.states)
            for number in range(len(self.batches)):
                self.states[number] = self.apply(position, layer, number, self.states[number])
                mx.eval(self.states[number])
            for visitor in visitors:
                visitor.leave(path, layer)
            yield path, layer
            self._modules[position] = layer = None
            mx.clear_cache()

    def apply(self, position: int, layer: nn.Module, number: int, state: mx.array) -> mx.array:
        """The present layer's output for `state`, lazily, with all else that it is given in batch `number`."""
        args, kwargs = self._others[number][position]
        out: mx.array = layer(state, *args, **kwargs)
        return out

    def finish(self, visitors: Sequence[Visitor], count: int) -> None:
        """What follows the last layer, for the first `count` windows; its logits are not kept."""
        self.widen_rest()
        for visitor in visitors:
            visitor.enter("", self.model)
        rows = [(number, row) for number, batch in enumerate(self.batches) for row in range(batch.shape[0])]
        for number, row in rows[:count]:
            mx.eval(self.logits(self.batches[number][row : row + 1], self.states[number][row : row + 1]))
        for visitor in visitors:
            visitor.leave("", self.model)

    def widen_rest(self) -> None:
        """Make ready what is not in a layer, for `logits`."""
        rest = [(n, a.astype(mx.float32)) for n, a in tree_flatten(self.model.parameters()) if "layers" not in n]
        self.model.update(
            tree_unflatten([(n, a) for n, a in rest if mx.issubdtype(a.dtype, mx.floating)]), strict=False
        )
        device.accelerate(self.model)

    def logits(self, ids: mx.array, state: mx.array) -> mx.array:
        """Logits of hidden states [batch, tokens, width] that leave the last layer; after `widen_rest`."""
        self._stands[-1]._state["out"] = state
        out: mx.array = self.model(ids)
        self._stands[-1]._state["out"] = None
        return out


def _is_array(value: Any) -> bool:
    return isinstance(value, mx.array)
