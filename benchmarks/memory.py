"""Is the budget kept? A big synthetic file under a small budget, as a whole process.

    python benchmarks/memory.py --size 3GB --memory 700MB

Makes the file with tools/make_synthetic.py, runs it, and prints one JSON line with the process's
maximum resident set size; exits 1 if that exceeds --limit.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from squizd.runtime.budget import parse_size

TOOL = Path(__file__).parent.parent / "tools" / "make_synthetic.py"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="3GB")
    parser.add_argument("--memory", default="700MB")
    parser.add_argument("--limit", default="1.2GB")
    parser.add_argument("--tokens", default="30")
    parser.add_argument("--words", type=int, default=300, help="length of the prompt (default: %(default)s)")
    parser.add_argument("--folder", help="where to make the file (default: a temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        file = f"{name}/big.squizd"
        subprocess.run([sys.executable, str(TOOL), file, "--size", args.size], check=True, stdout=subprocess.DEVNULL)
        prompt = " ".join(f"word{i % 50}" for i in range(args.words))
        command = ["squizd.cli", "run", file, "--memory", args.memory, "-n", args.tokens, "--no-chat", "-p", prompt]
        child = subprocess.Popen(
            [sys.executable, "-m", *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        assert child.stderr is not None
        said = child.stderr.read().strip().splitlines()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        result = {
            "file_bytes": os.path.getsize(file), "budget": parse_size(args.memory), "peak_rss": peak,
            "exit_code": child.returncode, "statistics": said[-1] if said else "",
        }  # fmt: skip
    print(json.dumps(result))
    sys.exit(child.returncode != 0 or peak > parse_size(args.limit))


if __name__ == "__main__":
    main()
