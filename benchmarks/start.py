"""Time to the first token of a whole command, with and without a warm start.

    python benchmarks/start.py FILE.squizd [--resident 50% 25%] [--words 30] [--rounds 5]

`squizd run` as a process of its own, from its start to the end of its only token, in turns: as users have it, and
without filling slots by the profile (`runtime/warm.py`). FILE needs a profile (`squizd profile`). "cold": before each
run the system's cache of FILE's experts is emptied. Linux only. Seconds, medians, and medians of each round's ratio.
Last line: JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from typing import Any

from cold import drop

import squizd

SIDES = {"without": "load._warm = lambda *_: None", "with": "pass"}
# `load` is imported late, as in the command itself: whatever must differ there is put in place by an import hook.
CODE = """
import sys
class Hook:
    def find_spec(self, name, path=None, target=None):
        if name == "squizd.generation":
            sys.meta_path.remove(self)
            import squizd.runtime.load as load
            {change}
sys.meta_path.insert(0, Hook())
from squizd.cli import main
main(sys.argv[1:])
"""


def seconds(side: str, file: str, resident: str, prompt: str) -> float:
    """One run of the command."""
    code = CODE.format(change=SIDES[side])
    command = [sys.executable, "-c", code, "run", file, "--resident", resident, "-n", "1", "--no-chat", "-p", prompt]
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PYTHONWARNINGS": "ignore"})
    return time.perf_counter() - began


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--resident", nargs="+", default=["50%", "25%"])
    parser.add_argument("--words", type=int, default=30, help="of the prompt")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    chance = random.Random(0)
    prompt = " ".join(
        chance.choice(["river", "city", "war", "engine", "king", "sea", "music"]) for _ in range(options.words)
    )
    with squizd.open(options.file) as file:
        if not file.appendix(b"PROF"):
            raise SystemExit(f"{options.file} has no profile: squizd profile")
        records = [record for x in file.moe_layers for record in file.experts(x.layer)]
        result: dict[str, Any] = {"benchmark": "start", "file": options.file, "words": options.words}
        for resident in options.resident:
            for temperature in ("cold", "warm"):
                found: dict[str, list[float]] = {side: [] for side in SIDES}
                for _ in range(options.rounds):
                    for side in chance.sample(list(SIDES), len(SIDES)):
                        if temperature == "cold":
                            drop(file.fileno(), records)
                        found[side].append(seconds(side, options.file, resident, prompt))
                print(f"\n{resident} resident, {temperature}: seconds, median (least to most); of that without")
                for side, values in found.items():
                    middle = statistics.median(values)
                    ratio = statistics.median(a / b for a, b in zip(values, found["without"], strict=True))
                    print(f"  {side:12} {middle:6.2f} ({min(values):.2f} to {max(values):.2f})  {ratio:.2f}")
                    result[f"{resident} {temperature} {side}"] = {"seconds": round(middle, 3), "ratio": round(ratio, 3)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
