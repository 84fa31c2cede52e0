"""Every kind of architecture, paged, against mlx-lm's own logits on the same weights.

Bit for bit with SQUIZD_KERNELS=0, which `make check` sets for a second run. With squizd's kernels, bit for bit
against mlx-lm's graph on these kernels, and to 1e-5 of the largest logit against mlx-lm as it is.

`make_model` builds a tiny mlx-lm model with random weights; `write_file` stores its arrays as they are,
without squizd's compressor. Other tests of the runtime use both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP
from mlx_lm.utils import _get_classes
from mlx_lm.utils import load_model as load_mlx_model

from squizd import kernels
from squizd.container import Plan, Writer
from squizd.container.layout import RAW, ZSTD, Encoding, Layout, MoeLayer, make_layout
from squizd.errors import SourceError
from squizd.kernels import layers as kernel_layers
from squizd.quantizers.packing import pack
from squizd.runtime.device import accelerate, on_cpu
from squizd.runtime.load import load_model, state
from squizd.runtime.switch import PagedSwitch

WIDTHS = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 96, "rms_norm_eps": 1e-6}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "rope_theta": 10000.0, "max_position_embeddings": 512}
QWEN3 = {
    "model_type": "qwen3_moe", **WIDTHS, **HEADS, "head_dim": 16, "num_hidden_layers": 3, "num_experts": 8,
    "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1, "mlp_only_layers": [1],
    "norm_topk_prob": True, "tie_word_embeddings": True,
}  # fmt: skip
LATENT = {
    "kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 16, "v_head_dim": 32, "qk_nope_head_dim": 32,
    "n_group": 1, "topk_group": 1, "n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_moe": QWEN3,
    "qwen2_moe": {  # a shared expert beside the routed ones
        **QWEN3, "model_type": "qwen2_moe", "shared_expert_intermediate_size": 96,
    },
    "mixtral": {"model_type": "mixtral", **WIDTHS, **HEADS, "num_hidden_layers": 2, "num_local_experts": 8},
    "gpt_oss": {  # additive biases per expert, sliding windows, attention sinks
        "model_type": "gpt_oss", **WIDTHS, **HEADS, "head_dim": 16, "num_hidden_layers": 2, "num_local_experts": 8,
        "num_experts_per_tok": 2, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"],
    },
    "deepseek_v3": {  # latent attention, group routing, a dense first layer
        "model_type": "deepseek_v3", **WIDTHS, **HEADS, **LATENT, "num_hidden_layers": 3,
        "moe_intermediate_size": 32, "num_experts_per_tok": 2, "routed_scaling_factor": 1.0, "moe_layer_freq": 1,
    },
    "glm4_moe": {
        "model_type": "glm4_moe", **WIDTHS, **HEADS, **LATENT, "head_dim": 16, "num_hidden_layers": 2,
        "moe_intermediate_size": 32, "num_experts_per_tok": 2, "routed_scaling_factor": 1.0, "norm_topk_prob": True,
        "rope_scaling": None, "use_qk_norm": True, "tie_word_embeddings": False, "attention_bias": False,
        "partial_rotary_factor": 0.5,
    },
    "nemotron_h": {  # SwitchMLP; Mamba state, attention and experts in turn
        "model_type": "nemotron_h", **WIDTHS, **HEADS, "layer_norm_epsilon": 1e-6, "attention_bias": False,
        "mamba_num_heads": 4, "mamba_head_dim": 16, "mamba_proj_bias": False, "ssm_state_size": 16,
        "conv_kernel": 4, "n_groups": 2, "mlp_bias": False, "use_bias": False, "use_conv_bias": True,
        "hybrid_override_pattern": ["M", "*", "E", "E"], "head_dim": 16, "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 32, "n_group": 1, "topk_group": 1, "n_routed_experts": 8,
        "n_shared_experts": 1, "num_experts_per_tok": 2, "norm_topk_prob": True, "routed_scaling_factor": 1.0,
    },
    "phixtral": {  # SwitchMLP; unusual names in the config
        "model_type": "phixtral", "num_vocab": 96, "model_dim": 64, "num_heads": 4, "num_layers": 2,
        "rotary_dim": 8, "num_experts_per_tok": 2, "num_local_experts": 8,
    },
    "qwen3_next": {  # gated delta state that no token count can cut back
        **QWEN3, "model_type": "qwen3_next", "linear_num_value_heads": 4, "linear_num_key_heads": 2,
        "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_conv_kernel_dim": 4,
        "full_attention_interval": 2, "partial_rotary_factor": 0.5, "shared_expert_intermediate_size": 32,
    },
    "llama": {"model_type": "llama", **WIDTHS, **HEADS, "num_hidden_layers": 2},  # no experts at all
}  # fmt: skip
AFFINE = {"group_size": 32, "bits": 4, "mode": "affine"}
TOKENS = np.random.default_rng(3).integers(0, 96, (1, 40))

_DTYPES = {
    mx.float32: "f32", mx.float16: "f16", mx.bfloat16: "bf16", mx.uint32: "u32", mx.uint8: "u8", mx.int32: "i32",
}  # fmt: skip


def make_model(
    config: dict[str, Any],
    quantize: Callable[[str, nn.Module], bool | dict[str, Any]] | None = lambda path, module: dict(AFFINE),
    dtype: mx.Dtype = mx.bfloat16,
) -> nn.Module:
    """An mlx-lm model with random weights of `dtype`, quantized where `quantize(path, module)` says so."""
    model_class, args_class = _get_classes(config)
    mx.random.seed(7)
    model = model_class(args_class.from_dict(config))
    model.eval()
    model.update(tree_map(lambda a: (a + mx.random.normal(a.shape) * 0.05).astype(dtype), model.parameters()))
    if quantize is not None:
        nn.quantize(
            model,
            class_predicate=lambda path, module: (
                hasattr(module, "to_quantized") and module.weight.shape[-1] % 32 == 0 and quantize(path, module)
            ),
        )
    mx.eval(model.parameters())
    return model


def in_float32(model: nn.Module) -> nn.Module:
    """The same model computing in float32 and on the same kernels, as squizd does on CPU. Changes `model`."""
    widen = lambda a: a.astype(mx.float32) if mx.issubdtype(a.dtype, mx.floating) else a  # noqa: E731
    model.update(tree_map(widen, model.parameters()))
    accelerate(model)
    return model


def write_file(
    path: Path,
    model: nn.Module,
    config: dict[str, Any],
    *,
    codec: int = RAW,
    rename: Callable[[str], str | None] = lambda name: name,
    narrow: Callable[[str, int], int | None] = lambda name, expert: None,
) -> Path:
    """Store an mlx-lm model's arrays as a `.squizd` file; `rename` may change or drop (None) a tensor.

    `narrow(name, expert)`: bits of that expert's codes of a tensor, if fewer than the model's; the codes must fit.
    """
    parameters, modules = dict(tree_flatten(model.parameters())), dict(model.named_modules())
    entries: dict[str, tuple[Encoding, tuple[int, ...], list[mx.array | None]]] = {}
    for name, array in parameters.items():
        owner, _, leaf = name.rpartition(".")
        module = modules.get(owner)
        if leaf in ("scales", "biases") and hasattr(module, "bits"):
            continue
        if leaf == "weight" and hasattr(module, "bits"):
            scales = parameters[f"{owner}.scales"]
            dtype = _DTYPES[scales.dtype] if module.mode == "affine" else "bf16"
            encoding = Encoding(module.mode, dtype, module.bits, module.group_size)
            shape = (*array.shape[:-1], array.shape[-1] * 32 // module.bits)
            parts = [array, scales, parameters.get(f"{owner}.biases")]
        else:
            encoding, shape, parts = Encoding("raw", _DTYPES[array.dtype]), tuple(array.shape) or (1,), [array]
        if (kept := rename(name)) is not None:
            entries[kept] = encoding, shape, parts
    paths = [p for p, m in modules.items() if isinstance(m, SwitchGLU | SwitchMLP)]
    experts = {p: {n: e for n, e in entries.items() if n.startswith(p + ".")} for p in sorted(paths)}
    residents = {n: e for n, e in entries.items() if not any(n in group for group in experts.values())}
    layouts: list[Layout] = []
    layers: list[MoeLayer] = []
    numbers: list[list[int]] = []
    for path_, group in experts.items():
        layers.append(MoeLayer(len(layers), path_, next(iter(group.values()))[1][0]))
        numbers.append([])
        for expert in range(layers[-1].expert_count):
            found = {n: replace(e, bits=narrow(n, expert) or e.bits) for n, (e, _, _) in group.items()}
            layout = make_layout(
                [(n.removeprefix(path_ + "."), "expert", found[n], s[1:] or (1,)) for n, (_, s, _) in group.items()]
            )
            if layout not in layouts:
                layouts.append(layout)
            numbers[-1].append(layouts.index(layout))
    plan = Plan(
        metadata={"model": {"config": config}, "recipe": {}, "provenance": {}},
        residents=[(n, "embedding" if "embed" in n else "other", e, s) for n, (e, s, _) in residents.items()],
        layouts=layouts,
        moe_layers=layers,
        expert_layouts=numbers,
        record_alignment=64,
        codec=codec,
    )
    with Writer(path, plan) as writer:
        for _, _, parts in residents.values():
            writer.write([[_buffer(part) for part in parts]])
        for layer in layers:
            for expert in range(layer.expert_count):
                record = []
                for name, (encoding, _, parts) in experts[layer.path].items():
                    mine = [None if part is None else part[expert : expert + 1] for part in parts]
                    if bits := narrow(name, expert):
                        mine[0] = pack(mx.array(codes_of(np.array(mine[0]), encoding.bits)), bits)
                    record.append([_buffer(part) for part in mine])
                writer.write(record)
        writer.finish()
    return path


def codes_of(packed: np.ndarray, bits: int) -> np.ndarray:
    """The numbers that MLX packed into uint32 [..., words]: uint8 [..., words * 32 / bits]."""
    stream = np.unpackbits(np.ascontiguousarray(packed).view(np.uint8), bitorder="little")
    return np.packbits(stream.reshape(-1, bits), axis=1, bitorder="little").reshape(*packed.shape[:-1], -1)


def _buffer(array: mx.array | None) -> bytes | None:
    return None if array is None else np.array(array.reshape(-1).view(mx.uint8)).tobytes()


def logits(model: nn.Module) -> list[np.ndarray]:
    """Logits of a prompt of 32 tokens, then of single tokens, with a cache."""
    cache, found = make_prompt_cache(model), []
    for part in (TOKENS[:, :32], *(TOKENS[:, i : i + 1] for i in range(32, 36))):
        out = model(mx.array(part), cache=cache)
        mx.eval(out)  # NumPy hides an error that MLX raises while it waits
        found.append(np.array(out))
    return found


def assert_mlx_lms_own(found: list[np.ndarray], plain: list[np.ndarray]) -> None:
    """The bits of mlx-lm on MLX's arithmetic, or with squizd's kernels nearly."""
    for got, want in zip(found, plain, strict=True):
        atol = 0 if kernels.missing() else 1e-5 * np.abs(want).max()
        np.testing.assert_allclose(got, want, rtol=0, atol=atol)


def assert_same_at_any_share(file: Path, reference: nn.Module, shares: tuple[str, ...] = ("100%", "50%", "0%")) -> None:
    wanted = logits(in_float32(reference))
    assert all(np.isfinite(w).all() for w in wanted)
    with kernel_layers.switched_off():
        assert_mlx_lms_own(wanted, logits(reference))
    for share in shares:
        model = load_model(file, resident=share)
        for got, want in zip(logits(model), wanted, strict=True):
            np.testing.assert_array_equal(got, want, err_msg=share)
        paged = any(isinstance(module, PagedSwitch) for module in model.modules())
        assert paged == (share != "100%" and bool(state(model).file.moe_layers))
        assert paged == (state(model).stats.misses > 0)


@pytest.mark.parametrize("name", CONFIGS)
def test_architecture_gives_mlx_lm_logits_at_any_share(name: str, tmp_path: Path) -> None:
    model = make_model(CONFIGS[name])
    assert_same_at_any_share(write_file(tmp_path / "m.squizd", model, CONFIGS[name]), model)


def experts_at(bits: int, mode: str = "affine", group_size: int = 32) -> Callable[[str, nn.Module], dict[str, Any]]:
    low = {"group_size": group_size, "bits": bits, "mode": mode}
    return lambda path, module: low if "switch_mlp" in path else {"group_size": 32, "bits": 8, "mode": "affine"}


ENCODINGS: dict[str, tuple[Any, mx.Dtype]] = {
    "raw bf16": (None, mx.bfloat16),
    "raw f16": (None, mx.float16),
    "raw f32": (None, mx.float32),
    "2 bits, others 8": (experts_at(2), mx.bfloat16),
    "3 bits, f16 scales": (experts_at(3), mx.float16),
    "5 bits": (experts_at(5), mx.bfloat16),
    "6 bits, f32 scales": (experts_at(6), mx.float32),
    "mxfp4": (experts_at(4, "mxfp4"), mx.bfloat16),
    "mxfp8": (experts_at(8, "mxfp8"), mx.bfloat16),
    "nvfp4": (experts_at(4, "nvfp4", 16), mx.bfloat16),
    "experts only": (lambda path, module: AFFINE if "switch_mlp" in path else False, mx.bfloat16),
    "down projections raw": (lambda path, module: False if "down_proj" in path else AFFINE, mx.bfloat16),
}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_encoding_gives_mlx_lm_logits_at_any_share(encoding: str, tmp_path: Path) -> None:
    quantize, dtype = ENCODINGS[encoding]
    model = make_model(QWEN3, quantize, dtype)
    assert_same_at_any_share(write_file(tmp_path / "m.squizd", model, QWEN3), model)


def test_nvfp4_with_a_scale_per_expert(tmp_path: Path) -> None:
    quantize = experts_at(4, "nvfp4", 16)
    model = make_model(
        QWEN3,
        lambda path, module: {**quantize(path, module), **({"global_scale": True} if "switch_mlp" in path else {})},
    )
    assert "model.layers.0.mlp.switch_mlp.up_proj.global_scale" in dict(tree_flatten(model.parameters()))
    file = write_file(tmp_path / "m.squizd", model, QWEN3)
    if on_cpu():
        with pytest.raises(SourceError, match="only supported on the GPU"):
            load_model(file)
    else:
        assert_same_at_any_share(file, model)


def test_zstd_records_give_the_same_logits(tmp_path: Path) -> None:
    model = make_model(QWEN3)
    assert_same_at_any_share(write_file(tmp_path / "m.squizd", model, QWEN3, codec=ZSTD), model)


def test_moe_82m_gives_mlx_lm_logits_at_any_share(tmp_path: Path) -> None:
    """The trained bench model at 4 bits, router 8, as `mlx_lm.convert -q` makes it."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "models" / "moe-82m"
    if not folder.is_dir():
        pytest.skip(f"no bench model at {folder}")
    model, config = load_mlx_model(folder, lazy=True)
    wide = {"group_size": 64, "mode": "affine"}
    nn.quantize(
        model,
        class_predicate=lambda path, module: (
            hasattr(module, "to_quantized") and {**wide, "bits": 8 if path.endswith("mlp.gate") else 4}
        ),
    )
    mx.eval(model.parameters())
    file = write_file(tmp_path / "m.squizd", model, config)
    in_float32(model)
    texts = [mx.array(np.random.default_rng(i).integers(0, 8192, (1, n))) for i, n in enumerate((60, 20, 1))]
    wanted = [np.array(model(text)) for text in texts]
    with kernel_layers.switched_off():
        assert_mlx_lms_own(wanted, [np.array(model(text)) for text in texts])
    for share in ("100%", "50%", "25%", "0%"):
        paged = load_model(file, resident=share)
        for text, want in zip(texts, wanted, strict=True):
            np.testing.assert_array_equal(np.array(paged(text)), want, err_msg=share)


def test_a_member_of_a_set_is_refused() -> None:
    path = Path(__file__).parent.parent / "fixtures" / "valid" / "set-0.squizd"
    with pytest.raises(SourceError, match="one of a set of 2 files"):
        load_model(path)
