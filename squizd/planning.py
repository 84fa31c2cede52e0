"""A plan for a checkpoint: what every encoding of every tensor costs in bits and, by measurement, in answers.

    loss(tensor, encoding) = divergence when it alone is rounded min-max (measured on the whole model)
                             × weighted squared error of the encoding as it will be fitted / that of min-max
                             × with gptq: the share of the error that feedback leaves

Experts of one projection share its loss by what each one's error does to the layer's output, by measured gates, and may
have two encodings that are neighbours: the wider one goes where it takes away most. Routers keep 8 bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from .allocation import Option, Plan, Unit, allocate
from .architecture import build
from .checkpoint import Checkpoint
from .container import frames
from .container.layout import Encoding
from .errors import RecipeError
from .knowledge import Statistics
from .quantizers import Quantized, quantize
from .recipe import affine, choose
from .routed import PRIOR_TOKENS
from .scratch import Folder
from .sensitivity import divergences
from .weights import read as read_weights

Progress = Callable[[int, int], None]
Floats = npt.NDArray[np.float64]
SAMPLE = 1 << 15  # weights per tensor on which encodings are compared, and of each expert an eighth of it,
ROWS = 8  # or so many rows
STEPS = 16  # parts of a layer's experts of which some may have the wider of two encodings
EXPERTS = tuple(affine(bits, group) for bits in (2, 3, 4, 5, 6) for group in (128, 64, 32))
OTHERS = tuple(affine(bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (128, 64, 32))
ROUTERS = (affine(8, 64),)
UNKNOWN = (affine(6, 64),)  # what cannot be measured: neither in a layer nor embedding or head


@dataclass(frozen=True)
class Candidate:
    """A tensor that can be quantized: name, role, float type, its whole shape (experts first), how many share it."""

    name: str
    role: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def path(self) -> str:
        """The name without ".weight"."""
        return self.name.removesuffix(".weight")

    @property
    def reference(self) -> tuple[int, int]:
        """Bits and group size with which its divergence is measured."""
        group = next(g for g in (64, 32) if self.shape[-1] % g == 0)
        return (3 if self.role == "expert" else 4), group

    def encodings(self, measured: bool) -> list[Encoding]:
        """All that may be chosen, without doubles."""
        specs = {"expert": EXPERTS, "router": ROUTERS}.get(self.role, OTHERS) if measured else UNKNOWN
        if self.role == "router":
            specs = ROUTERS
        found = [choose(spec, self.dtype, self.shape) for spec in specs]
        return list(dict.fromkeys(e for e in found if e is not None))


def bits_of(encoding: Encoding, shape: tuple[int, ...]) -> int:
    """Stored bits of a tensor, scales and biases included."""
    return 8 * sum(encoding.part_sizes(shape))


def fitted(units: Sequence[Unit], fixed_bits: int, parameters: int, bits: int) -> Plan:
    """The plan of least expected loss that stores at most `bits`; RecipeError if that is out of reach.

    `fixed_bits`: what is stored beside the units; `parameters`: of all weights.
    """
    return as_plan(units, allocate(units, bits - fixed_bits), fixed_bits, parameters)


def as_plan(units: Sequence[Unit], chosen: Sequence[Option], fixed_bits: int, parameters: int) -> Plan:
    """Options as a plan."""
    total = fixed_bits + sum(o.bits for o in chosen)
    pairs = list(zip(units, chosen, strict=True))
    return Plan(
        total / parameters, {u.name: o.spec for u, o in pairs}, {u.name: o.loss for u, o in pairs},
        {u.name: {o.other: list(o.experts)} for u, o in pairs if o.experts},
    )  # fmt: skip


def measure(
    checkpoint: Checkpoint, candidates: Sequence[Candidate], *, method: str, statistics: Statistics,
    windows: Sequence[Sequence[int]], zstd: bool = False, progress: Progress | None = None, folder: Folder = None,
) -> list[Unit]:  # fmt: skip
    """Costs and expected losses of every option of every candidate; with `zstd` as records take them.

    Intermediate results lie in `folder`.
    """
    found = divergences(checkpoint, windows, {c.path: c.reference for c in candidates}, progress, folder)
    weights = read_weights(checkpoint, build(checkpoint.config, str(checkpoint.folder)))
    units = []
    for c in candidates:
        options = c.encodings(c.path in found)
        if not options:
            raise RecipeError(f"{c.name}: its rows fit no group")
        if len(options) == 1:
            weights.pop(c.name, None)
            losses, shares = np.zeros((1, 1)), [1.0]
        else:
            losses, shares = _losses(c, weights.pop(c.name), options, found[c.path], statistics, method, zstd)
        bits = [bits_of(e, c.shape) for e in options]
        if zstd:
            bits = [math.ceil(b * min(1.0, share)) for b, share in zip(bits, shares, strict=True)]
        units.append(
            Unit(c.name, math.prod(c.shape), (*_whole(options, bits, losses), *divided(options, bits, losses)),
                 c.shape[0] if c.role == "expert" else 0)
        )  # fmt: skip
        mx.clear_cache()
    return units


def _spec(encoding: Encoding) -> str:
    return f"{encoding.bits}g{encoding.group_size}"


def _whole(options: Sequence[Encoding], bits: Sequence[int], losses: Floats) -> Iterator[Option]:
    """One encoding for all."""
    yield from map(Option, map(_spec, options), bits, losses.sum(axis=1).tolist())


def divided(options: Sequence[Encoding], bits: Sequence[int], losses: Floats) -> Iterator[Option]:
    """Two encodings of one group size, the wider one for the experts that gain most by it; losses [options, experts].

    They are neighbours, for in memory every expert takes the room of the widest.
    """
    count = losses.shape[1]
    for low, encoding in enumerate(options):
        wider = [e.bits for e in options if e.group_size == encoding.group_size and e.bits > encoding.bits]
        if count == 1 or not wider:
            continue
        high = options.index(replace(encoding, bits=min(wider)))
        gain = losses[low] - losses[high]
        order = np.argsort(-gain, kind="stable")
        for step in range(1, STEPS):
            some = order[: count * step // STEPS]
            if len(some):
                cost = bits[low] + (bits[high] - bits[low]) * len(some) // count
                loss = float(losses[low].sum() - gain[some].sum())
                yield Option(_spec(encoding), cost, loss, _spec(options[high]), tuple(sorted(some.tolist())))


def _losses(
    c: Candidate, w: mx.array, options: Sequence[Encoding], divergence: float, statistics: Statistics, method: str,
    zstd: bool,
) -> tuple[Floats, list[float]]:  # fmt: skip
    """Expected divergences [options, experts] or [options, 1], and by option what zstd makes of a stored byte."""
    importance = statistics.moments.get(c.path)
    weight = None if importance is None else mx.array(importance)
    heard = _heard(c, statistics)
    w, weight = _sample(w, weight)
    bits, group = c.reference
    reference = Encoding("affine", c.dtype, bits, group)
    exact = max(float(np.sum(heard * _errors(w, reference, quantize(w, reference, "minmax"), weight))), 1e-30)
    left = statistics.feedback.get(c.path, 1.0) if method == "gptq" else 1.0
    losses, shares = [], []
    for encoding in options:
        parts = quantize(w, encoding, "mse", weight, zstd)
        losses.append(divergence * left * heard * _errors(w, encoding, parts, weight) / exact)
        shares.append(_stored_share(parts, c.shape[-2]))
    return np.stack(losses), shares


def _heard(c: Candidate, statistics: Statistics) -> Floats:
    """Sums of gate² of each expert, [experts], mixed with the layer's; [1] for other tensors."""
    squares = statistics.squares.get(c.path.rpartition(".")[0])
    if squares is None or c.role != "expert":
        return np.ones(1)
    tokens = statistics.tokens[c.path.rpartition(".")[0]]
    heard: Floats = squares + PRIOR_TOKENS * squares.sum() / max(1, tokens.sum())
    return heard


