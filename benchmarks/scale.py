"""Compressing a 30B-shaped checkpoint: minutes, peak memory and MB/s, beside `mlx_lm convert`.

    python benchmarks/scale.py FOLDER --layers 12
    python benchmarks/scale.py FOLDER --layers 12 --sides gptq --windows 64 --keep

Writes a Qwen3-30B-A3B-shaped bf16 checkpoint of so many layers into FOLDER/source (or takes the one that is
there), with random weights of plausible size and the fixture's tokenizer. Each side is a process of its own; peak
memory is its maximum resident set size, `mlx_peak_bytes` what MLX had allocated at most (on a GPU not part of the
former). One JSON line for the checkpoint and one for each side; `steps` are [what, done, total, seconds since the
imports began] of layers calibrated, then of those measured, and bytes written, for what many layers would take.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
SHARD_BYTES = 4_000_000_000
POOL = 1 << 26  # random values that tensors are cut from: the same run of them never starts two tensors
SIDES = ("mlx_lm", "minmax", "mse", "gptq")
# Runs a module as a program, then says what MLX allocated at most, and of squizd's when it was where.
DRIVER = """
import atexit, runpy, sys
import mlx.core as mx
peak, module = sys.argv[1:3]
if module == "squizd.cli":
    import json, time
    from squizd import compression
    began, noted, real = time.time(), [], compression.compress
    def note(what, done, total):
        if what != "write" or not noted or noted[-1][0] != what or time.time() - began > noted[-1][3] + 1:
            noted.append((what, done, total, round(time.time() - began, 2)))
            open(peak + ".steps", "w").write(json.dumps(noted))
    def compress(*args, progress, preparing, **options):
        found = real(*args, progress=lambda *x: note("write", *x), preparing=lambda *x: note("layer", *x), **options)
        note("end", 1, 1)
        return found
    compression.compress = compress
atexit.register(lambda: open(peak, "w").write(str(mx.get_peak_memory())))
sys.argv[:] = [module, *sys.argv[3:]]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""
Entry = tuple[str, tuple[int, ...]]


def config(args: argparse.Namespace) -> dict[str, object]:
    """Qwen3-30B-A3B's, but for what the arguments make smaller."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "torch_dtype": "bfloat16",
        "hidden_size": args.hidden, "num_hidden_layers": args.layers, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 128, "num_experts": args.experts, "num_experts_per_tok": 8,
        "moe_intermediate_size": args.width, "intermediate_size": 6144, "vocab_size": args.vocabulary,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True, "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0, "tie_word_embeddings": False, "max_position_embeddings": 40960, "hidden_act": "silu",
        "attention_bias": False, "use_sliding_window": False, "router_aux_loss_coef": 0.001, "bos_token_id": 0,
        "eos_token_id": 0,
    }  # fmt: skip


def tensors(args: argparse.Namespace) -> Iterator[Entry]:
    """Names and shapes in the order in which such models are published."""
    hidden, width = args.hidden, args.width
    yield "model.embed_tokens.weight", (args.vocabulary, hidden)
    for layer in range(args.layers):
        at = f"model.layers.{layer}"
        yield f"{at}.input_layernorm.weight", (hidden,)
        for expert in range(args.experts):
            yield f"{at}.mlp.experts.{expert}.down_proj.weight", (hidden, width)
            yield f"{at}.mlp.experts.{expert}.gate_proj.weight", (width, hidden)
            yield f"{at}.mlp.experts.{expert}.up_proj.weight", (width, hidden)
        yield f"{at}.mlp.gate.weight", (args.experts, hidden)
        yield f"{at}.post_attention_layernorm.weight", (hidden,)
        yield f"{at}.self_attn.k_norm.weight", (128,)
        yield f"{at}.self_attn.k_proj.weight", (512, hidden)
        yield f"{at}.self_attn.o_proj.weight", (hidden, 4096)
        yield f"{at}.self_attn.q_norm.weight", (128,)
        yield f"{at}.self_attn.q_proj.weight", (4096, hidden)
        yield f"{at}.self_attn.v_proj.weight", (512, hidden)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (args.vocabulary, hidden)


def bf16(x: np.ndarray) -> np.ndarray:
    """Float32 values, cut to bfloat16, as uint16."""
    return (x.view(np.uint32) >> 16).astype(np.uint16)


def write_checkpoint(folder: Path, args: argparse.Namespace) -> None:
    """Write config, tokenizer, index and shards."""
    folder.mkdir(parents=True)
    shards: list[list[Entry]] = [[]]
    room = SHARD_BYTES
    for name, shape in tensors(args):
        size = 2 * int(np.prod(shape))
        if size > room and shards[-1]:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append((name, shape))
        room -= size
    random = np.random.default_rng(0)
    pool = bf16(random.standard_normal(POOL, np.float32) * np.float32(0.02))
    pool = np.concatenate([pool, pool])
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    starts = [random.integers(0, POOL, len(entries)) for entries in shards]
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as threads:
        list(threads.map(lambda n, e, s: write_shard(folder / n, e, s, pool), names, shards, starts))
    total = sum(2 * int(np.prod(shape)) for entries in shards for _, shape in entries)
    weight_map = {name: file for file, entries in zip(names, shards, strict=True) for name, _ in entries}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(ROOT / "fixtures" / "tiny-moe" / name, folder)
    (folder / "config.json").write_text(json.dumps(config(args)))  # last: a folder without it is not whole


def write_shard(path: Path, entries: list[Entry], starts: np.ndarray, pool: np.ndarray) -> None:
    """One safetensors file; norms are 1."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in entries:
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for (_, shape), start in zip(entries, starts, strict=True):
            count = int(np.prod(shape))
            if len(shape) == 1:
                f.write(np.full(count, 0x3F80, np.uint16))
            while len(shape) > 1 and count:
                part = pool[start : start + min(count, POOL)]
                f.write(part)
                count -= len(part)


