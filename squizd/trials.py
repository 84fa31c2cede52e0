"""Trials of one prompt on sides that take turns, and what they come to. `sides` is what runs in each process.

A round is one trial of each side, so a machine that slows down slows all; ratios are taken within a round. One round
before the first is not counted: it compiles, and fills the expert slots, so a trial finds what a second request would.

Definitions. A trial's rate is its tokens but the first over the time between its first and its last. Percentiles
interpolate linearly. P95 of latencies (TTFT, time of a token): 95 % are no longer. P95 of rates: 95 % of the
trials are no slower. Latencies of tokens are of all tokens of all trials together, first ones excluded.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from types import TracebackType
from typing import Any

import numpy as np

from .errors import BudgetError, RequestError
from .sides import Side, Trial

Progress = Callable[[int, int], None]
PERCENTILES = (50, 95, 99)
DEFINITIONS = " ".join((__doc__ or "").partition("Definitions. ")[2].split())


class Process:
    """A side that runs. A context manager; `ask` raises RequestError with what the side says is wrong."""

    def __init__(self, side: Side) -> None:
        self.side = side
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", "squizd.sides", json.dumps(asdict(side))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True, env=side.environment(),
        )  # fmt: skip
        try:
            self.facts = self._answer()
        except BaseException:
            self.close()
            raise

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._said.seek(0)
            last = self._said.read().decode(errors="replace").strip().splitlines()
            raise RequestError(f"{self.side.name} ended with code {code}: {last[-1] if last else 'it said nothing'}")
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            said = found["error"] if self.side.kind == "squizd" else f"{self.side.name}: {found['error']}"
            if found["kind"] == "BudgetError":
                raise BudgetError(said, minimum=found["minimum"], hint=found["hint"])
            raise RequestError(said, hint=found["hint"])
        return found

    def ask(self, **command: Any) -> dict[str, Any]:
        """The answer to one command: `do` = "trial" (prompt, tokens), "digest" (prompt, chunk) or "facts"."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # `_answer` says why
        return self._answer()

    def trial(self, prompt: list[int], tokens: int) -> Trial:
        """One trial."""
        return Trial(**self.ask(do="trial", prompt=prompt, tokens=tokens))

    def close(self) -> None:
        """End the process; twice is fine."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()
        self._said.close()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def compare(
    sides: Sequence[Side], prompt: list[int], tokens: int, trials: int, progress: Progress | None = None
) -> tuple[dict[str, list[Trial]], dict[str, dict[str, Any]]]:
    """`trials` rounds of one trial of each side, after one that is not counted: trials and facts by the side's name."""
    found: dict[str, list[Trial]] = {side.name: [] for side in sides}
    running: list[Process] = []
    try:
        running += [Process(side) for side in sides]
        for number in range(-1, trials):
            for process in running:
                trial = process.trial(prompt, tokens)
                if number >= 0:
                    found[process.side.name].append(trial)
            if progress is not None:
                progress(number + 1, trials)
        facts = {process.side.name: {**process.facts, **process.ask(do="facts")} for process in running}
    finally:
        for process in running:
            process.close()
    return found, facts


def rate(trial: Trial) -> float:
    """Tokens a second after the first."""
    return (len(trial.seconds) - 1) / (trial.seconds[-1] - trial.seconds[0])


def summary(trials: Sequence[Trial]) -> dict[str, Any]:
    """One side's figures: seconds, tokens a second, shares, bytes; percentiles as this module defines them."""
    first = [t.seconds[0] for t in trials]
    latencies = [gap for t in trials for gap in np.diff(t.seconds)]
    rates = [rate(t) for t in trials]
    asked = sum(t.hits + t.misses for t in trials)
    waited = sum(t.read_seconds for t in trials)
    read = sum(t.bytes_read for t in trials)
    return {
        "trials": len(trials),
        "ttft_seconds": {f"p{p}": float(np.percentile(first, p)) for p in PERCENTILES},
        "token_seconds": {f"p{p}": float(np.percentile(latencies, p)) for p in PERCENTILES},
        "tokens_per_second": {f"p{p}": float(np.percentile(rates, 100 - p)) for p in PERCENTILES},
        "hit_rate": sum(t.hits for t in trials) / asked if asked else None,
        "bytes_read_per_trial": round(read / len(trials)),
        "bytes_read_per_token": round(read / sum(len(t.seconds) for t in trials)),
        "disk_bytes_per_second": read / waited if waited else None,  # while the model waited for reads
        "peak_rss": max(t.peak_rss for t in trials),
    }


def ratios(ours: Sequence[Trial], theirs: Sequence[Trial], value: Callable[[Trial], float]) -> dict[str, float]:
    """Ours over theirs, round by round: median, quartiles and extremes."""
    found = [value(a) / value(b) for a, b in zip(ours, theirs, strict=True)]
    low, high = np.percentile(found, [25, 75])
    return {
        "median": statistics.median(found), "p25": float(low), "p75": float(high),
        "min": min(found), "max": max(found),
    }  # fmt: skip
