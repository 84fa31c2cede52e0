"""How far a file's answers are from a reference's: perplexity, KL divergence, agreement.

Reference and file compute every window of text from its first token, in the arithmetic that `squizd run` has on
this machine. The reference's results are kept on disk (`Cache`), so that it runs once for any number of files:
log-probabilities as float16 and renormalized when read (an error of about 3e-6 in KL divergence), its choice
of token, its loss and its experts exactly.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import load_tokenizer as load_tokenizer_from

from . import __version__, inspection
from .architecture import build, expert_modules, replace_module
from .checkpoint import open_checkpoint
from .container import File
from .container import open as open_file
from .corpus import Corpus, Encode, leading_windows
from .corpus import read as read_text
from .errors import OutputError, RequestError, SourceError
from .runtime import device
from .runtime.load import load_model, load_tokenizer, state
from .weights import read as read_weights

Floats = npt.NDArray[np.float64]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Result:
    """What `evaluate` found. Natural logarithms; errors are standard errors with texts as clusters.

    `weight_bytes` are those of weights as stored, `file_bytes` all of the file, `memory_bytes` what weights and expert
    slots took in memory. `router_agreement` holds, by expert layer, the mean share of a token's experts that the
    reference chose as well. Without a reference what compares with one is None.
    """

    file: str
    reference: str | None
    bits_per_weight: float
    parameters: int
    weight_bytes: int
    file_bytes: int
    memory_bytes: int
    texts: int
    tokens: int
    perplexity: float
    perplexity_error: float
    reference_perplexity: float | None = None
    kld_mean: float | None = None
    kld_mean_error: float | None = None
    kld_median: float | None = None
    kld_99: float | None = None
    kld_999: float | None = None
    kld_max: float | None = None
    top1_agreement: float | None = None
    router_agreement: dict[str, float] = field(default_factory=dict)
    top1_agreement_error: float = 0.0
    context: int = 0
    text: str = ""
    text_sha256: str = ""
    file_id: str = ""
    reference_id: str = ""
    made: str = ""
    source: str = ""
    arithmetic: str = ""

    def describe(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@dataclass
class Window:
    """One text's outcome: log-probabilities [tokens - 1, vocabulary], losses and choices [tokens - 1], experts."""

    log_probabilities: mx.array
    losses: npt.NDArray[np.float32]
    choices: npt.NDArray[np.int32]
    experts: dict[str, npt.NDArray[np.int32]]  # [tokens, k]