def calibration_text(path: Path) -> None:
    """This repository's own prose and code: enough for 256 windows of 512 tokens."""
    files = sorted(p for p in ROOT.rglob("*") if p.suffix in (".py", ".md", ".cpp", ".h") and ".venv" not in p.parts)
    path.write_text("\n".join(p.read_text("utf-8", "replace") for p in files), "utf-8")


def timed(module: str, arguments: list[str], folder: Path) -> dict[str, object]:
    """Seconds, peak resident bytes and MLX's peak of a whole process; what it said last if it failed."""
    peak = folder / "peak"
    steps = folder / "peak.steps"
    for path in (peak, steps):
        path.unlink(missing_ok=True)
    with tempfile.TemporaryFile() as output:
        began = time.perf_counter()
        child = subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(peak), module, *arguments], stdout=output, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - began
        child.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        said = output.read().decode("utf-8", "replace").strip()
    return {
        "minutes": seconds / 60,
        "seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "mlx_peak_bytes": int(peak.read_text()) if peak.exists() else None,
        "exit": child.returncode,
        **({"steps": json.loads(steps.read_text())} if steps.exists() else {}),
        **({"said": said[-2000:]} if child.returncode else {}),
    }


def main() -> None:
    """Make the checkpoint, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--width", type=int, default=768, help="of an expert")
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--sides", default=",".join(SIDES), help="which to time, in this order (default: %(default)s)")
    parser.add_argument("--windows", type=int, default=256, help="of calibration text (default: %(default)s)")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--target-bpw", type=float, default=4.5)
    parser.add_argument("--keep", action="store_true", help="keep the checkpoint for another run")
    args = parser.parse_args()
    source, text = args.folder / "source", args.folder / "calibration.txt"
    began = time.perf_counter()
    if not (source / "config.json").exists():
        shutil.rmtree(source, ignore_errors=True)
        # Elsewhere: what this process ever held would count in the peak of those that it starts.
        maker = multiprocessing.get_context("spawn").Process(target=write_checkpoint, args=(source, args))
        maker.start()
        maker.join()
        if maker.exitcode:
            sys.exit(f"{source} could not be written")
    elif json.loads((source / "config.json").read_text()) != config(args):
        sys.exit(f"{source} holds another model: remove it, or give its arguments")
    size = sum(p.stat().st_size for p in source.glob("*.safetensors"))
    expert_bytes = 3 * 2 * args.hidden * args.width * args.experts
    line = {"checkpoint": str(source), "bytes": size, "layer_bytes": expert_bytes + 2 * args.hidden * 9216}
    print(json.dumps(line | {"layers": args.layers, "seconds": time.perf_counter() - began}), flush=True)
    calibration_text(text)
    output, mlx = args.folder / "out.squizd", args.folder / "mlx"
    compress = ["compress", str(source), "-o", str(output), "--force", "--json"]
    amount = ["--calibration", str(text), "--windows", str(args.windows), "--context", str(args.context)]
    commands = {
        "mlx_lm": ("mlx_lm", ["convert", "--hf-path", str(source), "--mlx-path", str(mlx), "-q"]),
        "minmax": ("squizd.cli", [*compress, "--quantizer", "minmax"]),
        "mse": ("squizd.cli", [*compress, "--quantizer", "mse"]),
        "gptq": ("squizd.cli", [*compress, "--quantizer", "gptq", "--target-bpw", str(args.target_bpw), *amount]),
    }
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as the command does, but here NumPy is imported before it
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    failed = False
    for side in args.sides.split(","):
        shutil.rmtree(mlx, ignore_errors=True)
        found = timed(*commands[side], args.folder)
        found |= {"side": side, "MB/s of source": size / 1e6 / float(str(found["seconds"]))}
        if output.exists():
            found["file_bytes"] = output.stat().st_size
            output.unlink()
        if side == "gptq":
            found |= {"windows": args.windows, "context": args.context}
        failed |= bool(found["exit"])
        print(json.dumps(found), flush=True)
    shutil.rmtree(mlx, ignore_errors=True)
    if not args.keep:
        shutil.rmtree(source)
    sys.exit(failed)


if __name__ == "__main__":
    main()
