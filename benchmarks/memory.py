"""Is the budget kept? One prompt to a big synthetic file, or a long session on any file; each as a whole process.

    python benchmarks/memory.py --size 3GB --memory 700MB
    python benchmarks/memory.py --session FILE --memory 25% --text eval.jsonl

The first makes the file with tools/make_synthetic.py, runs it, and prints one JSON line with the process's
maximum resident set size; exits 1 if that exceeds --limit.

The second holds one session of --turns turns: each adds --feed tokens of another domain's text to the conversation,
whose cache is kept, and generates --tokens; then come --long prompts of --length tokens on caches of their own, one
generation of --marathon tokens, and the first kind of turn once more. It prints a line for each turn and a verdict as
JSON, and exits 1 unless the peak stays within --memory and --overhead (Python, MLX, tokenizer, kernels), and
what is resident besides the cache does not grow by more than --growth from turn 3 on.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import cycle
from pathlib import Path
from typing import Any

from squizd.runtime.budget import parse_size

TOOL = Path(__file__).parent.parent / "tools" / "make_synthetic.py"
SETTLED = 3  # the turn from which on nothing may grow


def one_prompt(args: argparse.Namespace) -> bool:
    """`squizd run` on a file made for it; whether it stays below the limit."""
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        file = f"{name}/big.squizd"
        subprocess.run([sys.executable, str(TOOL), file, "--size", args.size], check=True, stdout=subprocess.DEVNULL)
        prompt = " ".join(f"word{i % 50}" for i in range(args.words))
        command = [
            "squizd.cli",
            "run",
            file,
            "--memory",
            args.memory,
            "-n",
            str(args.tokens),
            "--no-chat",
            "-p",
            prompt,
        ]
        child = subprocess.Popen(
            [sys.executable, "-m", *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        assert child.stderr is not None
        said = child.stderr.read().strip().splitlines()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        result = {
            "file_bytes": os.path.getsize(file), "budget": parse_size(args.memory), "peak_rss": peak,
            "exit_code": child.returncode, "statistics": said[-1] if said else "",
        }  # fmt: skip
    print(json.dumps(result))
    return child.returncode == 0 and peak <= parse_size(args.limit)


# -- a session -----------------------------------------------------------------------------------------------


def resident(field: str = "VmRSS") -> int:
    """Bytes of this process in memory now, or ("VmHWM") at most so far."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


class Feed:
    """Token ids of a text file's domains, in turns: endless."""

    def __init__(self, path: Path, tokenizer: Any) -> None:
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        texts: dict[str, str] = {}
        for row in rows:
            texts[row["domain"]] = texts.get(row["domain"], "") + row["text"] + "\n"
        # Only as much text as is needed: a tokenizer may take much memory for a long one.
        self._ids = {d: cycle(tokenizer.encode(text[:24_000])) for d, text in texts.items()}
        self._domains = cycle(self._ids)

    def take(self, count: int) -> tuple[str, list[int]]:
        """The next domain and so many of its tokens."""
        domain = next(self._domains)
        return domain, [next(self._ids[domain]) for _ in range(count)]


