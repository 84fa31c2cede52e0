"""A Qwen3-MoE checkpoint as GGUF, for llama.cpp: `python benchmarks/gguf_file.py FOLDER OUT.gguf [F16|Q4_0]`.

Weights only (the vocabulary is a list of placeholders): benchmarks/cpu.py feeds token ids. Needs `pip install gguf`;
bfloat16 is read through its bits. Norms and routers stay float32, as llama.cpp keeps them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gguf  # type: ignore[import-not-found]
import numpy as np

NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate": "ffn_gate_inp",
}  # fmt: skip


def tensors(folder: Path) -> dict[str, Any]:
    """Every tensor as float32."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        raw = path.read_bytes()
        size = int.from_bytes(raw[:8], "little")
        for name, entry in json.loads(raw[8 : 8 + size]).items():
            if name == "__metadata__":
                continue
            begin, end = (8 + size + at for at in entry["data_offsets"])
            stored = np.frombuffer(raw[begin:end], {"BF16": "<u2", "F16": "<f2", "F32": "<f4"}[entry["dtype"]])
            if entry["dtype"] == "BF16":
                stored = (stored.astype(np.uint32) << 16).view(np.float32)
            found[name] = stored.astype(np.float32).reshape(entry["shape"])
    return found


def main(folder: Path, out: str, kind: str) -> None:
    config, weights = json.loads((folder / "config.json").read_text()), tensors(folder)
    writer = gguf.GGUFWriter(out, "qwen3moe")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    count = config["vocab_size"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"<{i}>" for i in range(count)])
    writer.add_token_types([1] * count)
    writer.add_token_merges(["<0> <1>"])

    def add(name: str, array: Any) -> None:
        if array.ndim == 1 or "ffn_gate_inp" in name:
            writer.add_tensor(name, array)
        elif kind == "F16":
            writer.add_tensor(name, array.astype(np.float16))
        else:
            quantized = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quants.quantize(array, quantized), raw_dtype=quantized)

    add("token_embd.weight", weights["model.embed_tokens.weight"])
    add("output_norm.weight", weights["model.norm.weight"])
    if "lm_head.weight" in weights:
        add("output.weight", weights["lm_head.weight"])
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        for theirs, name in NAMES.items():
            add(f"blk.{layer}.{name}.weight", weights[f"{at}{theirs}.weight"])
        for part in ("gate", "up", "down"):
            each = [weights[f"{at}mlp.experts.{e}.{part}_proj.weight"] for e in range(config["num_experts"])]
            add(f"blk.{layer}.ffn_{part}_exps.weight", np.stack(each))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else "F16")
