"""What `compress` stores, against mlx-lm's own quantized tensors and the checkpoint's literal bytes."""

from __future__ import annotations

import gc
import hashlib
import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import contents
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model, quantize_model, save_config, save_model
from safetensors.numpy import save_file

import squizd
from squizd.checkpoint import open_checkpoint
from squizd.errors import OutputError, RecipeError, SourceError
from squizd.walk import Walk

Make = Callable[..., Path]


def source_tensors(folder: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Every tensor's type, shape and bytes, read as the safetensors format says, by nobody's library."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        for name, entry in json.loads(data[8 : 8 + length]).items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                found[name] = (entry["dtype"], entry["shape"], data[8 + length + start : 8 + length + end])
    return found


def stored_parts(path: Path) -> dict[str, bytes]:
    """Every part that a file holds by the name mlx-lm gives it, an expert's with its number in brackets."""
    found = dict[str, bytes]()

    def add(name: str, tensor: Any, raw: Any) -> None:
        name, bracket, expert = name.partition("[")
        for part, offset, size in tensor.parts:
            leaf = name if part == "codes" else f"{name.removesuffix('weight')}{part}"
            found[leaf + bracket + expert] = bytes(raw[offset : offset + size])

    with squizd.open(path) as f:
        for name, (tensor, record) in f.residents.items():
            add(name, tensor, f.read(record, name))
        for layer in f.moe_layers:
            for expert in range(layer.expert_count):
                raw = f.read_expert(layer.layer, expert)
                for tensor in f.layouts[f.expert(layer.layer, expert).layout].tensors:
                    add(f"{layer.path}.{tensor.name}[{expert}]", tensor, raw)
    return found


def array_parts(arrays: dict[str, mx.array], stacked: str = ".switch_mlp.") -> dict[str, bytes]:
    """The same from a model's arrays: the first axis of what `stacked` names is the expert."""
    found = dict[str, bytes]()
    for name, array in arrays.items():
        raw = bytes(memoryview(mx.contiguous(array).reshape(-1).view(mx.uint8)))
        if stacked in name:
            size = len(raw) // len(array)
            found |= {f"{name}[{i}]": raw[i * size : (i + 1) * size] for i in range(len(array))}
        else:
            found[name] = raw
    return found


def encodings(path: Path) -> dict[str, str]:
    """How each tensor is stored, experts by their module's path."""
    with squizd.open(path) as f:
        found = {name: str(tensor.encoding) for name, (tensor, _) in f.residents.items()}
        for layer in f.moe_layers:
            tensors = f.layouts[f.expert(layer.layer, 0).layout].tensors
            found |= {f"{layer.path}.{t.name}": str(t.encoding) for t in tensors}
        return found


def roles(path: Path) -> dict[str, str]:
    with squizd.open(path) as f:
        found = {name: tensor.role for name, (tensor, _) in f.residents.items()}
        return found | {f"{x.path}.{t.name}": t.role for x in f.moe_layers for t in f.layouts[0].tensors}


# Values


def test_int4_minmax_is_what_mlx_lm_quantizes(tiny: Path, tiny_file: Make) -> None:
    model, config = load_model(tiny, lazy=True)
    quantize_model(model, config, 64, 4)
    assert stored_parts(tiny_file("int4", "minmax")) == array_parts(dict(tree_flatten(model.parameters())))


def test_mxfp4_is_what_mlx_lm_quantizes(tiny: Path, tiny_file: Make) -> None:
    model, config = load_model(tiny, lazy=True)
    quantize_model(model, config, 32, 4, mode="mxfp4", quant_predicate=lambda path, _: not path.endswith("mlp.gate"))
    expected = array_parts(dict(tree_flatten(model.parameters())))
    stored = stored_parts(tiny_file("mxfp4", "minmax", ["*.mlp.gate=keep"]))
    assert stored == expected


def test_keep_is_the_checkpoints_own_bytes(tiny: Path, tiny_file: Make) -> None:
    expected = {}
    for name, (dtype, _, data) in source_tensors(tiny).items():
        assert dtype == "BF16"
        before, found, after = name.partition(".experts.")
        expert, _, rest = after.partition(".")
        expected[f"{before}.switch_mlp.{rest}[{expert}]" if found else name] = data
    assert stored_parts(tiny_file("keep")) == expected


@pytest.mark.parametrize(
    ("recipe", "quantizer", "stored_as", "bound"),
    [
        ("int8", "minmax", "affine 8-bit g64 (bf16)", 0.008),
        ("int4", "minmax", "affine 4-bit g64 (bf16)", 0.1),
        ("int3", "minmax", "affine 3-bit g64 (bf16)", 0.21),
        ("int2", "minmax", "affine 2-bit g64 (bf16)", 0.43),
        ("mixed", "minmax", "affine 4-bit g64 (bf16)", 0.1),
        ("mixed3", "minmax", "affine 3-bit g64 (bf16)", 0.21),
        ("mixed2", "minmax", "affine 2-bit g64 (bf16)", 0.43),
        ("mxfp4", "minmax", "mxfp4 4-bit g32 (bf16)", 0.13),
        ("int4", "mse", "affine 4-bit g64 (bf16)", 0.09),
        ("int2", "mse", "affine 2-bit g64 (bf16)", 0.36),
    ],
)
def test_every_recipe_stays_near_the_source(
    recipe: str, quantizer: str, stored_as: str, bound: float, tiny: Path, tiny_file: Make
) -> None:
    name = "model.layers.3.mlp.experts.7.down_proj.weight"
    _, shape, data = source_tensors(tiny)[name]
    source = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32).reshape(shape)
    with squizd.open(tiny_file(recipe, quantizer)) as f:
        stored = f.expert_arrays(3, 7)["down_proj.weight"]
        assert {str(t.encoding) for t in f.layouts[0].tensors} == {stored_as}
    error = np.sqrt(np.mean((stored - source) ** 2) / np.mean(source**2))
    assert 0 < error < bound