def session(args: argparse.Namespace) -> bool:
    """Turns, long prompts, a long generation; whether memory stays in bounds."""
    import squizd
    from squizd.runtime.load import load_tokenizer

    tokenizer = load_tokenizer(args.session)
    feed = Feed(args.text, tokenizer)
    size = os.path.getsize(args.session)
    memory = int(size * float(args.memory[:-1]) / 100) if args.memory.endswith("%") else parse_size(args.memory)
    context = max(args.turns * (args.feed + args.tokens), args.length, args.marathon + args.feed) + args.tokens
    import mlx.core as mx

    mx.eval(mx.zeros(1))
    base = resident()
    run = squizd.Session(args.session, memory=memory, context=context, tokenizer=tokenizer)
    budget = run.state.budget
    print(
        f"budget {memory / 1e6:.0f} MB: {budget}; before loading {base / 1e6:.0f} MB; {run.state.arithmetic}",
        flush=True,
    )
    rest: list[int] = []

    def turn(name: str, ids: list[int], tokens: int, cache: list[Any], cached: int) -> int:
        began, fed = time.perf_counter(), cached + len(ids)
        last = None
        for part in squizd.stream_generate(
            run.model, tokenizer, ids, max_tokens=tokens, prompt_cache=cache, cached_tokens=cached
        ):
            last = part
        run.state.reset_stats()
        held = sum(entry.nbytes for entry in cache)
        now = resident()
        rest.append(now - held)
        seconds = time.perf_counter() - began
        print(
            f"{name:>16}: {fed:6} + {last.generated_tokens:4} tokens, {seconds:6.1f} s, resident {now / 1e6:7.1f} MB, "
            f"of it cache {held / 1e6:6.1f}, the rest {rest[-1] / 1e6:7.1f}; peak {resident('VmHWM') / 1e6:7.1f} MB",
            flush=True,
        )
        # mlx-lm's cache lacks the last token where an answer ends at its limit: what it holds is what is cached
        return int(cache[0].offset)

    cache, cached = run.state.caches.make(run.model), 0
    for number in range(1, args.turns + 1):
        domain, ids = feed.take(args.feed)
        cached = turn(f"turn {number} {domain}", ids, args.tokens, cache, cached)
    del cache
    gc.collect()
    for number in range(1, args.long + 1):
        domain, ids = feed.take(args.length - args.tokens)
        turn(f"prompt {number} {domain}", ids, args.tokens, run.state.caches.make(run.model), 0)
    if args.marathon:
        turn("marathon", feed.take(args.feed)[1], args.marathon, run.state.caches.make(run.model), 0)
    turn("at last", feed.take(args.feed)[1], args.tokens, run.state.caches.make(run.model), 0)
    peak, growth = resident("VmHWM"), max(rest[SETTLED:]) - rest[SETTLED - 1]
    run.close()
    overhead = parse_size(args.overhead)
    passed = {"peak": peak <= memory + overhead, "growth": growth <= parse_size(args.growth)}
    result = {
        "benchmark": "memory session", "passed": all(passed.values()), **{f"{k}_ok": v for k, v in passed.items()},
        "file_bytes": size, "budget": memory, "overhead_allowed": overhead, "before_loading": base,
        "peak_rss": peak, "peak_over_budget": peak - memory, "growth_after_turn_3": growth, "turns": len(rest),
    }  # fmt: skip
    print(json.dumps(result))
    return bool(result["passed"])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", default="700MB", help="budget; with --session also as a share of the file, 25%%")
    parser.add_argument("--tokens", type=int, default=30, help="to generate each time (default: %(default)s)")
    parser.add_argument("--size", default="3GB")
    parser.add_argument("--limit", default="1.2GB")
    parser.add_argument("--words", type=int, default=300, help="length of the prompt (default: %(default)s)")
    parser.add_argument("--folder", help="where to make the file (default: a temporary folder)")
    parser.add_argument("--session", metavar="FILE", help="hold a session on this file instead")
    parser.add_argument("--text", type=Path, help="for --session: rows of domain and text")
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--feed", type=int, default=100, help="tokens of text a turn (default: %(default)s)")
    parser.add_argument("--long", type=int, default=3, help="long prompts (default: %(default)s)")
    parser.add_argument("--length", type=int, default=2000, help="tokens of each (default: %(default)s)")
    parser.add_argument("--marathon", type=int, default=1000, help="tokens of one generation (default: %(default)s)")
    parser.add_argument("--overhead", default="300MB", help="besides the budget (default: %(default)s)")
    parser.add_argument("--growth", default="8MB", help="after turn 3 (default: %(default)s)")
    args = parser.parse_args()
    if args.session and args.text is None:
        parser.error("--session needs --text")
    sys.exit(not (session(args) if args.session else one_prompt(args)))


if __name__ == "__main__":
    main()
