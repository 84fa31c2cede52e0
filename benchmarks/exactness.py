"""Are the answers the same? Logits at every residency against each other, against mlx-lm, against transformers.

    python benchmarks/exactness.py --model CHECKPOINT --text eval.jsonl

Compresses CHECKPOINT three times (default recipe, 4-bit min-max, keep) into a temporary folder. Prints
one JSON line; exits 1 if anything differs that must not. The comparison with transformers needs
torch and is left out, saying so, where that is not installed.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
from mlx.utils import tree_map

import squizd
from squizd.runtime.load import state

SHARES = ("100%", "50%", "25%", "0%")


def texts(path: Path, count: int) -> list[str]:
    """`count` texts spread evenly over the rows of a JSONL file."""
    rows = [json.loads(line)["text"] for line in path.read_text("utf-8").splitlines()]
    return [rows[i * len(rows) // count] for i in range(count)]


def logits(model: Any, prompts: list[list[int]]) -> list[np.ndarray]:
    """Float32 logits [tokens, vocabulary] of every prompt."""
    return [np.array(model(mx.array([ids]))[0].astype(mx.float32)) for ids in prompts]


def from_squizd(path: str, prompts: list[list[int]], share: str) -> tuple[list[np.ndarray], float]:
    """Logits at a residency, and the hit rate."""
    model, _ = squizd.load(path, resident=share)
    found, rate = logits(model, prompts), state(model).stats.hit_rate
    state(model).close()
    del model
    gc.collect()
    return found, rate


def from_mlx_lm(checkpoint: str, folder: Path, prompts: list[list[int]]) -> list[np.ndarray]:
    """Logits of mlx-lm's own 4-bit conversion, computed in float32."""
    from mlx_lm.convert import convert

    convert(hf_path=checkpoint, mlx_path=str(folder), quantize=True)
    model = mlx_lm.load(str(folder))[0]
    model.update(
        tree_map(lambda a: a.astype(mx.float32) if mx.issubdtype(a.dtype, mx.floating) else a, model.parameters())
    )
    return logits(model, prompts)


def from_transformers(checkpoint: str, prompts: list[list[int]]) -> list[np.ndarray]:
    """Logits of transformers in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        return [model(torch.tensor([ids])).logits[0].numpy() for ids in prompts]


def relative(a: list[np.ndarray], b: list[np.ndarray]) -> float:
    """The largest difference relative to the largest logit."""
    return max(float(np.abs(x - y).max() / np.abs(y).max()) for x, y in zip(a, b, strict=True))


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    """Bit for bit."""
    return all(np.array_equal(x.view(np.uint32), y.view(np.uint32)) for x, y in zip(a, b, strict=True))


def main() -> None:
    """Run all comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--count", type=int, default=32, help="texts (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=128, help="of each text (default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for out, options in (
            ("int4", {}),
            ("minmax", {"quantizer": "minmax"}),
            ("keep", {"recipe": "keep"}),
        ):
            squizd.compress(args.model, folder / f"{out}.squizd", **options)
        tokenizer = squizd.load(folder / "int4.squizd", resident="0%")[1]
        prompts = [tokenizer.encode(text)[: args.tokens] for text in texts(args.text, args.count)]
        result: dict[str, Any] = {"texts": len(prompts), "tokens": sum(map(len, prompts)), "hit_rate": {}}
        reference: list[np.ndarray] = []
        result["bit_identical"] = {}
        for share in SHARES:
            found, result["hit_rate"][share] = from_squizd(str(folder / "int4.squizd"), prompts, share)
            reference = reference or found
            result["bit_identical"][share] = same(found, reference)
        minmax, _ = from_squizd(str(folder / "minmax.squizd"), prompts, "25%")
        result["equals_mlx_lm"] = same(minmax, from_mlx_lm(args.model, folder / "mlx", prompts))
        passed = all(result["bit_identical"].values()) and result["equals_mlx_lm"]
        if importlib.util.find_spec("torch"):
            kept, _ = from_squizd(str(folder / "keep.squizd"), prompts, "50%")
            result["keep_vs_transformers"] = relative(kept, from_transformers(args.model, prompts))
            passed = passed and result["keep_vs_transformers"] < 1e-3
        else:
            result["keep_vs_transformers"] = "not measured: torch is not installed"
    print(json.dumps(result))
    sys.exit(not passed)


if __name__ == "__main__":
    main()
