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
from .checkpoint import Checkpoint
from .corpus import Corpus
from .errors import OutputError, SourceError, TextError
from .walk import Walk

Floats = npt.NDArray[np.float32]
Progress = Callable[[int, int], None]

# Tokens of the whole layer's statistics that every expert's are mixed with: an expert that was never routed
# has the layer's, one with thousands of tokens its own. On unseen text 128 to 512 leave 0.1 to 0.2 dB less error
# than 32 does.
PRIOR_TOKENS = 256.0
HEAD_WINDOWS = 16  # on which the head's inputs are looked at: logits of more would take longer than the layers


@dataclass
class ExpertInputs:
    """What reached the experts of one module: x [tokens, in] and, by token, the chosen experts and their gates.

    All float32, `chosen` int32 [tokens, k], `gates` [tokens, k].
    """

    path: str
    module: nn.Module
    x: Floats
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

    def hidden(self, x: mx.array, expert: int) -> mx.array:
        """What the last projection of an expert gets for inputs x [tokens, in]."""
        indices = mx.full((x.shape[0], 1), expert, mx.uint32)
        x = x[:, None, None, :]
        if isinstance(self.module, SwitchGLU):
            up, gate = (self.module[name](x, indices, sorted_indices=True) for name in ("up_proj", "gate_proj"))
            out = self.module.activation(up, gate)
        else:
            out = self.module.activation(self.module["fc1"](x, indices, sorted_indices=True))
        flat: mx.array = out.reshape(x.shape[0], -1)
        return flat

    def of(self, expert: int, projection: str) -> tuple[mx.array, mx.array]:
        """Inputs [tokens, in] of one expert's projection, and gates [tokens]."""
        tokens, gates = self.rows(expert)
        x = mx.array(self.x[tokens])
        if projection == self.last and len(tokens):
            x = self.hidden(x, expert)
        elif projection == self.last:
            x = mx.zeros((0, self.module[projection]["weight"].shape[-1]))
        return x, mx.array(gates)

    def hessians(self, projection: str, experts: Sequence[int]) -> Floats:
        """Sum over tokens of gate² x xᵀ by expert, [experts, in, in], float32."""
        width = self.module[projection]["weight"].shape[-1]
        found = np.empty((len(experts), width, width), np.float32)
        for i, expert in enumerate(experts):
            x, gates = self.of(expert, projection)
            weighted = np.array(x * gates[:, None])
            np.matmul(weighted.T, weighted, out=found[i])  # ten times as fast as MLX on Linux CPUs
        return found

    def mixed(self, hessians: Floats, layer: Floats) -> Floats:
        """`hessians` with `PRIOR_TOKENS` tokens of average gate of the layer's added."""
        return hessians + np.float32(PRIOR_TOKENS * self.mean_square_gate()) * layer

    def mean_square_gate(self) -> float:
        """Average gate² over tokens and their experts."""
        return float(np.mean(self.gates.astype(np.float64) ** 2))

    def layer_hessian(self, projection: str) -> Floats:
        """The sum of all experts' `hessians` per unit of gate², [in, in]."""
        mass = float(np.sum(self.gates.astype(np.float64) ** 2))
        total = self.hessians(projection, [0])[0]
        for expert in range(1, self.count):
            total += self.hessians(projection, [expert])[0]
        mean: Floats = total / np.float32(max(mass, 1e-30))
        return mean


