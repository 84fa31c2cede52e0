"""How fast a file runs here, what it reads and what memory it takes, and whether it answers as a resident model does.

Alone, or beside mlx-lm on the same weights and llama.cpp. `trials` says how figures are taken and defined.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from . import container
from .backend import on_cpu
from .errors import BudgetError, RequestError
from .inspection import describe
from .runtime.load import load_tokenizer
from .sides import CHECKED_TOKENS, Side
from .trials import DEFINITIONS, Process, Progress, compare, rate, ratios, summary

PROMPT = "The history of the city begins with a small village near the river"
RIVALS = ("mlx-lm", "mlx-lm-f32", "llama.cpp")
OURS = "squizd"
HEADS = "side|TTFT P50|P95|P99|ms/token P50|P95|P99|tokens/s P50|P95|P99|hit rate|read/token|disk|peak RSS|bits/weight"


@dataclass(frozen=True)
class Exactness:
    """Whether logits within the budget have the bits of a resident model's; `same` is None if that was not checked."""

    same: bool | None
    why: str
    logits: int = 0  # rows compared

    @property
    def failed(self) -> bool:
        """Whether it was checked, is not so, and should be: on CPU."""
        return self.same is False and on_cpu()

    def __str__(self) -> str:
        if self.same is None:
            return f"not compared with a resident model: {self.why}"
        word = "the same bits as" if self.same else f"NOT the bits of ({self.why})"
        return f"{self.logits} rows of logits: {word} a resident model's"


def check(ours: Side, prompt: list[int]) -> Exactness:
    """Compare logits of the prompt and of `CHECKED_TOKENS` after it, in two processes, one after the other."""
    with Process(ours) as process:
        chunk = process.facts["prefill_step_size"]
        found = process.ask(do="digest", prompt=prompt, chunk=chunk)
    try:
        with Process(replace(ours, name="resident", memory=None, resident="100%")) as process:
            wanted = process.ask(do="digest", prompt=prompt, chunk=chunk)
    except BudgetError as error:
        return Exactness(None, f"all experts at once do not fit here: {error}")
    same = found["sha256"] == wanted["sha256"]
    return Exactness(
        same, "" if same else f"tokens {found['tokens']} and {wanted['tokens']}", len(prompt) + CHECKED_TOKENS
    )


@dataclass(frozen=True)
class Bench:
    """What was measured. `sides` and `facts` by name, squizd first; `ratios` squizd over each other side."""

    path: str
    file_id: str
    bits_per_weight: float
    prompt_tokens: int
    tokens: int
    machine: dict[str, Any]
    exact: Exactness
    sides: dict[str, dict[str, Any]]
    facts: dict[str, dict[str, Any]]
    ratios: dict[str, dict[str, dict[str, float]]]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"benchmark": "bench", **asdict(self), "definitions": DEFINITIONS}


def bench(
    path: str | os.PathLike[str],
    *,
    prompt: str | None = None,
    tokens: int = 64,
    trials: int = 30,
    memory: str | int | None = None,
    resident: str | float | None = None,
    against: Sequence[str] = (),
    gguf: str | None = None,
    threads: int = 0,
    checked: bool = True,
    progress: Progress | None = None,
) -> Bench:
    """Measure the file at `path` within a budget, and `against` others (RIVALS) in turns.

    "mlx-lm" holds the same tensors, quantized alike, in the file's number types; "mlx-lm-f32" computes in float32, as
    squizd does on CPU; "llama.cpp" runs the `gguf` file. `threads` are those of squizd's kernels and of llama.cpp
    (0: one for each core; MLX has its own). Raises RequestError for what cannot be compared, and what `load` raises.
    """
    if tokens < 2 or trials < 1:
        raise RequestError("a trial has at least 2 tokens, and there is at least one")
    name = os.fspath(path)
    with container.open(path) as file:
        facts = describe(file)
    tokenizer = load_tokenizer(path)
    ids = list(tokenizer.encode(PROMPT if prompt is None else prompt))
    if not ids:
        raise RequestError("the prompt is empty")
    ours = Side(OURS, OURS, name, memory, resident, context=len(ids) + max(tokens, CHECKED_TOKENS) + 1, threads=threads)
    sides = [ours, *(_rival(kind, ours, gguf) for kind in against)]
    exact = check(ours, ids) if checked else Exactness(None, "not asked for")
    found, said = compare(sides, ids, tokens, trials, progress)
    said[OURS]["bits_per_weight"] = facts["bits_per_weight"]
    for side in sides[1:]:
        if side.kind == "llama.cpp" and said[side.name]["vocabulary"] != len(tokenizer):
            where = f"{gguf} has {said[side.name]['vocabulary']} tokens, {name} has {len(tokenizer)}"
            said[side.name]["note"] = f"not the same vocabulary: {where}"
        said[side.name].setdefault("bits_per_weight", facts["bits_per_weight"])
    against_ours = {
        side.name: {
            "tokens_per_second": ratios(found[OURS], found[side.name], rate),
            "ttft": ratios(found[OURS], found[side.name], lambda t: t.seconds[0]),
        }
        for side in sides[1:]
    }
    figures = {each: summary(of) for each, of in found.items()}
    return Bench(
        name,
        facts["file_id"],
        facts["bits_per_weight"],
        len(ids),
        tokens,
        machine(),
        exact,
        figures,
        said,
        against_ours,
    )


