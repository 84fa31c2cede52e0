"""How fast is decode at each residency, against MLX's arithmetic and mlx-lm? From a checkpoint, in turns.

    python benchmarks/decode.py --model CHECKPOINT

Compresses CHECKPOINT at 4 bits (min-max, the bits of `mlx_lm.convert`), then holds the trials of `squizd bench` between
four residencies, squizd through MLX (SQUIZD_KERNELS=0, whose logits are mlx-lm's in float32 bit for bit), and mlx-lm
with the same tensors in the checkpoint's type. Prints medians and ratios of each round as one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import squizd
from squizd.measuring import PROMPT
from squizd.runtime.load import load_tokenizer
from squizd.sides import Side
from squizd.trials import compare, rate, ratios

SHARES = ("100%", "50%", "25%", "0%")
PLAIN, RIVAL = "100% through MLX", "mlx-lm"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        file = f"{name}/model.squizd"
        squizd.compress(args.model, file, quantizer="minmax")
        prompt = list(load_tokenizer(file).encode(PROMPT))
        sides = [Side(share, "squizd", file, resident=share) for share in SHARES]
        sides += [Side(PLAIN, "squizd", file, resident="100%", kernels=False), Side(RIVAL, "mlx-lm", file)]
        found, facts = compare(sides, prompt, args.tokens, args.repeats)
        size = Path(file).stat().st_size
    against = {f"{share} / 100%": ratios(found[share], found["100%"], rate) for share in SHARES[1:]}
    against |= {f"100% / {side}": ratios(found["100%"], found[side], rate) for side in (PLAIN, RIVAL)}
    result = {
        "tokens_per_second": {side: round(statistics.median(map(rate, trials)), 1) for side, trials in found.items()},
        "ratios": against,
        "arithmetic": {side: said["arithmetic"] for side, said in facts.items()},
        "file_bytes": size,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