class Recorder(nn.Module):
    """Calls `inner(x, indices)` and keeps the indices."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self._seen: list[mx.array] = []

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        self._seen.append(indices)
        out: mx.array = self.inner(x, indices)
        return out

    def take(self) -> npt.NDArray[np.int32]:
        """The indices since the last call, [tokens, k]."""
        found = [np.array(seen).reshape(-1, seen.shape[-1]) for seen in self._seen]
        self._seen.clear()
        return np.concatenate(found).astype(np.int32) if found else np.zeros((0, 0), np.int32)


class Subject:
    """A model to evaluate: a `.squizd` file, or a checkpoint in float32. `close` frees it."""

    def __init__(self, source: str, memory: str | None = None) -> None:
        self.source = source
        if os.path.isfile(source):
            self.model = load_model(source, memory=memory)
            file = state(self.model).file
            self.identity, paths = file.file_id, [layer.path for layer in file.moe_layers]
            self.memory_bytes = state(self.model).resident_bytes
        else:
            self.model, self.identity = _load_checkpoint(source)
            self.memory_bytes = sum(array.nbytes for _, array in tree_flatten(self.model.parameters()))
            paths = list(expert_modules(self.model))
        owners: dict[str, nn.Module] = dict(self.model.named_modules())
        self._recorders = {path: Recorder(owners[path]) for path in paths}
        for path, recorder in self._recorders.items():
            replace_module(self.model, path, recorder)

    def run(self, ids: Sequence[int]) -> Window:
        """Predict ids[1:] from what precedes each."""
        logits = self.model(mx.array([list(ids)]))[0, :-1].astype(mx.float32)
        log_probabilities = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        targets = mx.array(list(ids)[1:])[:, None]
        losses = -mx.take_along_axis(log_probabilities, targets, axis=-1)[:, 0]
        choices = mx.argmax(logits, axis=-1)
        mx.eval(log_probabilities, losses, choices)
        experts = {path: recorder.take() for path, recorder in self._recorders.items()}
        return Window(log_probabilities, np.array(losses), np.array(choices).astype(np.int32), experts)

    def close(self) -> None:
        """Free its memory, and close its file."""
        if os.path.isfile(self.source):
            state(self.model).close()
        del self.model
        self._recorders.clear()
        mx.clear_cache()


def _load_checkpoint(source: str) -> tuple[nn.Module, str]:
    checkpoint = open_checkpoint(source)
    where = str(checkpoint.repo or checkpoint.folder)
    if isinstance(checkpoint.config.get("quantization"), dict):
        raise SourceError(f"{where} is quantized for MLX", hint="compress it first, with --recipe keep")
    model = build(checkpoint.config, where)
    weights = read_weights(checkpoint, model)
    names = {name for name, _ in tree_flatten(model.parameters())}
    if missing := sorted(names - set(weights)):
        raise SourceError(f"{where} has no tensor {missing[0]}")
    arrays = []
    for name in names:  # one at a time, so that nothing is held in two types for long
        array = weights.pop(name)
        array = array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array
        mx.eval(array)
        arrays.append((name, array))
    model.update(tree_unflatten(arrays))
    device.accelerate(model)
    return model, hashlib.sha256(b"checkpoint" + checkpoint.fingerprint()).hexdigest()


def encoder(source: str) -> Encode:
    """The tokenizer of a file or checkpoint as a function from text to ids, special tokens included."""
    if os.path.isfile(source):
        tokenizer = load_tokenizer(source)
    else:
        try:
            tokenizer = load_tokenizer_from(open_checkpoint(source).folder, {"trust_remote_code": False})
        except Exception as error:  # whatever transformers makes of the files
            raise SourceError(f"{source}: cannot build its tokenizer: {error}") from error

    def encode(text: str) -> Sequence[int]:
        ids: list[int] = tokenizer.encode(text, verbose=False)  # no warning: windows are cut to length here
        return ids

    return encode


class Cache:
    """The reference's outcome on a corpus, computed once and kept in a folder named after what it depends on."""

    def __init__(self, reference: str, windows: list[list[int]], folder: Path, progress: Progress) -> None:
        self.identity = reference_identity(reference)
        key = json.dumps([self.identity, windows, device.arithmetic(), __version__])
        self.folder = folder / hashlib.sha256(key.encode()).hexdigest()[:32]
        self.windows = windows
        if not self.folder.is_dir():
            self._fill(reference, progress)

    def _fill(self, reference: str, progress: Progress) -> None:
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(dir=self.folder.parent, prefix="partial-"))
        except OSError as error:
            raise OutputError(f"{self.folder.parent}: {error.strerror}", hint="choose another with --cache") from error
        try:
            subject = Subject(reference)
            for number, ids in enumerate(self.windows):
                progress(number, len(self.windows))
                found = subject.run(ids)
                half = np.array(found.log_probabilities.astype(mx.float16))
                arrays: dict[str, Any] = {f"experts {path}": indices for path, indices in found.experts.items()}
                arrays |= {"log_probabilities": half, "losses": found.losses, "choices": found.choices}
                np.savez(partial / f"{number}.npz", **arrays)
            subject.close()
            partial.rename(self.folder)
        except OSError as error:
            if not self.folder.is_dir():  # else another process was faster
                raise OutputError(
                    f"{partial}: {error.strerror or error}", hint="choose another with --cache"
                ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def __iter__(self) -> Iterator[Window]:
        for number in range(len(self.windows)):
            with np.load(self.folder / f"{number}.npz") as z:
                rounded = mx.array(z["log_probabilities"]).astype(mx.float32)
                rounded = rounded - mx.logsumexp(rounded, axis=-1, keepdims=True)
                experts = {name.removeprefix("experts "): z[name] for name in z.files if name.startswith("experts ")}
                yield Window(rounded, z["losses"], z["choices"], experts)


def reference_identity(source: str) -> str:
    """What a reference's outcome depends on: the file id, or the state of a checkpoint's files."""
    if os.path.isfile(source):
        with open_file(source) as f:
            return f.file_id
    return hashlib.sha256(b"checkpoint" + open_checkpoint(source).fingerprint()).hexdigest()


def default_cache() -> Path:
    """Where references are kept unless one says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "squizd" / "evaluation"


def evaluate(
    file: str | os.PathLike[str],
    corpus: Corpus | str | os.PathLike[str],
    *,
    reference: str | None = None,
    context: int = 512,
    texts: int = 40,
    memory: str | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Result:
    """Evaluate `file` on the first `context` tokens of `texts` texts of `corpus`, against `reference` if there is one.

    `corpus` is text that was read, or where to read it (`corpus.read`). `reference` is a checkpoint folder, a
    repository id or another file. Raises TextError (the corpus), RequestError (models that do not go together) and what
    loading raises.
    """
    report = progress or (lambda done, total: None)
    file = os.fspath(file)
    if not isinstance(corpus, Corpus):
        corpus = read_text(corpus)
    with open_file(file) as f:
        size, file_bytes, origin = inspection.weight_size(f), f.size, _origin(f)
    windows = leading_windows(corpus, encoder(file), context, texts)
    references = Cache(reference, windows, cache or default_cache(), report) if reference is not None else None
    subject = Subject(file, memory)
    try:
        losses, reference_losses, klds, same = list[Floats](), list[Floats](), list[Floats](), list[Floats]()
        shared: dict[str, list[float]] = {}
        against = iter(references) if references is not None else None
        for number, ids in enumerate(windows):
            report(number, len(windows))
            found = subject.run(ids)
            losses.append(found.losses.astype(np.float64))
            if against is None:
                continue
            wanted = next(against)
            if wanted.log_probabilities.shape != found.log_probabilities.shape or set(wanted.experts) != set(
                found.experts
            ):
                raise RequestError(f"{file} and {reference} are different models")
            klds.append(divergence(wanted.log_probabilities, found.log_probabilities))
            reference_losses.append(wanted.losses.astype(np.float64))
            same.append((wanted.choices == found.choices).astype(np.float64))
            for path, indices in found.experts.items():
                shared.setdefault(path, []).extend(agreement(wanted.experts[path], indices))
    finally:
        subject.close()
    loss, loss_error = clustered_mean(losses)
    facts: dict[str, Any] = {
        "context": context, "text": corpus.name, "text_sha256": corpus.sha256, "file_id": subject.identity,
        "arithmetic": device.arithmetic(), **origin,
    }  # fmt: skip
    if klds and references is not None:
        kld = np.concatenate(klds)
        mean, mean_error = clustered_mean(klds)
        top1, top1_error = clustered_mean(same)
        facts |= {
            "reference_perplexity": math.exp(clustered_mean(reference_losses)[0]),
            "kld_mean": mean, "kld_mean_error": mean_error, "kld_median": float(np.median(kld)),
            "kld_99": float(np.quantile(kld, 0.99)), "kld_999": float(np.quantile(kld, 0.999)),
            "kld_max": float(kld.max()), "top1_agreement": top1, "top1_agreement_error": top1_error,
            "reference_id": references.identity,
            "router_agreement": {path: float(np.mean(values)) for path, values in shared.items()},
        }  # fmt: skip
    return Result(
        file, reference, size.bits_per_weight, size.parameters, size.stored_bytes, file_bytes, subject.memory_bytes,
        len(windows), sum(map(len, losses)), math.exp(loss), math.exp(loss) * loss_error, **facts,
    )  # fmt: skip


def _origin(file: File) -> dict[str, str]:
    """How a file was made and from what, in words."""
    facts = inspection.describe(file)
    recipe, source = facts["recipe"], facts["source"]
    made = ", ".join(str(recipe[key]) for key in ("name", "quantizer") if recipe.get(key))
    shards = json.dumps(sorted(f["sha256"] for f in source.get("files", ())))
    where = f"{source['repo']} at {source['revision']}" if source.get("repo") else "a local folder"
    return {"made": made, "source": f"{where} (shards {hashlib.sha256(shards.encode()).hexdigest()[:16]})"}


def divergence(reference: mx.array, found: mx.array) -> Floats:
    """KL divergence, in nats, of every row of log-probabilities [n, vocabulary] from the reference's; at least 0."""
    rows = mx.sum(mx.exp(reference) * (reference - found), axis=-1)
    return np.maximum(np.array(rows).astype(np.float64), 0.0)


def agreement(a: npt.NDArray[np.int32], b: npt.NDArray[np.int32]) -> list[float]:
    """Share of row i of `a` that row i of `b` holds as well, in any order; [n, k] both, no index twice in a row."""
    shared: list[float] = (a[:, :, None] == b[:, None, :]).any(axis=-1).mean(axis=-1).tolist()
    return shared


def clustered_mean(clusters: Sequence[Floats]) -> tuple[float, float]:
    """Mean of all values, and its standard error if values within a cluster may depend on each other.

    The cluster-robust ("sandwich") estimate with the usual n / (n - 1): tokens of one text are not independent.
    """
    total = sum(map(len, clusters))
    mean = sum(float(x.sum()) for x in clusters) / total
    squares = sum(float((x - mean).sum()) ** 2 for x in clusters)
    count = len(clusters)
    return mean, math.sqrt(squares * count / max(count - 1, 1)) / total
