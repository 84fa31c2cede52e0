"""Record which experts a model chooses, for `benchmarks/cuda.py`.

    python benchmarks/trace.py FILE.squizd --text eval.jsonl routes.npy [--tokens 4000]

Writes uint8 [tokens, layers, k], texts one after another.
"""

from __future__ import annotations

import argparse

import numpy as np

from squizd.corpus import read
from squizd.generation import encode
from squizd.runtime.load import load
from squizd.tracing import Routing, join, trace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("out")
    parser.add_argument("--text", required=True)
    parser.add_argument("--tokens", type=int, default=4000)
    options = parser.parse_args()
    model, tokenizer = load(options.file)
    texts = [encode(tokenizer, text)[:512] for text in read(options.text).texts]
    parts: list[Routing] = []
    for passages in trace(model, texts):
        parts += passages
        if sum(part.tokens for part in parts) >= options.tokens:
            break
    np.save(options.out, np.stack(join(parts).experts, 1).astype(np.uint8)[: options.tokens])


if __name__ == "__main__":
    main()
