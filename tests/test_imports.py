"""Imports point one way, and the container needs no MLX."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import squizd

PACKAGE = Path(squizd.__file__).parent

# What each part may import of the package. Everything may import errors and the bare package (its version).
ALLOWED = {
    "errors": set(),
    "backend": set(),
    "container": {"codecs"},  # lazily, to decode for the caller
    "codecs": {"container"},
    "quantizers": {"backend", "container", "kernels"},
    "architecture": set(),
    "hub": set(),
    "checkpoint": {"hub"},
    "streaming": {"architecture", "checkpoint", "hub", "weights"},
    "recipe": {"container"},
    "inspection": {"codecs", "container"},
    "repack": {"container"},
    "weights": {"checkpoint"},
    "corpus": set(),
    "scratch": {"backend"},
    "single": {"architecture", "backend", "container", "quantizers", "runtime"},
    "walk": {"architecture", "backend", "checkpoint", "runtime", "scratch", "single", "weights"},
    "knowledge": set(),
    "moments": {"backend", "quantizers"},
    "listening": {"knowledge", "moments"},
    "routed": {"moments", "scratch", "single"},
    "watching": {"architecture", "listening", "routed", "scratch"},
    "calibration": {
        *("checkpoint", "corpus", "knowledge", "listening", "moments", "routed", "scratch", "walk", "watching"),
    },
    "sensitivity": {"backend", "checkpoint", "scratch", "walk"},
    "workplace": set(),
    "guide": {
        *("backend", "workplace", "calibration", "checkpoint", "container", "corpus", "knowledge", "quantizers"),
        *("routed", "single"),
    },
    "allocation": {"recipe"},
    "planning": {
        "routed",
        "allocation",
        "architecture",
        "checkpoint",
        "container",
        "knowledge",
        "quantizers",
        "recipe",
        "scratch",
        "sensitivity",
        "weights",
    },
    "inventory": {"architecture", "checkpoint", "container", "recipe", "weights"},
    "storing": {"checkpoint", "container", "guide", "hub", "inventory", "streaming"},
    "choosing": {
        *("allocation", "checkpoint", "container", "filing", "guide", "inventory", "planning", "recipe", "workplace"),
    },
    "filing": {"architecture", "checkpoint", "container", "guide", "inventory", "recipe"},
    "compression": {
        *("allocation", "backend", "checkpoint", "choosing", "container", "filing", "guide", "inspection"),
        *("inventory", "quantizers", "recipe", "storing", "workplace"),
    },
    "kernels": set(),
    "runtime": {"architecture", "backend", "container", "kernels"},
    "generation": {"runtime"},
    "tracing": {"kernels", "runtime"},
    "profiling": {"container", "corpus", "generation", "repack", "runtime", "tracing"},
    "fitting": {"container", "runtime"},
    "drawing": set(),
    "plotting": {"drawing", "fitting"},
    "sides": {"runtime"},
    "trials": {"sides"},
    "measuring": {"backend", "container", "inspection", "runtime", "sides", "trials"},
    "evaluation": {"architecture", "checkpoint", "container", "corpus", "inspection", "runtime", "weights"},
    "report": {"drawing", "evaluation"},
    "cli": {
        *(
            "backend",
            "compression",
            "container",
            "corpus",
            "evaluation",
            "fitting",
            "generation",
            "guide",
            "inspection",
        ),
        *("measuring", "plotting", "profiling", "repack", "report", "runtime", "sides"),
    },
}


def part_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    """Parts of squizd that a module imports, anywhere in it."""
    depth = len(path.relative_to(PACKAGE).parts)
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            module = (node.module or "").split(".")
            if node.level == depth:
                found |= {module[0]} if module[0] else {alias.name for alias in node.names}
            elif module[0] == "squizd":
                found |= {module[1]} if len(module) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("squizd.")}
    return found


MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    part = part_of(path)
    assert part in ALLOWED, f"{part} is new: say in ALLOWED what it may import"
    assert imported_parts(path) - {"errors", "__version__", part} <= ALLOWED[part]


def test_only_one_module_asks_for_the_device() -> None:
    """Whoever needs to know asks `backend.on_cpu`; what follows for the runtime is in `runtime.device`."""
    asking = [p for p in MODULES if "default_device" in p.read_text("utf-8") or "mx.metal" in p.read_text("utf-8")]
    assert [p.relative_to(PACKAGE).as_posix() for p in asking] == ["backend.py"]


def test_container_works_without_mlx() -> None:
    code = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('mlx', 'mlx_lm', 'transformers', 'huggingface_hub', 'torch'):\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "import squizd, squizd.container, squizd.codecs, squizd.inspection\n"
        "squizd.open, squizd.validate\n"
        "try: squizd.load\n"
        "except squizd.SquizdError as error: print(type(error).__name__, error.hint)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("BackendError")
    assert "pip install" in done.stdout
