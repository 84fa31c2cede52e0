"""How each tensor of a checkpoint is quantized: which method, and with what knowledge of its inputs.

Between the pipeline, which knows tensors and files, and quantizers, which know numbers.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx

from . import corpus as corpora
from .backend import kind_of_device, on_cuda
from .checkpoint import Checkpoint
from .container.layout import Encoding
from .corpus import Corpus
from .errors import RecipeError, SourceError
from .knowledge import Statistics
from .quantizers import Quantized, quantize, shifted
from .single import Stored, with_stored
from .workplace import Workplace

if TYPE_CHECKING:
    from .routed import ExpertInputs

Progress = Callable[[int, int], None]
BATCH_BYTES = 1 << 24  # of one batch of experts' Hessians in float32; GPTQ holds about ten times as much
KEPT_BYTES = 1 << 27  # of all experts' Hessians of one module, if they are kept for the next projection
BATCH_BYTES_CUDA, KEPT_BYTES_CUDA = 1 << 28, 1 << 30  # in the GPU's own memory, where small batches take long


@dataclass(frozen=True)
class Calibration:
    """Text to calibrate with and how much of it: `windows` of `context` tokens, drawn by `seed`."""

    text: str | os.PathLike[str]
    windows: int = 256
    context: int = 512
    seed: int = 0


class Guide:
    """Quantizes tensors by path; for gptq it walks through the model as expert modules are approached in order."""

    def __init__(
        self,
        method: str,
        statistics: Statistics | None = None,
        windows: list[list[int]] | None = None,
        inputs: Iterator[ExpertInputs] | None = None,
        short: bool = False,
    ) -> None:
        self.method, self.statistics, self.windows, self._short = method, statistics, windows, short
        self._inputs = inputs
        self._here: ExpertInputs | None = None
        self._kept: tuple[tuple[str, bool], list[mx.array], list[mx.array]] | None = None
        self._stored: dict[str, Stored] = {}  # projections of this expert module so far
        known = statistics.digest() if statistics else ""
        self._digest = hashlib.sha256(repr((known, windows, kind_of_device())).encode()).hexdigest()

    def digest(self) -> str:
        """Changes with everything that quantization depends on, weights and method apart.

        That is also where it is done: fits on GPUs are as good as on CPUs, not the same bits.
        """
        return self._digest

    def approach(self, module: str) -> None:
        """What follows are tensors of this expert module, or of none that comes before it in the model."""
        self._here = self._kept = None
        self._stored = {}
        if self.statistics is not None:
            self.statistics.products.clear()  # of tensors in constant use, which come before all experts
        while self._inputs is not None and (self._here is None or self._here.path != module):
            self._here = next(self._inputs)

    def held(self, path: str) -> mx.array | None:
        """The tensor `path`, as it is stored, if it is in memory here already."""
        module, _, projection = path.rpartition(".")
        if self._here is None or self._here.path != module:
            return None
        found: mx.array = self._here.module[projection]["weight"]
        return found

    def importance(self, path: str) -> mx.array | None:
        """Mean square of the tensor's inputs, [in] or [experts, in]; None if unknown."""
        found = self.statistics.moments.get(path) if self.statistics else None
        return None if found is None else mx.array(found)

    def quantize(self, path: str, w: mx.array, encoding: Encoding, experts: Sequence[int] | None = None) -> Quantized:
        """Quantize the tensor `path` (without ".weight"), or some `experts` of it. Raises as `quantizers.quantize`."""
        module, _, projection = path.rpartition(".")
        if encoding.mode == "affine" and self._here is not None and self._here.path == module:
            return self._with_feedback(projection, w, encoding, experts or range(w.shape[0]), self._here)
        if experts is None:
            return self._alone(path, w, encoding, self.importance(path))
        importance = self.importance(path)
        size = max(1, BATCH_BYTES // (4 * w.shape[-1] * w.shape[-2]))
        parts = []
        for start in range(0, len(experts), size):  # copied, so not all at once
            some = mx.array(list(experts[start : start + size]))
            parts.append(self._alone(path, w[some], encoding, None if importance is None else importance[some]))
        return _joined(parts)

    def _alone(self, path: str, w: mx.array, encoding: Encoding, importance: mx.array | None) -> Quantized:
        """Without feedback from inputs that are here now."""
        # Microscaling formats have nothing to fit: their one way is round to nearest.
        if encoding.mode != "affine" or self.method == "minmax":
            return quantize(w, encoding, "minmax")
        hessian = self.statistics.hessian(path) if self.statistics and self.method == "gptq" else None
        if hessian is None or w.ndim != 2:
            return quantize(w, encoding, "mse", importance, self._short)
        size = max(1, BATCH_BYTES // (4 * w.shape[-1]))
        return _joined([quantize(w[i : i + size], encoding, "gptq", mx.array(hessian), self._short)
                        for i in range(0, w.shape[0], size)])  # fmt: skip

    def _with_feedback(
        self, projection: str, w: mx.array, encoding: Encoding, experts: Sequence[int], inputs: ExpertInputs
    ) -> Quantized:
        """gptq with each expert's Hessian; the last projection also makes up for what rounding the others does.

        It gets its inputs from them as they are stored, and is fitted to put out what it should have.
        """
        layer, kept = self._products(projection, inputs)
        size = max(1, (BATCH_BYTES_CUDA if on_cuda() else BATCH_BYTES) // sum(x.nbytes for x in layer))
        parts = []
        for start in range(0, len(experts), size):
            some = experts[start : start + size]
            numbers = mx.array(list(some))
            own = [x[numbers] for x in kept] or self._sums(projection, inputs, some)
            hessian, *pull = (inputs.mixed(x, whole) for x, whole in zip(own, layer, strict=True))
            part = w[numbers]
            if pull:
                part = shifted(part, hessian, pull[0])
            parts.append(quantize(part, encoding, "gptq", hessian, self._short))
        found = _joined(parts)
        if projection != inputs.last:
            weights = self._stored.setdefault(projection, Stored([], {}))
            weights.place |= {expert: (len(weights.stacks), row) for row, expert in enumerate(experts)}
            weights.stacks.append((found, encoding))
        return found

    def _sums(self, projection: str, inputs: ExpertInputs, experts: Sequence[int]) -> list[mx.array]:
        """Sums over some experts' tokens: the Hessians, and for the last projection what pulls at its weights."""
        if projection == inputs.last and self._stored:
            return list(inputs.disturbed(experts, with_stored(inputs.module, self._stored)))
        return [inputs.hessians(projection, experts)]

    def _products(self, projection: str, inputs: ExpertInputs) -> tuple[list[mx.array], list[mx.array]]:
        """The layer's sums per unit of gate², and all experts' if they are few and small enough to keep (else none).

        Those of a module's input are kept for the next projection.
        """
        key = (inputs.path, projection == inputs.last)
        if self._kept is None or self._kept[0] != key:
            self._kept = None
            width, last = inputs.module[projection]["weight"].shape[-1], projection == inputs.last
            mass = max(inputs.mean_square_gate() * inputs.gates.size, 1e-30)
            bound = (KEPT_BYTES_CUDA if on_cuda() else KEPT_BYTES) // (2 if last else 1)
            if inputs.count * width * width * 4 <= bound:
                all_of_them = self._sums(projection, inputs, range(inputs.count))
                self._kept = (key, [x.sum(axis=0) / mass for x in all_of_them], all_of_them)
            elif last:
                total = [x[0] for x in self._sums(projection, inputs, [0])]
                for expert in range(1, inputs.count):
                    more = self._sums(projection, inputs, [expert])
                    total = [x + y[0] for x, y in zip(total, more, strict=True)]
                    mx.eval(total)
                self._kept = (key, [x / mass for x in total], [])
            else:
                self._kept = (key, [inputs.layer_hessian(projection)], [])
        return self._kept[1], self._kept[2]


def _joined(parts: list[Quantized]) -> Quantized:
    """Parts of a tensor that was quantized in pieces along its first dimension."""
    codes, scales, biases = (mx.concatenate([p for p in part if p is not None]) for part in zip(*parts, strict=True))
    return codes, scales, biases


def prepare(
    checkpoint: Checkpoint,
    method: str,
    calibration: str | os.PathLike[str] | Calibration | None,
    statistics: str | os.PathLike[str] | None,
    progress: Progress | None = None,
    work: Workplace | None = None,
    short: bool = False,
) -> Guide:
    """A guide for `checkpoint`: reads text and statistics, and calibrates if need be.

    With `short` scales and biases get few digits (`quantizers.quantize`) where there is text or statistics.
    `statistics` is read if it is there and belongs to the text, else written; without it they are kept in `work`, for
    the next run with the same text and source. Raises TextError, SourceError, RecipeError for what does not go
    together, OutputError.
    """
    if calibration is not None and not isinstance(calibration, Calibration):
        calibration = Calibration(calibration)
    if method == "gptq" and calibration is None:
        raise RecipeError("gptq needs calibration text", hint="give some with --calibration, or use --quantizer mse")
    if method == "minmax":
        if calibration is not None or statistics is not None:
            raise RecipeError("minmax has no use for calibration", hint="use --quantizer mse or gptq")
        return Guide(method)
    if calibration is None and statistics is None:
        return Guide(method)
    from .calibration import expert_inputs, windows_of  # and all that runs models, which nothing above needs

    text = corpora.read(calibration.text) if calibration else None
    found = _statistics(checkpoint, calibration, text, statistics, progress, work)
    if not (calibration and text):
        return Guide(method, found, short=short)
    windows = windows_of(text, checkpoint, calibration.context, calibration.windows, calibration.seed)
    folder = work.folder if work else None
    inputs = expert_inputs(checkpoint, windows, folder) if method == "gptq" else None
    return Guide(method, found, windows, inputs, short)


def _statistics(
    checkpoint: Checkpoint,
    calibration: Calibration | None,
    text: Corpus | None,
    path: str | os.PathLike[str] | None,
    progress: Progress | None,
    work: Workplace | None,
) -> Statistics:
    from .calibration import calibrate

    if path is not None and (Path(path).exists() or calibration is None):
        found = Statistics.load(path)
        wanted = (text.sha256, calibration.context, calibration.seed) if text and calibration else None
        if wanted and wanted != tuple(found.source.get(key) for key in ("sha256", "context", "seed")):
            raise RecipeError(f"{path} was made from other text than the calibration's", hint="give one of the two")
        return found
    assert calibration is not None
    assert text is not None
    amount = (calibration.context, calibration.windows, calibration.seed)
    kept = None
    if path is None and work is not None:
        path = kept = work.place(
            "statistics", checkpoint.fingerprint(), text.sha256, text.name, amount, kind_of_device()
        )
        if kept.exists():
            try:
                return Statistics.load(kept)
            except SourceError:  # half of it: a machine that went down
                kept.unlink()
    found = calibrate(
        checkpoint, text, context=calibration.context, count=calibration.windows, seed=calibration.seed,
        progress=progress, folder=work.folder if work else None,
    )  # fmt: skip
    if path is not None:
        if work is not None and path == kept:
            work.make()
        found.save(path)
    return found
