"""What a model's weights see when it reads text: the statistics that importance and GPTQ are made of.

Per linear layer the mean square of every input channel; per expert the same, weighted by the square of the
gate with which the router takes its output, for an expert's error counts in the layer's output as often and as
much as it is heard. (Second moments of inputs: the "importance matrix" of llama.cpp; Frantar et al. 2022,
arXiv:2210.17323, use all products of inputs, as `ExpertInputs.hessians` gives them.)

Gates are found without knowing any architecture: the router's block is linear in what its experts put out, so
unit vectors in place of their outputs bring the gates to light.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
from mlx_lm.models.switch_layers import SwitchGLU

from . import corpus as corpora
from .architecture import expert_modules
from .backend import on_cpu, on_cuda
from .checkpoint import Checkpoint
from .corpus import Corpus
from .errors import OutputError, SourceError, TextError
from .quantizers import cuda
from .scratch import Folder, Scratch
from .single import alone
from .walk import Walk

Floats = npt.NDArray[np.float32]
Progress = Callable[[int, int], None]

# Tokens of the whole layer's statistics that every expert's are mixed with: an expert that was never routed
# has the layer's, one with thousands of tokens its own. On unseen text 128 to 512 leave 0.1 to 0.2 dB less error
# than 32 does.
PRIOR_TOKENS = 512.0
HEAD_WINDOWS = 64  # on which the head's inputs are looked at
PRODUCT_ROWS = 1 << 15  # tokens of which products of inputs are summed for tensors in constant use
PRODUCT_BYTES = 1 << 28  # of all such products: tensors that come later in the model do without


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
        one, indices = alone(module or self.module, expert), mx.zeros((x.shape[0], 1), mx.uint32)
        x = x[:, None, None, :]
        if isinstance(self.module, SwitchGLU):
            up, gate = (one[name](x, indices, sorted_indices=True) for name in ("up_proj", "gate_proj"))
            out = one.activation(up, gate)
        else:
            out = one.activation(one["fc1"](x, indices, sorted_indices=True))
        flat: mx.array = out.reshape(x.shape[0], -1)
        return flat

    def of(self, expert: int, projection: str) -> tuple[mx.array, mx.array]:
        """Inputs [tokens, in] of one expert's projection, and gates [tokens]."""
        tokens, gates = self.rows(expert)
        x = self.x.rows(tokens)
        if projection == self.last and len(tokens):
            x = self.hidden(x, expert)
        elif projection == self.last:
            x = self.hidden(mx.zeros((1, x.shape[-1])), expert)[:0]
        return x, mx.array(gates)

    def hessians(self, projection: str, experts: Sequence[int]) -> mx.array:
        """Sum over tokens of gate² x xᵀ by expert, [experts, in, in], float32, evaluated."""
        found = []
        for expert in experts:
            x, gates = self.of(expert, projection)
            found.append(_products(x * gates[:, None]))
        stacked = mx.stack(found)
        mx.eval(stacked)
        return stacked

    def disturbed(self, experts: Sequence[int], module: nn.Module) -> tuple[mx.array, mx.array]:
        """Of the last projection, whose input y is x where `module` takes the place of the experts' own.

        Sums over tokens of gate² x xᵀ and gate² (y - x) xᵀ by expert, [experts, in, in] each, float32, evaluated.
        """
        found, pulls = [], []
        for expert in experts:
            tokens, gates = self.rows(expert)
            inputs, weight = self.x.rows(tokens), mx.array(gates)[:, None]
            if not len(tokens):
                inputs, weight = mx.zeros((1, inputs.shape[-1])), mx.zeros((1, 1))
            exact, x = (self.hidden(inputs, expert, m) * weight for m in (None, module))
            found.append(_products(x))
            pulls.append(_products(exact - x, x))
        hessians, pull = mx.stack(found), mx.stack(pulls)
        mx.eval(hessians, pull)
        return hessians, pull

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
                total, start = total + _products(x * mx.array(weights[start:end])), end
                mx.eval(total)
        return total / max(float(squares.sum()), 1e-30)


