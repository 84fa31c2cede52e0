"""A checkpoint's forward pass over many windows of text, one layer in memory at a time, for any model of mlx-lm.

The model is called once per batch with stand-ins for its layers, which pass their input on and note what else they were
given (masks, caches). After that each layer runs by itself: its weights are read and widened to float32 (experts one
at a time), it computes every batch, and it is dropped. Between layers only the hidden states are alive, windows ×
context × width × 4 bytes, on disk. What is recorded on the way is the business of `Visitor`s.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import infer_quant_config

from .architecture import build, expert_modules
from .backend import on_cuda
from .checkpoint import Checkpoint
from .errors import SourceError
from .runtime import device
from .scratch import Folder, Scratch
from .single import Unpacking, separate
from .weights import read as read_weights

BATCH_TOKENS = 2048  # computed at once
BATCH_BYTES = 1 << 23  # of hidden states computed at once: attention and experts take thirty times as much
BATCH_TOKENS_CUDA = 16384


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
    """One pass over `windows` (equally long lists of token ids). `states` are the hidden states by batch.

    They lie in `folder` (see `Scratch`). With `twice` those that entered the present layer are kept as well, `entered`.
    Raises SourceError for a model whose layers are not called one after another with hidden states first.
    """

    def __init__(
        self, checkpoint: Checkpoint, windows: Sequence[Sequence[int]], folder: Folder = None, twice: bool = False
    ) -> None:
        self.where = str(checkpoint.repo or checkpoint.folder)
        self._checkpoint = checkpoint
        self.model = build(checkpoint.config, self.where)
        self._weights = read_weights(checkpoint, self.model)
        self.root, self._layers = self._find_layers()
        self._modules = list(self._layers)
        self._stands = [_Stand() for _ in self._modules]
        self._layers[:] = self._stands
        self.states = Scratch(folder)
        self.entered = Scratch(folder) if twice else None
        self._others: list[list[Any]] = []
        self.read_rest()
        size = max(1, self._tokens_at_once() // len(windows[0]))
        self.batches = [mx.array([list(w) for w in windows[i : i + size]]) for i in range(0, len(windows), size)]

    def _tokens_at_once(self) -> int:
        if on_cuda():
            return BATCH_TOKENS_CUDA
        self.model(mx.zeros((1, 1), mx.int32))  # lazily: only to see how wide hidden states are
        width: int = self._stands[0]._state["entered"].shape[-1]
        return min(BATCH_TOKENS, BATCH_BYTES // (4 * width))

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

    def _fill(self, layer: nn.Module, path: str) -> None:
        """Give `layer` its arrays: experts as they are stored, all else in float32."""
        arrays = []
        experts = tuple(f"{name}." for name in expert_modules(layer))
        modules: dict[str, nn.Module] = dict(layer.named_modules())
        for name, _ in tree_flatten(layer.parameters()):
            array = self._weights.pop(f"{path}.{name}")
            owner = name.rpartition(".")[0]
            if f"{path}.{owner}.scales" in self._weights and name.endswith(".weight"):
                array = self._unpacked(array, modules[owner], f"{path}.{owner}", name.startswith(experts))
            if mx.issubdtype(array.dtype, mx.floating) and not name.startswith(experts):
                array = array.astype(mx.float32)
            mx.eval(array)
            arrays.append((name, array))
            mx.clear_cache()
        layer.update(tree_unflatten(arrays))
        separate(layer)
        device.accelerate(layer)

    def _unpacked(self, array: mx.array, module: nn.Module, path: str, expert: bool) -> mx.array:
        """A weight that the checkpoint has in a quantized form: in float32, or if of experts noted as such."""
        parts = {"weight": array, "scales": self._weights.pop(f"{path}.scales")}
        biases = self._weights.pop(f"{path}.biases", None)
        if biases is not None:
            parts["biases"] = biases
        facts = infer_quant_config("w", module, {f"w.{key}": part for key, part in parts.items()})
        unpack = partial(mx.dequantize, group_size=facts["group_size"], bits=facts["bits"], mode=facts["mode"])
        if not expert:
            return unpack(array, parts["scales"], biases).astype(mx.float32)
        mx.eval(list(parts.values()))
        module.changed = Unpacking(parts["scales"], biases, unpack)
        return array

    def read_rest(self) -> None:
        """Give the model what is in no layer, lazily; what was evaluated before is let go of."""
        fresh = read_weights(self._checkpoint, self.model)
        rest = [(name, a) for name, a in fresh.items() if not name.startswith(self.root + ".")]
        self.model.update(tree_unflatten(rest))
        for name, _ in rest:
            self._weights.pop(name, None)

    def layers(self, visitors: Sequence[Visitor] = ()) -> Iterator[tuple[str, nn.Module]]:
        """Run the layers in order; yields (path, layer), with its weights, once it has computed every batch.

        The layer is dropped when the next one is asked for.
        """
        for number in range(len(self.batches)):
            state, arguments = self._enter(number)
            self.states.append(state)
            if self.entered is not None:
                self.entered.append(state)
            self._others.append(arguments)
        del state
        for stand in self._stands:
            stand._state["entered"] = None
        self.read_rest()  # lets go of the embedding
        for position, layer in enumerate(self._modules):
            path = f"{self.root}.{position}"
            device.trim()  # what a tokenizer, or whoever looked at the last layer, left behind
            self._fill(layer, path)
            for visitor in visitors:
                visitor.enter(path, layer)
            for number in range(len(self.batches)):
                state = self.states[number]
                if self.entered is not None:
                    self.entered[number] = state
                self.states[number] = self.apply(position, layer, number, state)
            del state
            for visitor in visitors:
                visitor.leave(path, layer)
            device.trim()
            yield path, layer
            for module in layer.modules():  # whoever still knows the layer keeps no weights alive
                for name in [name for name, value in module.items() if isinstance(value, mx.array)]:
                    del module[name]
            self._modules[position] = layer = None
            mx.clear_cache()

    def entering(self, number: int) -> mx.array:
        """What enters the first layer in batch `number`, evaluated, as the model's weights outside layers are now."""
        return self._enter(number)[0]

    def _enter(self, number: int) -> tuple[mx.array, list[Any]]:
        self.model(self.batches[number])  # lazily: of this only what enters the first layer is ever computed
        entered = [s._state["entered"] for s in self._stands]
        if any(x is not entered[0] for x in entered):
            raise SourceError(f"{self.where}: calibration cannot walk this architecture: its layers are not in a row")
        state = entered[0].astype(mx.float32)
        arguments = [s._state["others"] for s in self._stands]
        mx.eval(state, [a for args, kwargs in arguments for a in (*args, *kwargs.values()) if _is_array(a)])
        return state, arguments

    def apply(self, position: int, layer: nn.Module, number: int, state: mx.array) -> mx.array:
        """The present layer's output for `state`, lazily, with all else that it is given in batch `number`."""
        args, kwargs = self._others[number][position]
        out: mx.array = layer(state, *args, **kwargs)
        return out

    def finish(self, visitors: Sequence[Visitor], count: int) -> None:
        """What follows the last layer, for the first `count` windows: what a visitor evaluates of it, no more.

        So neither logits nor the head's weights are ever in memory if visitors look at its inputs only.
        """
        self.widen_rest()
        for visitor in visitors:
            visitor.enter("", self.model)
        for number, batch in enumerate(self.batches):
            rows = min(batch.shape[0], count)
            if rows:
                self.logits(batch[:rows], self.states[number][:rows])
            count -= rows
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
