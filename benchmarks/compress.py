"""Compressing: time against `mlx_lm convert`, peak memory, and twenty kills.

    python benchmarks/compress.py --model CHECKPOINT --calibration TEXT

Whole processes, in turns, whose bytecode is there as after an installation. CPU time, which other work on the machine
changes less, is told too. Peak memory is the process's maximum resident set size; allowed are the tensors of the
largest layer and 1 GB. Each killed run is started again until it ends; the bytes must be those of an undisturbed run.
With calibration text all of that for `--quantizer gptq --target-bpw 4.5` too. One JSON line; exits 1 if bytes differ,
if a reader accepts what a killed run left, or if a run takes more memory.
"""

from __future__ import annotations

import argparse
import compileall
import hashlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import squizd
from squizd.checkpoint import open_checkpoint


def timed(command: list[str]) -> tuple[float, float, int]:
    """(seconds, CPU seconds, peak resident bytes) of a whole process."""
    began = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-m", *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0, command
    scale = 1 if sys.platform == "darwin" else 1024
    return time.perf_counter() - began, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * scale


def largest_layer(model: str) -> int:
    """Bytes of the largest decoder layer in the checkpoint."""
    layers: dict[str, int] = {}
    for name, size in open_checkpoint(model).sizes.items():
        key = ".".join(name.split(".")[:3]) if ".layers." in name else name
        layers[key] = layers.get(key, 0) + size
    return max(layers.values())


def sha256(path: str) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def kill_at_random(command: list[str], output: str, wanted: str, kills: int, usual: float) -> dict[str, int]:
    """Kill and resume `kills` times; counts what went wrong, which should be nothing."""
    found = {"kills": 0, "accepted": 0, "half_written": 0, "different": 0, "resumed": 0}
    source = random.Random(7)
    while found["kills"] < kills:
        child = subprocess.Popen(
            [sys.executable, "-m", *command, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        try:
            child.wait(timeout=source.uniform(0.3, 1.0) * usual)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            found["kills"] += 1
            if os.path.exists(output):  # it was done, and about to leave
                found["half_written"] += sha256(output) != wanted
            if os.path.exists(output + ".partial"):
                try:
                    found["accepted"] += squizd.validate(output + ".partial").ok
                except squizd.SquizdError:
                    pass
            if source.random() < 0.5:
                continue  # kill the resumed run as well
            child = subprocess.Popen([sys.executable, "-m", *command, "--json"], stdout=subprocess.PIPE)
        out = child.communicate()[0]
        found["resumed"] += json.loads(out)["resumed"] > 0
        found["different"] += sha256(output) != wanted
        os.remove(output)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--calibration", help="text: measure a calibrated run as well")
    parser.add_argument("--windows", type=int, default=256, help="of calibration text (default: %(default)s)")
    args = parser.parse_args()
    # What an installation does; else each process of ours would do it again where bytecode is not written.
    compileall.compile_dir(Path(squizd.__file__).parent, quiet=1)
    with tempfile.TemporaryDirectory() as name:
        output, folder = f"{name}/model.squizd", Path(name) / "mlx"
        ours = ["squizd.cli", "compress", args.model, "-o", output, "--force"]
        theirs = ["mlx_lm", "convert", "--hf-path", args.model, "--mlx-path", str(folder), "-q"]
        amount = ["--calibration", str(args.calibration), "--windows", str(args.windows)]
        sides = {
            "minmax": [*ours, "--quantizer", "minmax"],
            "mse": [*ours, "--quantizer", "mse"],
            "mlx_lm": theirs,
            "gptq": [*ours, "--quantizer", "gptq", "--target-bpw", "4.5", *amount],
        }
        if args.calibration is None:
            del sides["gptq"]
        times: dict[str, list[float]] = {side: [] for side in sides}
        cpu_times: dict[str, list[float]] = {side: [] for side in sides}
        peaks: dict[str, int] = dict.fromkeys(sides, 0)
        digests: dict[str, str] = {}
        for number in range(args.repeats):
            for side, command in sides.items():
                if side == "gptq" and number:
                    continue
                shutil.rmtree(folder, ignore_errors=True)
                seconds, cpu_seconds, memory = timed(command)
                times[side].append(seconds)
                cpu_times[side].append(cpu_seconds)
                peaks[side] = max(peaks[side], memory)
                if side != "mlx_lm":
                    digests[side] = sha256(output)
        median = {side: statistics.median(values) for side, values in times.items()}
        ratios = {
            f"{side} / mlx_lm{what}": statistics.median(a / b for a, b in zip(of[side], of["mlx_lm"], strict=True))
            for what, of in (("", times), (" (CPU)", cpu_times))
            for side in ("minmax", "mse")
        }
        os.remove(output)
        kills = {
            side: kill_at_random(sides[side], output, digests[side], args.kills, median[side])
            for side in ("mse", "gptq")
            if side in sides
        }
    limit = largest_layer(args.model) + 1_000_000_000
    print(json.dumps({"seconds": median, **ratios, "peak_bytes": peaks, "peak_limit": limit, "kills": kills}))
    wrong = sum(found[key] for found in kills.values() for key in ("accepted", "half_written", "different"))
    sys.exit(bool(wrong) or any(peak > limit for side, peak in peaks.items() if side != "mlx_lm"))


if __name__ == "__main__":
    main()