# Checkpoints that come quantized


@pytest.mark.parametrize("how", ["affine", "mixed bits", "mxfp4", "nvfp4 with a global scale"])
def test_a_quantized_mlx_checkpoint_passes_untouched(how: str, tiny: Path, tmp_path: Path) -> None:
    model, config = load_model(tiny, lazy=True)
    options: dict[str, Any] = {"group_size": None, "bits": None}
    match how:
        case "affine":
            options |= {"group_size": 32, "bits": 3}
        case "mixed bits":
            wide = {"group_size": 64, "bits": 6}
            options["quant_predicate"] = lambda path, _: wide if "down_proj" in path else "gate" not in path
        case "mxfp4":
            options["mode"] = "mxfp4"
        case _:
            options |= {"mode": "nvfp4", "global_scale": True}
    model, config = quantize_model(model, config, **options)
    folder = tmp_path / "quantized"
    save_model(folder, model)
    save_config(config, folder / "config.json")

    assert squizd.compress(folder, tmp_path / "x.squizd", recipe="int2").recipe == "keep"
    expected = dict[str, bytes]()
    for name, (_, shape, data) in source_tensors(folder).items():
        size = len(data) // shape[0]
        pieces = {f"{name}[{i}]": data[i * size : (i + 1) * size] for i in range(shape[0])}
        expected |= pieces if ".switch_mlp." in name else {name: data}
    assert stored_parts(tmp_path / "x.squizd") == expected
    with squizd.open(tmp_path / "x.squizd") as f:
        assert not {"quantization", "quantization_config"} & f.metadata["model"]["config"].keys()
        assert f.metadata["recipe"]["name"] == "keep"
    assert squizd.validate(tmp_path / "x.squizd", deep=True).ok


@pytest.mark.parametrize(
    ("mode", "change", "says"),
    [
        ("affine", {"vocab_size": 1024}, "and its scales do not make affine 4-bit g64 (bf16) of shape [1024, 128]"),
        (
            "affine",
            {"moe_intermediate_size": 192},
            "and its scales do not make affine 4-bit g64 (bf16) of shape [32, 1",
        ),
        ("affine", {"hidden_size": 192}, "is stored as affine 2-bit g96 (bf16), which the format does not know"),
        ("mxfp4", {"hidden_size": 192}, "cannot tell how model.embed_tokens.weight is quantized"),
    ],
)
def test_codes_that_do_not_fit_the_model_are_an_error(
    mode: str, change: dict[str, int], says: str, tiny: Path, tmp_path: Path
) -> None:
    model, config = load_model(tiny, lazy=True)
    _, config = quantize_model(model, config, None, None, mode=mode)
    save_model(tmp_path, model)
    save_config(config | change, tmp_path / "config.json")
    with pytest.raises(SourceError) as caught:
        squizd.compress(tmp_path, tmp_path / "x.squizd")
    assert says in str(caught.value)


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_foreign_quantization_is_refused_by_name(method: str, checkpoint: Path, tmp_path: Path) -> None:
    change_config(checkpoint, quantization_config={"quant_method": method})
    with pytest.raises(SourceError, match=f"{method}-quantized"):
        squizd.compress(checkpoint, tmp_path / "x.squizd")


