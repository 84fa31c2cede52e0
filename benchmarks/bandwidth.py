"""Decode of a whole model against memory bandwidth: bytes of weights that a token needs, over its time.

    python tools/make_synthetic.py wide.squizd --like qwen3-30b-a3b --size 2GB
    python benchmarks/bandwidth.py wide.squizd [--threads 2] [--rounds 9]

All experts resident. A token needs every resident tensor (a tied embedding once, as output layer) and top-k experts of
each layer, as they lie in memory: codes, and scales and biases in float32. Memory is read by a compiled loop on as many
threads, in turns with decoding. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=20)
    options = parser.parse_args()
    os.environ["SQUIZD_THREADS"] = str(options.threads)
    import mlx.core as mx
    import numpy as np
    from kernels import reader
    from mlx.utils import tree_flatten
    from mlx_lm.models.cache import make_prompt_cache

    from squizd.kernels.build import find_compiler
    from squizd.runtime.load import load_model, state

    model = load_model(options.file, resident="100%")
    arrays = dict(tree_flatten(model.parameters()))
    layers = state(model).file.moe_layers
    experts = sum(a.nbytes for name, a in arrays.items() if any(name.startswith(x.path + ".") for x in layers))
    config = state(model).file.metadata["model"]["config"]
    used = experts * config["num_experts_per_tok"] / config["num_experts"]
    needed = sum(a.nbytes for a in arrays.values()) - experts + used

    cache = make_prompt_cache(model)
    mx.eval(model(mx.array([[11, 12, 13, 14]]), cache=cache))

    def decode() -> float:
        """Bytes of weights a second."""
        began = time.perf_counter()
        for i in range(options.tokens):
            mx.eval(model(mx.array([[17 * i % 5000 + 11]], mx.uint32), cache=cache))
        for entry in cache:
            entry.trim(options.tokens)
        return needed * options.tokens / (time.perf_counter() - began) / 1e9

    read, pool = reader(find_compiler()), ThreadPoolExecutor(options.threads)
    largest = np.array(max(arrays.values(), key=lambda a: a.nbytes), copy=False).reshape(-1)
    pieces = np.array_split(largest, options.threads)

    def memory() -> float:
        began = time.perf_counter()
        list(pool.map(lambda piece: read(piece.ctypes.data, piece.nbytes // 8), pieces))
        return largest.nbytes / (time.perf_counter() - began) / 1e9

    decode(), memory()
    pairs = [(decode(), memory()) for _ in range(options.rounds)]
    found = {name: [pair[i] for pair in pairs] for i, name in enumerate(("decode", "memory"))}
    result = {name: {"median": statistics.median(v), "best": max(v)} for name, v in found.items()}
    result["share"] = {key: result["decode"][key] / result["memory"][key] for key in ("median", "best")}
    rounded = {name: {key: round(x, 2) for key, x in v.items()} for name, v in result.items()}
    print(json.dumps({"benchmark": "bandwidth", "megabytes_per_token": round(needed / 1e6), "GB/s": rounded}))


if __name__ == "__main__":
    main()