@dataclass
class Statistics:
    """Means by parameter path without ".weight", and what they come from.

    moments: mean square input by channel, [in], or [experts, in] where weighted by gate² and mixed with the layer's.
    tokens, mass: by expert module, [experts]: how often each was chosen, and the sum of its gates.
    feedback: by expert projection, the share of the output error that GPTQ is expected to leave.
    """

    source: dict[str, Any]
    moments: dict[str, Floats] = field(default_factory=dict)
    tokens: dict[str, npt.NDArray[np.int64]] = field(default_factory=dict)
    mass: dict[str, npt.NDArray[np.float64]] = field(default_factory=dict)
    feedback: dict[str, float] = field(default_factory=dict)

    def digest(self) -> str:
        """SHA-256 over everything."""
        found = hashlib.sha256(json.dumps(self.source, sort_keys=True).encode())
        kinds: tuple[dict[str, Any], ...] = (self.moments, self.tokens, self.mass)
        for kind in kinds:
            for path, array in sorted(kind.items()):
                found.update(path.encode() + b"\0" + array.tobytes())
        found.update(json.dumps(self.feedback, sort_keys=True).encode())
        return found.hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write them as .npz; OutputError if that fails."""
        facts = json.dumps({"source": self.source, "feedback": self.feedback})
        arrays: dict[str, Any] = {"facts": np.frombuffer(facts.encode(), np.uint8)}
        for kind in ("moments", "tokens", "mass"):
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
                found = cls(facts["source"], feedback=facts["feedback"])
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
    """Visitor: per linear layer the sum of squares of its inputs."""

    def __init__(self) -> None:
        self.sums: dict[str, mx.array] = {}
        self.rows: dict[str, int] = {}

    def enter(self, path: str, layer: nn.Module) -> None:
        for name, module in list(layer.named_modules()):
            full = ".".join(filter(None, (path, name)))
            if isinstance(module, nn.Linear | nn.Embedding):
                _listen(module, partial(self._add, full))

    def leave(self, path: str, layer: nn.Module) -> None:
        pass

    def _add(self, path: str, x: mx.array) -> None:
        flat = x.reshape(-1, x.shape[-1]).astype(mx.float32)
        total = mx.sum(flat * flat, axis=0)
        self.sums[path] = total + self.sums[path] if path in self.sums else total
        self.rows[path] = self.rows.get(path, 0) + flat.shape[0]
        mx.eval(self.sums[path])


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

    def __init__(self) -> None:
        self.found: list[ExpertInputs] = []
        self._kept: dict[str, list[tuple[npt.NDArray[Any], ...]]] = {}

    def enter(self, path: str, layer: nn.Module) -> None:
        self.found, self._kept = [], {}
        owners: dict[str, nn.Module] = dict(layer.named_modules())
        for name, module in expert_modules(layer).items():
            kept = self._kept.setdefault(name, [])
            _watch(owners[name.rpartition(".")[0]], module, kept)

    def leave(self, path: str, layer: nn.Module) -> None:
        for name, module in expert_modules(layer).items():
            kept = self._kept.pop(name)
            if not kept:
                raise SourceError(f"{path}.{name} was never called: calibration cannot walk this architecture")
            x, chosen, gates = (np.concatenate([part[i] for part in kept]) for i in range(3))
            kept.clear()  # the classes that `_watch` made hold it until the next garbage collection
            self.found.append(ExpertInputs(f"{path}.{name}", module, x, chosen.astype(np.int32), gates))


def _watch(block: nn.Module, experts: nn.Module, kept: list[tuple[npt.NDArray[Any], ...]]) -> None:
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
                lit.append(super().__call__(*args, **kwargs))
            mode["stand-in"] = None
            _muted.pop()
            out = super().__call__(*args, **kwargs)
            x, chosen = mode["seen"]
            gates = (lit[0] - lit[1])[..., : chosen.shape[-1]].reshape(-1, chosen.shape[-1])
            parts = (x.reshape(-1, x.shape[-1]), chosen.reshape(-1, chosen.shape[-1]), gates)
            mx.eval(out, *parts)
            kept.append(tuple(np.array(part) for part in parts))  # copies: slices would keep what they are cut from
            mode["seen"] = None
            return out

    experts.__class__, block.__class__ = Experts, Block


def expert_inputs(checkpoint: Checkpoint, windows: Sequence[Sequence[int]]) -> Iterator[ExpertInputs]:
    """What reaches every expert module, in the order of the model's layers; one layer in memory at a time."""
    experts = _Experts()
    for _ in Walk(checkpoint, windows).layers([experts]):
        yield from experts.found
        experts.found = []


def calibrate(
    checkpoint: Checkpoint, corpus: Corpus, *, context: int = 512, count: int = 256, seed: int = 0,
    progress: Progress | None = None,
) -> Statistics:  # fmt: skip
    """Statistics of `count` windows of `context` tokens; TextError if the corpus is shorter than one window."""
    windows = windows_of(corpus, checkpoint, context, count, seed)
    source = {
        "name": corpus.name, "sha256": corpus.sha256, "size": corpus.size, "context": context,
        "windows": len(windows), "seed": seed,
    }  # fmt: skip
    found = Statistics(source)
    walk = Walk(checkpoint, windows)
    inputs, experts = _Inputs(), _Experts()
    for number, _ in enumerate(walk.layers([inputs, experts])):
        for module in experts.found:
            _summarize(found, module)
        experts.found = []
        if progress:
            progress(number + 1, len(walk.model.layers) + 1)
    walk.finish([inputs], HEAD_WINDOWS)
    for path, total in inputs.sums.items():
        found.moments[path] = np.array(total / inputs.rows[path])
    return found


def _summarize(found: Statistics, module: ExpertInputs) -> None:
    """Add one expert module's moments, routing counts and gate mass."""
    names = [name for name in module.module if isinstance(module.module[name], nn.Module)]
    projections = [name for name in names if "weight" in module.module[name]]
    counts = np.zeros(module.count, np.int64)
    mass, squares = np.zeros(module.count), np.zeros(module.count)
    sums = {p: np.zeros((module.count, module.module[p]["weight"].shape[-1])) for p in projections}
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
            sums[projection][expert] = done[last]
    prior = PRIOR_TOKENS * module.mean_square_gate()
    found.tokens[module.path], found.mass[module.path] = counts, mass
    for projection, total in sums.items():
        layer = total.sum(axis=0) / max(squares.sum(), 1e-30)
        mixed = (total + prior * layer) / (squares[:, None] + prior)
        found.moments[f"{module.path}.{projection}"] = mixed.astype(np.float32)
    busiest = np.argsort(-counts, kind="stable")[:4].tolist()
    shares = {last: _left_by_feedback(module, last, busiest) for last in (False, True)}
    for projection in projections:
        found.feedback[f"{module.path}.{projection}"] = shares[projection == module.last]


def _left_by_feedback(module: ExpertInputs, last: bool, experts: Sequence[int]) -> float:
    """With H = U D Uᵀ, the sum of D over that of H's diagonal: the share of output error that feedback leaves."""
    projection = module.last if last else module.first_name
    h = module.hessians(projection, experts).astype(np.float64)
    diagonal = np.einsum("eii->ei", h)
    h += (0.01 * diagonal.mean() + 1e-30) * np.eye(h.shape[-1])
    factors = np.einsum("eii->ei", np.linalg.cholesky(h[:, ::-1, ::-1])) ** 2
    return float(min(1.0, factors.sum() / max(diagonal.sum(), 1e-30)))
