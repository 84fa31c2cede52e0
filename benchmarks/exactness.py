"""Are the answers the same? Logits at every residency against each other, against mlx-lm, against transformers.

    python benchmarks/exactness.py --model CHECKPOINT --text eval.jsonl

Compresses CHECKPOINT three times (default recipe, 4-bit min-max, keep) into a temporary folder, then compares twice,
each time in a process of its own: through MLX (SQUIZD_KERNELS=0), where logits must be mlx-lm's bit for bit, and
with squizd's kernels where they can be used, whose sums have another order: within 1e-5 of the largest logit
of mlx-lm's. Residencies must agree bit for bit with each other both times. Prints one JSON line; exits 1 if
anything differs that must not. The comparison with transformers needs torch and is left out, saying so,
where that is not installed.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
from mlx.utils import tree_map

import squizd
from squizd import kernels
from squizd.kernels import layers
from squizd.runtime import device
from squizd.runtime.load import state

SHARES = ("100%", "50%", "25%", "0%")
FILES: dict[str, dict[str, str]] = {"int4": {}, "minmax": {"quantizer": "minmax"}, "keep": {"recipe": "keep"}}
LARGEST_WITH_KERNELS = 1e-5


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
    """Logits of mlx-lm's own 4-bit conversion, computed in float32 by MLX."""
    from mlx_lm.convert import convert

    if not folder.exists():
        convert(hf_path=checkpoint, mlx_path=str(folder), quantize=True)
    model = mlx_lm.load(str(folder))[0]
    model.update(
        tree_map(lambda a: a.astype(mx.float32) if mx.issubdtype(a.dtype, mx.floating) else a, model.parameters())
    )
    with layers.switched_off():  # where the kernels are used, they have replaced functions of MLX for the whole process
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


def compare(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All comparisons with what computes in this process."""
    tokenizer = squizd.load(folder / "int4.squizd", resident="0%")[1]
    prompts = [tokenizer.encode(text)[: args.tokens] for text in texts(args.text, args.count)]
    result: dict[str, Any] = {"arithmetic": device.arithmetic(), "texts": len(prompts)}
    result |= {"tokens": sum(map(len, prompts)), "hit_rate": {}, "bit_identical": {}}
    reference: list[np.ndarray] = []
    for share in SHARES:
        found, result["hit_rate"][share] = from_squizd(str(folder / "int4.squizd"), prompts, share)
        reference = reference or found
        result["bit_identical"][share] = same(found, reference)
    minmax, _ = from_squizd(str(folder / "minmax.squizd"), prompts, "25%")
    theirs = from_mlx_lm(args.model, folder / "mlx", prompts)
    result["equals_mlx_lm"], result["from_mlx_lm"] = same(minmax, theirs), relative(minmax, theirs)
    close = result["equals_mlx_lm"] if kernels.missing() else result["from_mlx_lm"] < LARGEST_WITH_KERNELS
    passed = all(result["bit_identical"].values()) and close
    if importlib.util.find_spec("torch"):
        kept, _ = from_squizd(str(folder / "keep.squizd"), prompts, "50%")
        result["keep_vs_transformers"] = relative(kept, from_transformers(args.model, prompts))
        passed = passed and result["keep_vs_transformers"] < 1e-3
    else:
        result["keep_vs_transformers"] = "not measured: torch is not installed"
    return {"passed": passed, **result}


def in_a_process(folder: Path, kernels_wanted: str) -> dict[str, Any]:
    """`compare` in another process: SQUIZD_KERNELS is read once in each."""
    command = [sys.executable, __file__, *sys.argv[1:], "--files", str(folder)]
    env = {**os.environ, "SQUIZD_KERNELS": kernels_wanted}
    found: dict[str, Any] = json.loads(
        subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1]
    )
    return found


def main() -> None:
    """Run all comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--count", type=int, default=32, help="texts (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=128, help="of each text (default: %(default)s)")
    parser.add_argument("--files", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.files:
        print(json.dumps(compare(args, args.files)))
        return
    with tempfile.TemporaryDirectory() as name:
        for out, options in FILES.items():
            squizd.compress(args.model, Path(name) / f"{out}.squizd", **options)
        result = {"mlx": in_a_process(Path(name), "0")}
        with_kernels = in_a_process(Path(name), "1")
        why = with_kernels["arithmetic"]
        result["kernels"] = with_kernels if why.startswith("squizd") else {"passed": True, "not_compared": why}
    print(json.dumps(result))
    sys.exit(not all(side["passed"] for side in result.values()))


if __name__ == "__main__":
    main()
