"""Write a `.squizd` file with a real model's shapes and random weights, streamed: a big file with little memory.

For measuring memory and paging where no real model of that size is at hand. The answers are noise,
but every byte is a valid 4-bit block, so the file passes `squizd validate --deep`.

    python tools/make_synthetic.py big.squizd --size 3GB
    python tools/make_synthetic.py qwen3-30b.squizd --like qwen3-30b-a3b
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from squizd.container import Plan, Writer
from squizd.container.layout import Encoding, MoeLayer, Tensor, make_layout, place
from squizd.container.writer import TensorPlan

_BLOCK = 1 << 22  # random bytes that records are cut from


@dataclass(frozen=True)
class Shape:
    """The dimensions of a Qwen3-MoE model."""

    hidden: int = 1024
    layers: int = 24
    heads: int = 16
    kv_heads: int = 4
    head_dim: int = 64
    experts: int = 64
    top_k: int = 8
    width: int = 512
    vocabulary: int = 16384

    def config(self) -> dict[str, object]:
        """The config.json of such a model."""
        return {
            "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": self.hidden,
            "num_hidden_layers": self.layers, "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim, "num_experts": self.experts, "num_experts_per_tok": self.top_k,
            "moe_intermediate_size": self.width, "intermediate_size": 4 * self.width, "vocab_size": self.vocabulary,
            "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True, "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0, "tie_word_embeddings": True, "max_position_embeddings": 32768,
            "torch_dtype": "bfloat16",
        }  # fmt: skip

    def expert_bytes(self, bits: int) -> int:
        """Stored bytes of one expert at `bits`, groups of 64, 16-bit scales and biases."""
        return 3 * self.hidden * self.width * (2 * bits + 1) // 16


SHAPES = {"qwen3-30b-a3b": Shape(2048, 48, 32, 4, 128, 128, 8, 768, 151936), "small": Shape()}


def plan(shape: Shape, bits: int, bundle: dict[str, bytes]) -> Plan:
    """What the file will hold: everything affine at `bits`, routers at 8."""
    low, high, raw = Encoding("affine", "bf16", bits, 64), Encoding("affine", "bf16", 8, 64), Encoding("raw", "bf16")
    residents: list[TensorPlan] = [("model.embed_tokens.weight", "embedding", low, (shape.vocabulary, shape.hidden))]
    for i in range(shape.layers):
        at, attention = f"model.layers.{i}", f"model.layers.{i}.self_attn"
        query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        residents += [
            (f"{attention}.q_proj.weight", "attention", low, (query, shape.hidden)),
            (f"{attention}.k_proj.weight", "attention", low, (key, shape.hidden)),
            (f"{attention}.v_proj.weight", "attention", low, (key, shape.hidden)),
            (f"{attention}.o_proj.weight", "attention", low, (shape.hidden, query)),
            (f"{attention}.q_norm.weight", "norm", raw, (shape.head_dim,)),
            (f"{attention}.k_norm.weight", "norm", raw, (shape.head_dim,)),
            (f"{at}.input_layernorm.weight", "norm", raw, (shape.hidden,)),
            (f"{at}.post_attention_layernorm.weight", "norm", raw, (shape.hidden,)),
            (f"{at}.mlp.gate.weight", "router", high, (shape.experts, shape.hidden)),
        ]
    residents.append(("model.norm.weight", "norm", raw, (shape.hidden,)))
    layout = make_layout(
        [(f"{p}_proj.weight", "expert", low, (shape.width, shape.hidden)) for p in ("gate", "up")]
        + [("down_proj.weight", "expert", low, (shape.hidden, shape.width))]
    )
    return Plan(
        {
            "model": {"config": shape.config()},
            "recipe": {"name": f"int{bits}"},
            "provenance": {"tool": "make_synthetic"},
        },
        residents,
        bundle,
        [layout],
        [MoeLayer(i, f"model.layers.{i}.mlp.switch_mlp", shape.experts) for i in range(shape.layers)],
        [[0] * shape.experts for _ in range(shape.layers)],
    )


def parts(tensor: Tensor, random: np.ndarray, at: int) -> list[np.ndarray]:
    """Random codes with scales and biases that give weights of about the usual size; norms are 1."""
    if tensor.encoding.mode == "raw":
        return [np.full(tensor.shape, 0x3F80, np.uint16)]
    start = at % (len(random) // 2)
    codes = (
        np.resize(random[start:], tensor.codes[1])
        if tensor.codes[1] > len(random) - start
        else random[start : start + tensor.codes[1]]
    )
    groups = tensor.scales[1] // 2
    step = 0.06 / (2**tensor.encoding.bits - 1)
    bf16 = np.float32([step, -0.03]).view(np.uint32) >> 16
    return [codes, np.full(groups, bf16[0], np.uint16), np.full(groups, bf16[1], np.uint16)]


def write(path: str, shape: Shape, bits: int, tokenizer: Path | None) -> None:
    """Write the file record by record; memory holds one record and a block of random bytes."""
    names = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
    bundle = {n: (tokenizer / n).read_bytes() for n in names if tokenizer and (tokenizer / n).is_file()}
    random = np.random.default_rng(0).integers(0, 256, _BLOCK, np.uint8)
    todo = plan(shape, bits, bundle)
    with Writer(path, todo) as writer, tqdm(total=writer.total_bytes, unit="B", unit_scale=True, disable=None) as bar:
        for position in range(writer.total):
            if writer.has(position):
                continue
            resident = position < len(todo.residents)
            tensors = (place(*todo.residents[position])[0],) if resident else todo.layouts[0].tensors
            writer.write([parts(t, random, 7919 * position + 101 * i) for i, t in enumerate(tensors)], position)
            bar.update(writer.done_bytes - bar.n)
        writer.finish()


def main() -> None:
    """Parse the arguments and write the file; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output")
    parser.add_argument("--like", choices=sorted(SHAPES), default="small", help="whose shapes (default: %(default)s)")
    parser.add_argument("--size", help="scale the number of layers to about this many bytes, as 3GB")
    parser.add_argument("--bits", type=int, default=4, choices=(2, 3, 4, 5, 6, 8))
    parser.add_argument("--tokenizer", type=Path, default=Path(__file__).parent.parent / "fixtures" / "tiny-moe")
    args = parser.parse_args()
    shape = SHAPES[args.like]
    if args.size:
        from squizd.runtime.budget import parse_size

        shape = replace(
            shape, layers=max(1, round(parse_size(args.size) / (shape.expert_bytes(args.bits) * shape.experts)))
        )
    write(args.output, shape, args.bits, args.tokenizer)
    print(json.dumps({"path": args.output, "bytes": Path(args.output).stat().st_size, "layers": shape.layers}))


if __name__ == "__main__":
    main()