def _products(x: mx.array, y: mx.array | None = None) -> mx.array:
    """xᵀ y, or xᵀ x, for x and y [tokens, in]. NumPy's BLAS is ten times as fast as MLX's on Linux CPUs."""
    if not on_cpu():
        product = x.T @ (x if y is None else y)
        mx.eval(product)
        return product
    rows = np.array(x, copy=False)
    return mx.array(rows.T @ (rows if y is None else np.array(y, copy=False)))


@dataclass
class Statistics:
    """Means by parameter path without ".weight", and what they come from.

    moments: mean square input by channel, [in], or [experts, in] where weighted by gate² and mixed with the layer's.
    tokens, mass: by expert module, [experts]: how often each was chosen, and the sum of its gates.
    feedback: by expert projection, the share of the output error that GPTQ is expected to leave.
    products: mean of x xᵀ, [in, in], of inputs of layers in constant use, by path of the first that has these inputs.
    shared: that path by path of the others that have the same inputs.
    """

    source: dict[str, Any]
    moments: dict[str, Floats] = field(default_factory=dict)
    tokens: dict[str, npt.NDArray[np.int64]] = field(default_factory=dict)
    mass: dict[str, npt.NDArray[np.float64]] = field(default_factory=dict)
    feedback: dict[str, float] = field(default_factory=dict)
    products: dict[str, Floats] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)

    def hessian(self, path: str) -> Floats | None:
        """Mean of x xᵀ of a layer in constant use, if it is known."""
        return self.products.get(self.shared.get(path, path))

    def digest(self) -> str:
        """SHA-256 over everything."""
        found = hashlib.sha256(json.dumps(self.source, sort_keys=True).encode())
        kinds: tuple[dict[str, Any], ...] = (self.moments, self.tokens, self.mass, self.products)
        for kind in kinds:
            for path, array in sorted(kind.items()):
                found.update(path.encode() + b"\0" + array.tobytes())
        found.update(json.dumps([self.feedback, self.shared], sort_keys=True).encode())
        return found.hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write them as .npz; OutputError if that fails."""
        facts = json.dumps({"source": self.source, "feedback": self.feedback, "shared": self.shared})
        arrays: dict[str, Any] = {"facts": np.frombuffer(facts.encode(), np.uint8)}
        for kind in ("moments", "tokens", "mass", "products"):
            arrays |= {f"{kind} {name}": array for name, array in getattr(self, kind).items()}
        partial = Path(f"{path}.partial")
        try:
            with partial.open("wb") as f:
                np.savez(f, **arrays)
            partial.rename(path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise OutputError(f"{path}: {error.strerror or error}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Statistics:
        """Read what `save` wrote; SourceError if it is anything else."""
        try:
            with open(path, "rb") as f, np.load(f) as z:  # a file that NumPy opens stays open if it is no archive
                facts = json.loads(z["facts"].tobytes())
                found = cls(facts["source"], feedback=facts["feedback"], shared=facts["shared"])
                for name in z.files:
                    kind, _, key = name.partition(" ")
                    if key:
                        getattr(found, kind)[key] = z[name]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, BadZipFile) as error:
            raise SourceError(f"{path} holds no calibration statistics: {error}") from error
        return found


def windows_of(corpus: Corpus, checkpoint: Checkpoint, context: int, count: int, seed: int) -> list[list[int]]:
    """Windows of calibration text as token ids; TextError if the text is too short, SourceError without a tokenizer."""
    from mlx_lm.utils import load_tokenizer

    try:
        tokenizer = load_tokenizer(checkpoint.folder, {"trust_remote_code": False})
    except Exception as error:  # whatever transformers makes of the files
        raise SourceError(f"{checkpoint.folder}: cannot build its tokenizer: {error}") from error
    windows = corpora.sampled_windows(corpus, lambda text: tokenizer.encode(text, verbose=False), context, count, seed)
    if any(not all(isinstance(i, int) for i in w) for w in windows):
        raise TextError(f"{corpus.name}: the tokenizer gave no token ids")
    return windows


class _Inputs:
    """Visitor: per linear layer the sum of squares of its inputs, and of their products where there is room."""

    def __init__(self) -> None:
        self.sums: dict[str, mx.array] = {}
        self.rows: dict[str, int] = {}
        self.products: dict[str, Floats] = {}
        self.product_rows: dict[str, int] = {}
        self.shared: dict[str, str] = {}
        self._room = PRODUCT_BYTES
        self._last: tuple[mx.array, str] | None = None

    def enter(self, path: str, layer: nn.Module) -> None:
        for name, module in list(layer.named_modules()):
            full = ".".join(filter(None, (path, name)))
            if isinstance(module, nn.Linear | nn.Embedding):
                _listen(module, partial(self._add, full, isinstance(module, nn.Linear)))

    def leave(self, path: str, layer: nn.Module) -> None:
        self._last = None

    def _add(self, path: str, linear: bool, x: mx.array) -> None:
        flat = x.reshape(-1, x.shape[-1]).astype(mx.float32)
        total = mx.sum(flat * flat, axis=0)
        self.sums[path] = total + self.sums[path] if path in self.sums else total
        self.rows[path] = self.rows.get(path, 0) + flat.shape[0]
        mx.eval(self.sums[path])
        if not linear:  # an embedding that is the head as well: what its rows are as inputs counts more
            return
        if self._last is not None and self._last[0] is x:  # query, key and value
            self.shared[path] = self._last[1]
            return
        self._last = (x, path)
        if path not in self.products and self._room >= 4 * flat.shape[-1] ** 2:
            self.products[path] = np.zeros((flat.shape[-1], flat.shape[-1]), np.float32)
            self.product_rows[path] = 0
            self._room -= self.products[path].nbytes
        if path in self.products and self.product_rows[path] < PRODUCT_ROWS:
            self.products[path] += np.array(_products(flat), copy=False)
            self.product_rows[path] += flat.shape[0]

    def summarize(self, found: Statistics) -> None:
        """Means, into `found`."""
        found.moments |= {path: np.array(total / self.rows[path]) for path, total in self.sums.items()}
        found.products = {p: total / np.float32(self.product_rows[p]) for p, total in self.products.items()}
        found.shared = self.shared
        for path in [*found.products, *found.shared]:
            hessian = found.hessian(path)
            if hessian is not None:
                found.feedback[path] = _left_by_feedback(hessian[None])


_listeners: dict[type, type] = {}


def _listen(module: nn.Module, listener: Callable[[mx.array], None]) -> None:
    """Let `listener` have the inputs of a linear layer, or of an embedding that is used as one.

    The module changes its class to one that differs in this only, so whoever asks for its weights finds them.
    """
    kind = type(module)
    if kind not in _listeners:

        class Listening(kind):  # type: ignore[valid-type,misc]
            def __call__(self, x: mx.array, *args: Any) -> Any:
                if not isinstance(self, nn.Embedding) and not _muted:
                    self._listener[0](x)
                return super().__call__(x, *args)

            def as_linear(self, x: mx.array) -> Any:
                self._listener[0](x)
                return super().as_linear(x)

        _listeners[kind] = Listening
    module._listener = (listener,)
    module.__class__ = _listeners[kind]


_muted: list[bool] = []  # while gates are brought to light: what is computed then is no input of the model


class _Experts:
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
    gates: list[Floats] = field(default_factory=list)


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
            _muted.append(True)
            lit = []
            for stand_in in (True, False):
                mode["stand-in"] = stand_in
                out = super().__call__(*args, **kwargs)
                lit.append(out[..., : mode["seen"][1].shape[-1]])
                mx.eval(lit)
            mode["stand-in"] = None
            _muted.pop()
            out = super().__call__(*args, **kwargs)
            x, chosen = mode["seen"]
            mode["seen"] = None
            mx.eval(out)
            kept.x.append(x.reshape(-1, x.shape[-1]))
            kept.chosen.append(np.array(chosen).reshape(-1, chosen.shape[-1]))
            kept.gates.append(np.array(lit[0] - lit[1]).reshape(-1, chosen.shape[-1]))
            return out

    experts.__class__, block.__class__ = Experts, Block


def expert_inputs(
    checkpoint: Checkpoint, windows: Sequence[Sequence[int]], folder: Folder = None
) -> Iterator[ExpertInputs]:
    """What reaches every expert module, in the order of the model's layers; one layer in memory at a time."""
    experts = _Experts(folder)
    for _ in Walk(checkpoint, windows, folder).layers([experts]):
        while experts.found:
            yield experts.found.pop(0)