def _stored_share(parts: Quantized, rows: int) -> float:
    """What zstd leaves of a byte of records that have `rows` rows of such a tensor each.

    Files turned out 0.3 to 0.5 % below what this promises.
    """
    stored = [p.view(mx.uint16) if p.dtype == mx.bfloat16 else p for p in parts if p is not None]
    flat, raw, packed = [np.array(p).reshape(-1, p.shape[-1]) for p in stored], 0, 0
    for start in range(0, len(flat[0]), rows):
        pieces = [p[start : start + rows].tobytes() for p in flat]
        sizes = [len(piece) for piece in pieces]
        packed += len(frames.compress(b"".join(pieces), parts=np.cumsum([0, *sizes[:-1]]).tolist()))
        raw += sum(sizes)
    return packed / raw


def _sample(w: mx.array, weight: mx.array | None) -> tuple[mx.array, mx.array | None]:
    """Some rows, evenly spread; of every expert."""
    rows = max(1, SAMPLE // w.shape[-1]) if w.ndim == 2 else max(ROWS, SAMPLE // 8 // w.shape[-1])
    w = mx.contiguous(w[..., :: max(1, w.shape[-2] // rows), :])
    mx.eval(w)
    return w, weight


def _errors(w: mx.array, encoding: Encoding, parts: Quantized, weight: mx.array | None) -> Floats:
    """Weighted squared error of each expert, [experts], or of the tensor, [1]."""
    codes, scales, biases = parts
    assert scales is not None
    assert biases is not None
    decoded = mx.dequantize(codes, scales.astype(mx.float32), biases.astype(mx.float32),
                            group_size=encoding.group_size, bits=encoding.bits)  # fmt: skip
    squares = mx.square(decoded - w.astype(mx.float32))
    if weight is not None:
        squares = squares * (weight[:, None, :] if weight.ndim == 2 else weight)
    return np.array(mx.sum(squares, axis=(-2, -1))).astype(np.float64).reshape(-1)
