"""What a model's weights see when it reads text: the statistics that importance and GPTQ are made of.

Per linear layer the mean square of every input channel; per expert the same, weighted by the square of the
gate with which the router takes its output. (Second moments of inputs: the "importance matrix" of llama.cpp;
Frantar et al. 2022, arXiv:2210.17323, use all products of inputs, as `ExpertInputs.hessians` gives them.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from . import corpus as corpora
from .checkpoint import Checkpoint
from .corpus import Corpus
from .errors import SourceError, TextError
from .knowledge import Statistics
from .listening import LinearInputs
from .moments import left_by_feedback
from .routed import PRIOR_TOKENS, ExpertInputs
from .scratch import Folder
from .walk import Walk
from .watching import RoutedInputs

Progress = Callable[[int, int], None]

HEAD_WINDOWS = 64  # on which the head's inputs are looked at


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


def expert_inputs(
    checkpoint: Checkpoint, windows: Sequence[Sequence[int]], folder: Folder = None
) -> Iterator[ExpertInputs]:
    """What reaches every expert module, in the order of the model's layers; one layer in memory at a time."""
    experts = RoutedInputs(folder)
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
    inputs, experts = LinearInputs(), RoutedInputs(folder)
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
                parts = (mx.sum(x * x, axis=0) for x in module.of(expert, projection))
                done[last] = np.sum([np.array(part).astype(np.float64) for part in parts], axis=0)
            sums[projection].append(done[last])
    prior = PRIOR_TOKENS * module.mean_square_gate()
    found.tokens[module.path], found.mass[module.path], found.squares[module.path] = counts, mass, squares
    for projection, each in sums.items():
        total = np.stack(each)
        layer = total.sum(axis=0) / max(squares.sum(), 1e-30)
        mixed = (total + prior * layer) / (squares[:, None] + prior)
        found.moments[f"{module.path}.{projection}"] = mixed.astype(np.float32)
    busiest = np.argsort(-counts, kind="stable")[:4].tolist()
    shares = {last: left_by_feedback(module.hessians(module.last if last else module.first_name, busiest))
              for last in (False, True)}  # fmt: skip
    for projection in projections:
        found.feedback[f"{module.path}.{projection}"] = shares[projection == module.last]
