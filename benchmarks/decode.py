"""How fast is `squizd run`? Whole commands against `mlx_lm generate`, and residencies against each other.

    python benchmarks/decode.py --model CHECKPOINT

Commands take turns, so a machine that slows down slows all of them. Prints medians and ratios as one
JSON line, with what computed. Both sides use the same 4-bit min-max weights and the same prompt; mlx-lm computes
in the checkpoint's type, as its command does. The side "through MLX" is `squizd run` with SQUIZD_KERNELS=0, whose
logits are mlx-lm's in float32 bit for bit; those of the others are within 1e-5 of them (benchmarks/exactness.py).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

PROMPT = "The history of the city begins with a small village near the river"
SHARES = ("100%", "50%", "25%", "0%")
PLAIN = "100% through MLX"


def decode_speed(command: list[str], pattern: str, kernels: str = "1") -> tuple[float, str]:
    """Tokens a second that the command itself reports, and the last words of its report."""
    env = {**os.environ, "SQUIZD_KERNELS": kernels}
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=True, env=env)
    found = re.search(pattern, done.stdout + done.stderr)
    assert found, done.stderr
    return float(found[1]), re.sub(r"(?s).*, peak memory [^,]*, ", "", done.stderr).strip()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        file, folder = f"{name}/model.squizd", f"{name}/mlx"
        subprocess.run(
            [sys.executable, "-m", "squizd.cli", "compress", args.model, "-o", file, "--quantizer", "minmax"],
            check=True, capture_output=True,
        )  # fmt: skip
        subprocess.run(
            [sys.executable, "-m", "mlx_lm", "convert", "--hf-path", args.model, "--mlx-path", folder, "-q"],
            check=True, capture_output=True,
        )  # fmt: skip
        count = str(args.tokens)
        ours = ["squizd.cli", "run", file, "--no-chat", "-n", count, "-p", PROMPT, "--resident"]
        theirs = ["mlx_lm", "generate", "--model", folder, "--ignore-chat-template", "--max-tokens"]
        speeds: dict[str, list[float]] = {side: [] for side in (*SHARES, PLAIN, "mlx_lm")}
        said: dict[str, str] = {}
        for _ in range(args.repeats):
            for side in (*SHARES, PLAIN):
                command = [*ours, side.split()[0]]
                speed, said[side] = decode_speed(command, r"([\d.]+) tokens/s", "0" if side == PLAIN else "1")
                speeds[side].append(speed)
            # mlx-lm is several times slower: fewer tokens give the same rate.
            short = [*theirs, str(max(20, args.tokens // 4)), "--prompt", PROMPT, "--temp", "0"]
            speeds["mlx_lm"].append(decode_speed(short, r"Generation:.*?([\d.]+) tokens-per-sec")[0])
        median = {side: statistics.median(values) for side, values in speeds.items()}
        ratios = {f"{share} / 100%": median[share] / median["100%"] for share in SHARES[1:]}
        ratios |= {f"100% / {side}": median["100%"] / median[side] for side in (PLAIN, "mlx_lm")}
        result = {"tokens_per_second": median, "ratios": ratios, "arithmetic": said}
        print(json.dumps({**result, "file_bytes": Path(file).stat().st_size}))


if __name__ == "__main__":
    main()