def calibrate(
    checkpoint: Checkpoint, corpus: Corpus, *, context: int = 512, count: int = 256, seed: int = 0,
    progress: Progress | None = None, folder: Folder = None,
) -> Statistics:  # fmt: skip
    """Statistics of `count` windows of `context` tokens; TextError if the corpus is shorter than one window.

    Hidden states lie in `folder` meanwhile.
    """
    windows = windows_of(corpus, checkpoint, context, count, seed)
    source = {
        "name": corpus.name, "sha256": corpus.sha256, "size": corpus.size, "context": context,
        "windows": len(windows), "seed": seed,
    }  # fmt: skip
    found = Statistics(source)
    walk = Walk(checkpoint, windows, folder)
    inputs, experts = _Inputs(), _Experts(folder)
    for number, _ in enumerate(walk.layers([inputs, experts])):
        while experts.found:
            _summarize(found, experts.found.pop(0))
        if progress:
            progress(number + 1, len(walk.model.layers) + 1)
    walk.finish([inputs], HEAD_WINDOWS)
    inputs.summarize(found)
    return found


def _summarize(found: Statistics, module: ExpertInputs) -> None:
    """Add one expert module's moments, routing counts and gate mass."""
    names = [name for name in module.module if isinstance(module.module[name], nn.Module)]
    projections = [name for name in names if "weight" in module.module[name]]
    counts = np.zeros(module.count, np.int64)
    mass, squares = np.zeros(module.count), np.zeros(module.count)
    sums: dict[str, list[npt.NDArray[np.float64]]] = {p: [] for p in projections}
    for expert in range(module.count):
        _, gates = module.rows(expert)
        counts[expert], mass[expert] = len(gates), gates.sum(dtype=np.float64)
        squares[expert] = np.square(gates, dtype=np.float64).sum()
        done: dict[bool, npt.NDArray[np.float64]] = {}
        for projection in projections:
            last = projection == module.last
            if last not in done:
                x, g = module.of(expert, projection)
                weighted = x * g[:, None]
                done[last] = np.array(mx.sum(weighted * weighted, axis=0)).astype(np.float64)
            sums[projection].append(done[last])
    prior = PRIOR_TOKENS * module.mean_square_gate()
    found.tokens[module.path], found.mass[module.path] = counts, mass
    for projection, each in sums.items():
        total = np.stack(each)
        layer = total.sum(axis=0) / max(squares.sum(), 1e-30)
        mixed = (total + prior * layer) / (squares[:, None] + prior)
        found.moments[f"{module.path}.{projection}"] = mixed.astype(np.float32)
    busiest = np.argsort(-counts, kind="stable")[:4].tolist()
    shares = {last: _left_by_feedback(module.hessians(module.last if last else module.first_name, busiest))
              for last in (False, True)}  # fmt: skip
    for projection in projections:
        found.feedback[f"{module.path}.{projection}"] = shares[projection == module.last]


def _left_by_feedback(hessians: mx.array | Floats) -> float:
    """With H = U D Uᵀ, the sum of D over that of H's diagonal: the share of output error that feedback leaves.

    On unseen text a little less is left of what a weighted fit leaves: 0.32 and 0.75 where this says 0.38 and 0.89.
    """
    h = np.array(hessians, copy=False)
    diagonal = np.einsum("eii->ei", h).astype(np.float64)
    left = 0.0
    if on_cuda() and h.shape[-1] % cuda.BLOCK == 0:
        damping = (0.01 * float(diagonal.mean()) + 1e-30) * mx.eye(h.shape[-1])
        left = float(cuda.factors(mx.array(h) + damping)[1].sum())
        h = h[:0]
    for one in h:
        damped = one[::-1, ::-1].astype(np.float64)
        damped[np.diag_indices(len(damped))] += 0.01 * diagonal.mean() + 1e-30
        left += float((np.diagonal(np.linalg.cholesky(damped)) ** 2).sum())
    return float(min(1.0, left / max(1.01 * diagonal.sum(), 1e-30)))
