"""One side of `squizd bench` in a process of its own: squizd, mlx-lm on the same weights, or llama.cpp.

`python -m squizd.sides SPEC` (JSON, see `Side`) loads its model, and answers commands, one JSON line each, on
what was its standard output. Tokens are greedy and never end early, so every side does the same work.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from .errors import SquizdError

CHECKED_TOKENS = 16  # that are decoded for a digest of logits, after the whole prompt


@dataclass(frozen=True)
class Side:
    """What to run. `kind`: "squizd", "mlx-lm" (resident, MLX's arithmetic) or "llama.cpp" (`path` is a GGUF file).

    `kernels`: whether squizd may use its own; `stored`: mlx-lm computes in the types of the file, as it does by
    default, else in float32; `threads`: of squizd's kernels and of llama.cpp, 0: one for each core. The rest as in
    `squizd.load`.
    """

    name: str
    kind: str
    path: str
    memory: str | int | None = None
    resident: str | float | None = None
    context: int = 4096
    kernels: bool = True
    stored: bool = True
    threads: int = 0

    def environment(self) -> dict[str, str]:
        """For its process."""
        env = dict(os.environ)
        if self.kind == "mlx-lm" or not self.kernels:
            env["SQUIZD_KERNELS"] = "0"
        if self.threads:
            env["SQUIZD_THREADS"] = str(self.threads)
        return env


@dataclass
class Trial:
    """Seconds from the request to each token, and what was paged meanwhile (llama.cpp and mlx-lm: nothing)."""

    seconds: list[float]
    hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    read_seconds: float = 0.0
    peak_rss: int = field(default=0)


class _MlxSide:
    """squizd and mlx-lm: the same model code and generation loop; where weights lie and what computes differ."""

    def __init__(self, side: Side) -> None:
        from .runtime import device
        from .runtime.load import load_model, state

        if side.kind == "squizd":
            self.model: Any = load_model(side.path, memory=side.memory, resident=side.resident, context=side.context)
        elif side.stored:
            with device.as_stored():
                self.model = load_model(side.path, resident="100%", context=side.context)
        else:
            self.model = load_model(side.path, resident="100%", context=side.context)
        self.state = state(self.model)
        self._paged = side.kind == "squizd"

    def facts(self) -> dict[str, Any]:
        budget = self.state.budget
        types = {str(a.dtype).rpartition(".")[2] for a in self._floats()}
        return {
            "arithmetic": self.state.arithmetic, "floats": sorted(types), "budget_total": budget.total,
            "prefill_step_size": budget.prefill_step_size, "resident_share": self.state.resident_share,
            "replayed": self.state.replay is not None and self.state.replay.in_use,
        }  # fmt: skip

    def _floats(self) -> Iterator[Any]:
        import mlx.core as mx
        from mlx.utils import tree_flatten

        leaves: Any = tree_flatten(self.model.parameters())
        return (a for _, a in leaves if mx.issubdtype(a.dtype, mx.floating))

    def trial(self, prompt: list[int], tokens: int) -> Trial:
        import mlx.core as mx
        from mlx_lm.generate import generate_step

        self.state.reset_stats()
        seconds, began = [], time.perf_counter()
        step = self.state.prefill_step_size if self._paged else 2048  # mlx-lm's default
        for _ in generate_step(mx.array(prompt), self.model, max_tokens=tokens, prefill_step_size=step):
            seconds.append(time.perf_counter() - began)
        stats = self.state.stats
        return Trial(seconds, stats.hits, stats.misses, stats.bytes_read, stats.read_seconds)

    def digest(self, prompt: list[int], chunk: int) -> dict[str, Any]:
        """SHA-256 of the float32 logits of every prompt token and of CHECKED_TOKENS greedy ones after them."""
        import mlx.core as mx
        import numpy as np

        found, cache, out = hashlib.sha256(), self.state.caches.make(self.model), None
        said: list[int] = []
        parts = [prompt[i : i + chunk] for i in range(0, len(prompt), chunk)]
        for part in parts:
            out = self.model(mx.array([part]), cache=cache)
            mx.eval(out)
            found.update(np.array(out.astype(mx.float32)).tobytes())
        for _ in range(CHECKED_TOKENS):
            assert out is not None
            said.append(np.array(mx.argmax(out[0, -1])).item())
            out = self.model(mx.array([[said[-1]]]), cache=cache)
            mx.eval(out)
            found.update(np.array(out.astype(mx.float32)).tobytes())
        return {"sha256": found.hexdigest(), "tokens": said, "misses": self.state.stats.misses}


class _LlamaSide:
    def __init__(self, side: Side) -> None:
        import llama_cpp  # type: ignore[import-not-found]

        self._api, threads = llama_cpp, side.threads or len(os.sched_getaffinity(0))
        options = {"n_ctx": side.context, "n_threads": threads, "n_threads_batch": threads, "verbose": False}
        self.model: Any = llama_cpp.Llama(side.path, **options)

    def facts(self) -> dict[str, Any]:
        size, count = self._api.llama_model_size(self.model.model), self._api.llama_model_n_params(self.model.model)
        return {
            "arithmetic": f"llama.cpp (llama-cpp-python {self._api.__version__})", "vocabulary": self.model.n_vocab(),
            "bits_per_weight": size * 8 / count, "bytes": size,
        }  # fmt: skip

    def trial(self, prompt: list[int], tokens: int) -> Trial:
        self.model.reset()
        seconds, began = [], time.perf_counter()
        for _ in self.model.generate(prompt, temp=0.0, repeat_penalty=1.0):
            seconds.append(time.perf_counter() - began)
            if len(seconds) == tokens:
                break
        return Trial(seconds)


def peak_rss() -> int:
    """Most bytes of memory that this process ever held."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _serve(side: Side, answer: Callable[[dict[str, Any]], None]) -> None:
    runner = _LlamaSide(side) if side.kind == "llama.cpp" else _MlxSide(side)
    answer({**runner.facts(), "loaded_rss": peak_rss()})
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "trial":
            trial = runner.trial(command["prompt"], command["tokens"])
            trial.peak_rss = peak_rss()
            answer(asdict(trial))
        elif command["do"] == "digest" and isinstance(runner, _MlxSide):
            answer(runner.digest(command["prompt"], command["chunk"]))
        else:
            answer(runner.facts())


def main() -> None:
    """Read SPEC, load, and answer until standard input ends."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer

    def answer(value: dict[str, Any]) -> None:
        print(json.dumps(value), file=out, flush=True)

    try:
        _serve(Side(**json.loads(sys.argv[1])), answer)
    except SquizdError as error:
        minimum = getattr(error, "minimum", 0)
        answer({"error": str(error), "kind": type(error).__name__, "hint": error.hint, "minimum": minimum})
    except (OSError, ValueError, MemoryError, ImportError) as error:  # of llama.cpp, too
        answer({"error": str(error) or "out of memory", "kind": type(error).__name__, "hint": ""})


if __name__ == "__main__":
    main()
