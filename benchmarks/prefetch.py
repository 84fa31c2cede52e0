"""Experts announced before their layer is reached: how often the guess is right, and what it does to tokens a second.

    python benchmarks/prefetch.py FILE.squizd [--text eval.jsonl] [--resident 50% 25%] [--rounds 20] [--every 4]

The next layer's own router guesses from the residual that this layer's router looks at (`kernels/src/foresight.h`). The
same model is loaded once for each side ("never", "from disk": what users have, "always": announced from the cache too),
and all decode the same text (random tokens without `--text`), a few tokens each in turns. So all sides miss the same
experts, and their logits must be the same bits. "cold": before every `--every` tokens the system's cache of the file is
emptied. Figures: of the guessed experts those that were chosen; of the missing experts those that were announced; of
the announced experts those that nobody asked for then; mean wait for reads of a token; tokens a second, medians of
rounds, and as ratios to "never", medians of each round's. Last line: JSON. Linux, with squizd's kernels.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from typing import Any

import mlx.core as mx
import numpy as np
from cold import drop
from mlx_lm.models.cache import make_prompt_cache

from squizd.corpus import read
from squizd.generation import encode
from squizd.runtime.load import load, state
from squizd.runtime.switch import PagedSwitch

SIDES = ("never", "from disk", "always")
PROMPT = 32


class Side:
    """A model of its own, that guesses or does not."""

    def __init__(self, path: str, resident: str, when: str) -> None:
        self.model, self.tokenizer = load(path, resident=resident, context=4096)
        self.state = state(self.model)
        self.switches = [m for m in self.model.modules() if isinstance(m, PagedSwitch)]
        for switch in self.switches:
            switch.slots.shelf.foresee(when)
        self.cache: Any = None
        self.seconds: list[float] = []  # of a round's token
        self.processor: list[float] = []

    def begin(self, prompt: list[int]) -> None:
        self.cache = make_prompt_cache(self.model)
        mx.eval(self.model(mx.array([prompt]), cache=self.cache))

    def decode(self, tokens: list[int]) -> list[Any]:
        found = []
        began, cpu = time.perf_counter(), time.process_time()
        for token in tokens:
            out = self.model(mx.array([[token]]), cache=self.cache)
            mx.eval(out)
            found.append(out)
        self.seconds.append((time.perf_counter() - began) / len(tokens))
        self.processor.append((time.process_time() - cpu) / len(tokens))
        return found

    def guesses(self) -> tuple[int, ...]:
        return tuple(map(sum, zip(*(s.slots.shelf.take_guesses() for s in self.switches), strict=True)))

    def forget(self) -> None:
        self.seconds, self.processor = [], []
        self.state.reset_stats()
        self.guesses()


def measure(sides: dict[str, Side], tokens: list[int], cold: bool, options: argparse.Namespace) -> dict[str, Any]:
    """Rounds in turns; figures by side."""
    chance = random.Random(0)
    records = [r for s in sides["never"].switches for r in s.slots.records]
    for side in sides.values():
        side.forget()
    for start in range(0, len(tokens), options.every):
        part, logits = tokens[start : start + options.every], []
        for side in chance.sample(list(sides.values()), len(sides)):
            if cold:
                drop(side.state.file.fileno(), records)
            logits.append(side.decode(part))
        assert all(mx.array_equal(a, b).item() for other in logits[1:] for a, b in zip(logits[0], other, strict=True))
    plain, found = sides["never"], {}
    for name, side in sides.items():
        stats = side.state.stats
        misses = stats.misses
        guessed, right, announced, used = side.guesses()
        ratios = [a / b for a, b in zip(plain.seconds, side.seconds, strict=True)]
        found[name] = {
            "tokens_per_second": round(1 / statistics.median(side.seconds), 1),
            "ratio": round(statistics.median(ratios), 3),
            "total_ratio": round(sum(plain.seconds) / sum(side.seconds), 3),
            "cpu_ms": round(1e3 * statistics.median(side.processor), 2),
            "waited_ms": round(1e3 * stats.read_seconds / len(tokens), 3),
            "misses": round(misses / len(tokens), 2),
            "precision": round(right / guessed, 3) if guessed else None,
            "foreseen": round(used / misses, 3) if misses and announced else None,
            "useless": round(1 - used / announced, 3) if announced else None,
        }
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--text", help=".jsonl or text to decode; random tokens without")
    parser.add_argument("--resident", nargs="+", default=["50%", "25%"])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--every", type=int, default=4, help="tokens of one side at a time")
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    options = parser.parse_args()
    result: dict[str, Any] = {"benchmark": "prefetch", "file": options.file, "every": options.every}
    for resident in options.resident:
        sides = {when: Side(options.file, resident, when) for when in dict.fromkeys(("never", *options.sides))}
        side = sides["never"]
        wanted = PROMPT + 8 + 2 * options.rounds * options.every
        if options.text:
            texts = list(read(options.text).texts)
            random.Random(0).shuffle(texts)
            ids: list[int] = []
            while len(ids) < wanted:
                ids += encode(side.tokenizer, texts.pop())[:128]
        else:
            ids = np.random.default_rng(7).integers(0, side.model.args.vocab_size, wanted).tolist()
        for each in sides.values():
            each.begin(ids[:PROMPT])
            each.decode(ids[PROMPT : PROMPT + 8])
            if each.state.replay is None or not each.state.replay.in_use:
                raise SystemExit(f"tokens are not replayed: {each.state.arithmetic}")
        rest = ids[PROMPT + 8 : wanted]
        half = options.rounds * options.every
        for temperature, tokens in (("warm", rest[:half]), ("cold", rest[half:])):
            found = measure(sides, tokens, temperature == "cold", options)
            print(f"\n{resident} resident, {temperature}; {found['never']['misses']} misses a token")
            for name, f in found.items():
                share = [f"{f[k]:.0%}" if f[k] is not None else "-" for k in ("precision", "foreseen", "useless")]
                print(
                    f"  {name:9} {f['tokens_per_second']:8.1f} tokens/s, {f['ratio']:.2f} of never "
                    f"({f['total_ratio']:.2f} in all), waited {f['waited_ms']:.2f} ms, CPU {f['cpu_ms']:.2f} ms; "
                    f"right {share[0]}, misses foreseen {share[1]}, useless {share[2]}"
                )
            result[f"{resident} {temperature}"] = found
        for each in sides.values():
            each.state.close()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