def _rival(kind: str, ours: Side, gguf: str | None) -> Side:
    if kind not in RIVALS:
        raise RequestError(f"there is no comparison with {kind}", hint=f"--against takes {', '.join(RIVALS)}")
    if kind != "llama.cpp":
        return replace(ours, name=kind, kind="mlx-lm", memory=None, resident=None, stored=kind == "mlx-lm")
    if gguf is None:
        raise RequestError("llama.cpp needs a GGUF file", hint="add --gguf FILE")
    if find_spec("llama_cpp") is None:
        raise RequestError("llama.cpp is not installed here", hint="pip install llama-cpp-python")
    if not os.path.isfile(gguf):
        raise RequestError(f"{gguf} is no file")
    return replace(ours, name=kind, kind=kind, path=gguf, memory=None, resident=None)


def machine() -> dict[str, Any]:
    """Where and with what: processor, cores, memory, versions."""
    versions = {}
    for package in ("squizd", "mlx", "mlx-lm", "llama-cpp-python"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    processor = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            processor = next((x.partition(": ")[2].strip() for x in lines if x.startswith("model name")), processor)
    except OSError:
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"processor": processor, "cores": cores, "system": platform.platform(), "versions": versions}


def table(found: Bench) -> Iterator[str]:
    """Lines of text for people."""
    heads = tuple(HEADS.split("|"))
    rows = [heads, *(_row(name, side, found.facts[name]) for name, side in found.sides.items())]
    widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
    for row in rows:
        yield "  ".join([row[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(row[1:], widths[1:], strict=True))])
    for name, both in found.ratios.items():
        speed, first = (_spread(both[key]) for key in ("tokens_per_second", "ttft"))
        bits = f"{found.bits_per_weight:.3f} / {found.facts[name]['bits_per_weight']:.3f} bits per weight"
        yield f"squizd / {name} ({bits}): tokens/s {speed}; TTFT {first}"
    for name, facts in found.facts.items():
        floats = f", {' and '.join(facts['floats'])}" if "floats" in facts else ""
        yield f"{name}: {facts['arithmetic']}{floats}" + (f"; {facts['note']}" if "note" in facts else "")
    yield str(found.exact)
    yield DEFINITIONS


def _row(name: str, side: dict[str, Any], facts: dict[str, Any]) -> tuple[str, ...]:
    paged = side["hit_rate"] is not None
    disk = side["disk_bytes_per_second"]
    return (
        name,
        *(f"{side['ttft_seconds'][p] * 1e3:.1f} ms" for p in ("p50", "p95", "p99")),
        *(f"{side['token_seconds'][p] * 1e3:.2f}" for p in ("p50", "p95", "p99")),
        *(f"{side['tokens_per_second'][p]:.1f}" for p in ("p50", "p95", "p99")),
        f"{side['hit_rate']:.1%}" if paged else "-",
        f"{side['bytes_read_per_token'] / 1e6:.2f} MB" if paged else "-",
        f"{disk / 1e9:.2f} GB/s" if disk else "-",
        f"{side['peak_rss'] / 1e6:.0f} MB",
        f"{facts['bits_per_weight']:.3f}",
    )


def _spread(ratio: dict[str, float]) -> str:
    quartiles, all_of_them = (f"{ratio[a]:.2f} to {ratio[b]:.2f}" for a, b in (("p25", "p75"), ("min", "max")))
    return f"{ratio['median']:.2f} (quartiles {quartiles}, all {all_of_them})"