# Other architectures: tiny random checkpoints under the names that the hub uses


def write_checkpoint(folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")


def drawn(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {name: generator.standard_normal(shape).astype(np.float16) for name, shape in shapes.items()}


COMMON = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "rms_norm_eps": 1e-6}


def attention_and_norms(layer: int) -> dict[str, tuple[int, ...]]:
    prefix = f"model.layers.{layer}"
    projections = {f"{prefix}.self_attn.{p}_proj.weight": (64, 64) for p in "qkvo"}
    return projections | {f"{prefix}.{n}_layernorm.weight": (64,) for n in ("input", "post_attention")}


def swiglu(prefix: str, inner: int, names: tuple[str, str, str]) -> dict[str, tuple[int, ...]]:
    shapes = ((inner, 64), (64, inner), (inner, 64))
    return {f"{prefix}.{name}.weight": shape for name, shape in zip(names, shapes, strict=True)}


ENDS = {"model.embed_tokens.weight": (96, 64), "model.norm.weight": (64,), "lm_head.weight": (96, 64)}
PROJECTIONS = ("gate_proj", "down_proj", "up_proj")


def kept(folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
    """The checkpoint compressed with `keep`, and, to see that it can be, with `int4`."""
    write_checkpoint(folder / "source", config, tensors)
    squizd.compress(folder / "source", folder / "int4.squizd", quantizer="minmax")
    assert squizd.validate(folder / "int4.squizd", deep=True).ok
    squizd.compress(folder / "source", folder / "keep.squizd", recipe="keep")
    return folder / "keep.squizd"


def test_mixtral(tmp_path: Path) -> None:
    shapes: dict[str, tuple[int, ...]] = dict(ENDS)
    for layer in range(2):
        moe = f"model.layers.{layer}.block_sparse_moe"
        shapes |= attention_and_norms(layer) | {f"{moe}.gate.weight": (3, 64)}
        for expert in range(3):
            shapes |= swiglu(f"{moe}.experts.{expert}", 128, ("w1", "w2", "w3"))
    tensors = drawn(shapes)
    more = {"model_type": "mixtral", "intermediate_size": 128, "num_local_experts": 3, "num_key_value_heads": 2}
    path = kept(tmp_path, COMMON | more, tensors)
    found = roles(path)
    assert found["model.layers.1.block_sparse_moe.gate.weight"] == "router"
    assert found["model.layers.1.block_sparse_moe.switch_mlp.up_proj.weight"] == "expert"
    assert found["lm_head.weight"] == "head"
    with squizd.open(path) as f:
        assert [(x.layer, x.expert_count) for x in f.moe_layers] == [(0, 3), (1, 3)]
        for layer, expert in ((0, 0), (1, 2)):
            arrays = f.expert_arrays(layer, expert)
            for w, name in zip(("w1", "w2", "w3"), PROJECTIONS, strict=True):
                source = tensors[f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{w}.weight"]
                np.testing.assert_array_equal(arrays[f"{name}.weight"], source)


def test_qwen2_moe_has_a_shared_expert(tmp_path: Path) -> None:
    shapes: dict[str, tuple[int, ...]] = dict(ENDS)
    for layer in range(2):
        mlp = f"model.layers.{layer}.mlp"
        shapes |= attention_and_norms(layer) | {
            f"{mlp}.gate.weight": (4, 64),
            f"{mlp}.shared_expert_gate.weight": (1, 64),
        }
        shapes |= {f"model.layers.{layer}.self_attn.{p}_proj.bias": (64,) for p in "qkv"}
        shapes |= swiglu(f"{mlp}.shared_expert", 96, PROJECTIONS)
        for expert in range(4):
            shapes |= swiglu(f"{mlp}.experts.{expert}", 32, PROJECTIONS)
    tensors = drawn(shapes)
    more = {"model_type": "qwen2_moe", "intermediate_size": 96, "num_experts": 4, "num_experts_per_tok": 2}
    more |= {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 96}
    path = kept(tmp_path, COMMON | more, tensors)
    found = roles(path)
    assert found["model.layers.0.mlp.gate.weight"] == "router"
    assert found["model.layers.0.mlp.shared_expert.down_proj.weight"] == "shared"
    assert found["model.layers.0.self_attn.q_proj.bias"] == "attention"
    with squizd.open(path) as f:
        for name in ("model.layers.1.mlp.shared_expert.up_proj.weight", "model.layers.0.self_attn.k_proj.bias"):
            np.testing.assert_array_equal(f.array(name), tensors[name])
        np.testing.assert_array_equal(
            f.expert_arrays(1, 3)["down_proj.weight"], tensors["model.layers.1.mlp.experts.3.down_proj.weight"]
        )
    stored = encodings(tmp_path / "int4.squizd")
    assert stored["model.layers.0.mlp.switch_mlp.up_proj.weight"] == "affine 4-bit g64 (f16)"
    assert stored["model.layers.0.mlp.switch_mlp.down_proj.weight"] == "affine 4-bit g32 (f16)"  # rows of 32
    assert stored["model.layers.0.mlp.shared_expert.down_proj.weight"] == "affine 4-bit g32 (f16)"  # rows of 96


def test_deepseek_v3_has_a_dense_layer_first(tmp_path: Path) -> None:
    shapes: dict[str, tuple[int, ...]] = dict(ENDS)
    for layer in range(2):
        attention = f"model.layers.{layer}.self_attn"
        shapes |= {name: shape for name, shape in attention_and_norms(layer).items() if "layernorm" in name}
        shapes |= {f"{attention}.q_a_proj.weight": (32, 64), f"{attention}.q_a_layernorm.weight": (32,)}
        shapes |= {f"{attention}.q_b_proj.weight": (2 * 48, 32), f"{attention}.kv_b_proj.weight": (2 * 64, 64)}
        shapes |= {f"{attention}.kv_a_proj_with_mqa.weight": (64 + 16, 64), f"{attention}.kv_a_layernorm.weight": (64,)}
        shapes |= {f"{attention}.o_proj.weight": (64, 64)}
    shapes |= swiglu("model.layers.0.mlp", 96, PROJECTIONS) | swiglu(
        "model.layers.1.mlp.shared_experts", 32, PROJECTIONS
    )
    shapes |= {"model.layers.1.mlp.gate.weight": (4, 64), "model.layers.1.mlp.gate.e_score_correction_bias": (4,)}
    for expert in range(4):
        shapes |= swiglu(f"model.layers.1.mlp.experts.{expert}", 32, PROJECTIONS)
    tensors = drawn(shapes)
    more = {"model_type": "deepseek_v3", "intermediate_size": 96, "moe_intermediate_size": 32, "n_routed_experts": 4}
    more |= {"n_shared_experts": 1, "first_k_dense_replace": 1, "q_lora_rank": 32, "kv_lora_rank": 64, "v_head_dim": 32}
    more |= {"qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "num_key_value_heads": 2, "num_experts_per_tok": 2}
    path = kept(tmp_path, COMMON | more, tensors)
    found = roles(path)
    assert found["model.layers.0.mlp.up_proj.weight"] == "dense"
    assert found["model.layers.1.mlp.shared_experts.up_proj.weight"] == "shared"
    assert (
        found["model.layers.1.mlp.gate.weight"] == found["model.layers.1.mlp.gate.e_score_correction_bias"] == "router"
    )
    with squizd.open(path) as f:
        assert [(x.layer, x.expert_count) for x in f.moe_layers] == [(1, 4)]  # the decoder layer's own number
        bias = "model.layers.1.mlp.gate.e_score_correction_bias"
        np.testing.assert_array_equal(f.array(bias), tensors[bias])
        np.testing.assert_array_equal(
            f.expert_arrays(1, 2)["gate_proj.weight"], tensors["model.layers.1.mlp.experts.2.gate_proj.weight"]
        )


def test_gpt_oss_keeps_its_mxfp4_blocks(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = dict(ENDS)
    blocks = dict[str, np.ndarray]()
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        shapes |= attention_and_norms(layer) | {f"{prefix}.self_attn.{p}_proj.bias": (64,) for p in "qkvo"}
        shapes |= {f"{prefix}.self_attn.sinks": (2,), f"{prefix}.mlp.router.weight": (4, 64)}
        shapes |= {f"{prefix}.mlp.router.bias": (4,), f"{prefix}.mlp.experts.gate_up_proj_bias": (4, 2 * 32)}
        shapes |= {f"{prefix}.mlp.experts.down_proj_bias": (4, 64)}
        for name, rows, row in (("gate_up", 2 * 32, 64), ("down", 64, 32)):
            part = f"{prefix}.mlp.experts.{name}_proj"
            blocks[f"{part}_blocks"] = generator.integers(0, 256, (4, rows, row // 32, 16)).astype(np.uint8)
            blocks[f"{part}_scales"] = generator.integers(118, 128, (4, rows, row // 32)).astype(np.uint8)
    tensors = drawn(shapes) | blocks
    more = {"model_type": "gpt_oss", "intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2}
    more |= {"head_dim": 32, "num_key_value_heads": 2, "layer_types": ["sliding_attention", "full_attention"]}
    more |= {"quantization_config": {"quant_method": "mxfp4"}}
    path = kept(tmp_path, COMMON | more, tensors)
    for file in (path, tmp_path / "int4.squizd"):
        stored = stored_parts(file)
        experts = "model.layers.1.mlp.experts"
        for expert in range(4):
            codes, scales = (blocks[f"{experts}.gate_up_proj_{x}"][expert] for x in ("blocks", "scales"))
            for name, rows in (("gate_proj", slice(0, None, 2)), ("up_proj", slice(1, None, 2))):
                assert stored[f"{experts}.{name}.weight[{expert}]"] == codes[rows].tobytes()
                assert stored[f"{experts}.{name}.scales[{expert}]"] == scales[rows].tobytes()
            assert (
                stored[f"{experts}.down_proj.bias[{expert}]"] == tensors[f"{experts}.down_proj_bias"][expert].tobytes()
            )
    assert roles(path)["model.layers.0.mlp.router.bias"] == "router"
    with squizd.open(path) as f:
        nibbles = np.stack([blocks["model.layers.0.mlp.experts.down_proj_blocks"][3] >> s & 15 for s in (0, 4)], -1)
        values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])[nibbles.reshape(64, 1, 32)]
        scale = 2.0 ** (blocks["model.layers.0.mlp.experts.down_proj_scales"][3].astype(float) - 127)
        np.testing.assert_array_equal(
            f.expert_arrays(0, 3)["down_proj.weight"], (values * scale[..., None]).reshape(64, 32)
        )


# Overrides and rows that fit no group


def as_fp8(folder: Path, **facts: Any) -> dict[str, np.ndarray]:
    """Make linear layers of a checkpoint block-scaled E4M3, as they are published; returns what they decode to."""
    tensors: dict[str, np.ndarray] = {}
    meant = dict[str, np.ndarray]()
    for shard in sorted(folder.glob("*.safetensors")):
        for name, array in mx.load(str(shard)).items():  # type: ignore[union-attr]
            wide = np.array(array.astype(mx.float32)).astype(np.float64)
            if wide.ndim < 2 or "embed" in name or name.endswith("mlp.gate.weight"):
                tensors[name] = np.array(array.view(mx.uint16))
                continue
            rows, columns = wide.shape
            scale = np.zeros((-(-rows // 128), -(-columns // 128)), np.float32)
            codes, decoded = np.zeros(wide.shape, np.uint8), np.zeros(wide.shape)
            for i, j in np.ndindex(scale.shape):
                block = np.s_[128 * i : 128 * i + 128, 128 * j : 128 * j + 128]
                scale[i, j] = np.abs(wide[block]).max() / 448
                nearest = FINITE[np.searchsorted(MIDDLES, wide[block] / scale[i, j])]
                codes[block], decoded[block] = nearest, E4M3[nearest] * np.float64(scale[i, j])
            tensors |= {name: codes, f"{name}_scale_inv": scale}
            meant[name] = decoded
        shard.unlink()
    (folder / "model.safetensors.index.json").unlink()
    header, at = dict[str, Any](), 0
    for name, value in tensors.items():
        kind = {"uint8": "F8_E4M3", "uint16": "BF16", "float32": "F32"}[value.dtype.name]
        header[name] = {"dtype": kind, "shape": list(value.shape), "data_offsets": [at, at + value.nbytes]}
        at += value.nbytes
    text = json.dumps(header).encode()
    data = b"".join(v.tobytes() for v in tensors.values())
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    found = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    change_config(folder, quantization_config=found | facts)
    return meant


E4M3 = np.array([(-1) ** (b >> 7) * ((b & 7) / 8 + ((b >> 3 & 15) > 0)) * 2.0 ** (max(b >> 3 & 15, 1) - 7)
                 if b & 127 != 127 else np.nan for b in range(256)])  # fmt: skip
FINITE = np.argsort(E4M3)[:-2]  # codes in the order of what they mean, without the two that mean nothing
MIDDLES = (E4M3[FINITE][1:] + E4M3[FINITE][:-1]) / 2


def test_block_scaled_fp8_is_read_as_what_it_means(checkpoint: Path, tmp_path: Path) -> None:
    meant = as_fp8(checkpoint)
    squizd.compress(checkpoint, tmp_path / "x", recipe="keep")
    stored = stored_parts(tmp_path / "x")
    for name, wide in meant.items():
        expert = re.fullmatch(r"(.*)\.experts\.(\d+)\.(\w+)\.weight", name)
        where = f"{expert[1]}.switch_mlp.{expert[3]}.weight[{expert[2]}]" if expert else name
        bits = np.frombuffer(stored[where], np.uint16).astype(np.uint32) << 16
        np.testing.assert_allclose(bits.view(np.float32).reshape(wide.shape), wide, rtol=2.0**-8)
    with squizd.open(tmp_path / "x") as f:
        assert "quantization_config" not in f.metadata["model"]["config"]
    squizd.compress(checkpoint, tmp_path / "int4", quantizer="minmax")
    assert set(encodings(tmp_path / "int4").values()) >= {"affine 4-bit g64 (bf16)"}


@pytest.mark.parametrize("block", [None, [64, 64]])
def test_fp8_without_blocks_or_with_others_is_refused(
    block: list[int] | None, checkpoint: Path, tmp_path: Path
) -> None:
    as_fp8(checkpoint, weight_block_size=block)
    with pytest.raises(SourceError, match="_scale_inv"):
        squizd.compress(checkpoint, tmp_path / "x")
    assert not list(tmp_path.glob("x*"))


def test_calibration_walks_through_mxfp4_experts_as_mlx_lm_does(tmp_path: Path) -> None:
    test_gpt_oss_keeps_its_mxfp4_blocks(tmp_path)
    folder = next(p.parent for p in tmp_path.rglob("config.json"))
    ids = [[5, 9, 3, 1, 7, 30, 2, 8], [4, 4, 11, 0, 6, 2, 9, 1]]
    walk = Walk(open_checkpoint(folder), ids)
    for _ in walk.layers():
        pass
    walk.widen_rest()
    found = walk.logits(walk.batches[0], walk.states[0])
    model, _ = load_model(folder)
    model.set_dtype(mx.float32)
    expected = model(mx.array(ids))
    assert float(mx.abs(found - expected).max()) < 1e-3 * float(mx.abs(expected).max())


def test_overrides_reach_what_they_name_and_nothing_else(tiny_file: Make) -> None:
    plain = encodings(tiny_file("int4"))
    changed = encodings(tiny_file("int4", overrides=["*.mlp.gate=keep", "*.0.*.down_proj=6g32", "model.embed*=nvfp4"]))
    expected = dict(plain)
    for layer in range(4):
        expected[f"model.layers.{layer}.mlp.gate.weight"] = "bf16"
    expected["model.layers.0.mlp.switch_mlp.down_proj.weight"] = "affine 6-bit g32 (bf16)"
    expected["model.embed_tokens.weight"] = "nvfp4 4-bit g16 (bf16)"
    assert changed == expected
    assert plain["model.layers.0.mlp.gate.weight"] == "affine 8-bit g64 (bf16)"
    assert plain["model.norm.weight"] == "bf16"


@pytest.mark.parametrize("pattern", ["*.no_such_proj", "model.norm"])
def test_an_override_without_effect_is_refused(pattern: str, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="matches no tensor"):
        squizd.compress(tiny, tmp_path / "x.squizd", overrides=[f"{pattern}=8"])
    assert not list(tmp_path.iterdir())


def test_rows_that_fit_no_group_are_kept_and_reported(tmp_path: Path) -> None:
    shapes: dict[str, tuple[int, ...]] = dict(ENDS)
    for layer in range(2):
        moe = f"model.layers.{layer}.block_sparse_moe"
        shapes |= attention_and_norms(layer) | {f"{moe}.gate.weight": (2, 64)}
        for expert in range(2):
            shapes |= swiglu(f"{moe}.experts.{expert}", 80, ("w1", "w2", "w3"))
    more = {"model_type": "mixtral", "intermediate_size": 80, "num_local_experts": 2, "num_key_value_heads": 2}
    write_checkpoint(tmp_path / "source", COMMON | more, drawn(shapes))
    summary = squizd.compress(tmp_path / "source", tmp_path / "x.squizd")
    paths = [f"model.layers.{layer}.block_sparse_moe.switch_mlp.down_proj.weight" for layer in range(2)]
    assert summary.unquantized == tuple(paths)
    stored = encodings(tmp_path / "x.squizd")
    assert [stored[path] for path in paths] == ["f16", "f16"]
    assert stored["model.layers.0.block_sparse_moe.switch_mlp.up_proj.weight"] == "affine 4-bit g64 (f16)"


# The file as a whole


@pytest.mark.parametrize("zstd", [False, True])
def test_the_same_source_gives_the_same_bytes_anywhere(
    zstd: bool, tiny: Path, checkpoint: Path, tmp_path: Path
) -> None:
    digests = set()
    for source, target in ((tiny, "a"), (tiny, "b"), (checkpoint, "c")):
        squizd.compress(source, tmp_path / target, quantizer="minmax" if zstd else "mse", zstd=zstd)
        digests.add(hashlib.sha256((tmp_path / target).read_bytes()).hexdigest())
    assert len(digests) == 1
    assert str(tmp_path).encode() not in (tmp_path / "c").read_bytes()


def test_zstd_changes_how_records_are_stored_not_what_they_are(tiny_file: Make) -> None:
    raw, packed = tiny_file("keep"), tiny_file("keep", zstd=True)
    assert contents(packed) == contents(raw)
    assert packed.stat().st_size < raw.stat().st_size
    assert squizd.validate(packed, deep=True).ok


def test_metadata_says_what_was_done_to_what(tiny: Path, checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    squizd.compress(checkpoint, tmp_path / "x.squizd", quantizer="minmax", overrides=["*.down_proj=6"])
    with squizd.open(tmp_path / "x.squizd") as f:
        assert f.metadata == {
            "model": {"config": json.loads((tiny / "config.json").read_text())},
            "recipe": {
                "name": "int4",
                "experts": "4g64",
                "routers": "8g64",
                "others": "4g64",
                "overrides": [["*.down_proj", "6g64"]],
                "quantizer": "minmax",
            },
            "provenance": {
                "tool": "squizd",
                "version": squizd.__version__,
                "source": {
                    "files": [
                        {"name": p.name, "size": p.stat().st_size, "sha256": hashlib.sha256(p.read_bytes()).hexdigest()}
                        for p in sorted(tiny.glob("*.safetensors"))
                    ]
                },
            },
            "licence": "apache-2.0",
        }
        assert f.bundle() == {
            name: (tiny / name).read_bytes()
            for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
        }


def test_the_summary_counts_what_is_there(tiny: Path, tmp_path: Path) -> None:
    seen = list[tuple[int, int]]()
    path = tmp_path / "x.squizd"
    summary = squizd.compress(tiny, path, quantizer="minmax", progress=lambda done, total: seen.append((done, total)))
    shapes = {name: shape for name, (_, shape, _) in source_tensors(tiny).items()}
    parameters = sum(int(np.prod(shape)) for shape in shapes.values())
    # 4 bits or, in routers, 8, and two bf16 numbers for 64 weights; what is not a matrix stays bf16.
    bits = sum(
        int(np.prod(shape)) * (16 if len(shape) == 1 else (8.5 if name.endswith("mlp.gate.weight") else 4.5))
        for name, shape in shapes.items()
    )
    assert summary.parameters == parameters
    assert summary.bits_per_weight == pytest.approx(bits / parameters, rel=1e-12)
    assert summary.source_bytes == sum(p.stat().st_size for p in tiny.glob("*.safetensors"))
    assert (summary.path, summary.file_bytes) == (str(path), path.stat().st_size)
    assert (summary.resumed, summary.unquantized) == (0, ())
    assert 0 < summary.seconds < 600
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[0][0] == 0
    assert {total for _, total in seen} == {seen[-1][0]}


def test_an_existing_file_is_replaced_only_when_told(tiny: Path, tmp_path: Path, tiny_file: Make) -> None:
    target = tmp_path / "x.squizd"
    target.write_bytes(b"precious")
    with pytest.raises(OutputError, match="exists"):
        squizd.compress(tiny, target)
    assert target.read_bytes() == b"precious"
    squizd.compress(tiny, target, quantizer="minmax", force=True)
    assert target.read_bytes() == tiny_file().read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["x.squizd"]


# Sources that do not fit


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def rewrite(folder: Path, change: Callable[[dict[str, mx.array]], Any]) -> None:
    """Put the checkpoint into one shard after `change`."""
    tensors: dict[str, mx.array] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors.update(mx.load(str(shard)))  # type: ignore[arg-type]
    change(tensors)
    mx.eval(tensors)
    for path in [*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"]:
        path.unlink()
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)


NORM, EXPERT = "model.layers.2.input_layernorm.weight", "model.layers.1.mlp.experts.5.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda t: t.pop(NORM), SourceError, f"has no tensor {NORM}"),
        (lambda t: t.pop(EXPERT), SourceError, "tensors do not fit qwen3_moe"),
        (lambda t: t.update(extra=mx.zeros(3)), SourceError, "tensor extra has no place in qwen3_moe"),
        (lambda t: t.update({NORM: mx.zeros(3)}), SourceError, NORM),
        (lambda t: t.update({EXPERT: mx.zeros((3, 3))}), SourceError, "tensors do not fit qwen3_moe"),
        (lambda t: t.update({NORM: mx.zeros(128, mx.complex64)}), SourceError, NORM),
        (lambda t: t.update({EXPERT: t[EXPERT] * float("nan")}), RecipeError, "layers.1.mlp.switch_mlp.up_proj.weight"),
    ],
    ids=["missing", "missing expert", "surplus", "misshapen", "misshapen expert", "complex", "not a number"],
)
def test_tensors_that_do_not_fit_are_an_error_that_names_them(
    change: Any, error: type[Exception], says: str, checkpoint: Path, tmp_path: Path
) -> None:
    rewrite(checkpoint, change)
    with pytest.raises(error) as caught:
        squizd.compress(checkpoint, tmp_path / "x.squizd")
    assert says in str(caught.value)
    assert not (tmp_path / "x.squizd").exists()


def test_a_type_that_mlx_lacks_is_an_error_that_names_the_shard(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"model_type": "mixtral"} | COMMON, {"model.norm.weight": np.zeros(64)})
    with pytest.raises(SourceError, match=r"model\.safetensors: MLX cannot read it"):
        squizd.compress(tmp_path, tmp_path / "x.squizd")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "no_such_model"}, "unknown architecture 'no_such_model'"),
        ({"model_type": "../../etc/passwd"}, "unknown architecture"),
        ({"model_file": "modeling.py"}, "wants to run its own code"),
        ({"num_hidden_layers": "four"}, "mlx-lm cannot build qwen3_moe"),
        ({"num_experts": 64}, "tensors do not fit qwen3_moe"),
        ({"num_experts": 16}, "has shape"),
        ({"num_hidden_layers": 3}, "has no place in qwen3_moe"),
        ({"hidden_size": 64}, "has shape"),
    ],
)
def test_a_config_that_does_not_fit_is_an_error(changes: dict[str, Any], says: str, checkpoint: Path) -> None:
    change_config(checkpoint, **changes)
    with pytest.raises(SourceError) as caught:
        squizd.compress(checkpoint, checkpoint / "x.squizd")
    assert says in str(caught.value)
    assert str(checkpoint) in str(caught.value)


@pytest.mark.parametrize("freezes", [False, True])
def test_the_garbage_collector_is_left_as_the_caller_had_it(freezes: bool, tiny: Path, tmp_path: Path) -> None:
    gc.unfreeze()
    if freezes:
        gc.freeze()
    squizd.compress(tiny, tmp_path / "x.squizd", quantizer="minmax")
    kept = gc.get_freeze_count()
    gc.unfreeze()
    assert gc.isenabled()
    assert (kept > 0) == freezes


def test_unknown_recipes_and_quantizers_are_refused_before_any_work(tmp_path: Path) -> None:
    for options in ({"recipe": "int5"}, {"quantizer": "best"}):
        with pytest.raises(RecipeError):
            squizd.compress(tmp_path / "nothing", tmp_path / "x.squizd", **options)
    shutil.rmtree(tmp_path)
