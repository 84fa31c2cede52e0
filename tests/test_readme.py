"""Every command and example of the README runs, as written, in a folder like the reader's."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import CommandLine

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
SHELL = [
    line.split("#")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
]
COMMANDS = [line for line in SHELL if line.startswith("squizd")]
NEEDS_HUB = "Qwen/Qwen3-30B-A3B"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like a clone to the commands: it has fixtures/."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "fixtures").symlink_to(ROOT / "fixtures")
    return folder


def run(workplace: Path, *command: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=workplace, env=env, capture_output=True, text=True, timeout=120)


def test_readme_has_the_commands_this_file_expects() -> None:
    assert len(COMMANDS) == 10
    assert [line for line in SHELL if line.startswith("make")] == ["make demo", "make test"]
    assert sum(NEEDS_HUB in line or "qwen3-30b" in line for line in COMMANDS) == 2


def test_local_commands_and_python_example_run_in_order(workplace: Path, cli: CommandLine) -> None:
    lines = [line for line in COMMANDS if "qwen3-30b" not in line.lower()]
    outcomes = cli.several(*(shlex.split(line)[1:] for line in lines), cwd=workplace)
    for line, outcome in zip(lines, outcomes, strict=True):
        assert outcome.success().out.strip(), line
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    done = run(workplace, sys.executable, "-c", example)
    assert done.returncode == 0, done.stderr
    assert "hits=" in done.stdout


def test_hub_commands_parse(workplace: Path, cli: CommandLine) -> None:
    """Without the hub and without the file they fail for that reason and no other."""
    lines = [line for line in COMMANDS if "qwen3-30b" in line.lower()]
    for outcome in cli.several(*(shlex.split(line)[1:] for line in lines), cwd=workplace):
        said = outcome.failure()
        assert "cannot be reached" in said or "No such file" in said


def test_table_lists_exactly_the_commands_there_are() -> None:
    from squizd.cli import main

    assert set(re.findall(r"^\| `squizd (\w+)", README, re.MULTILINE)) == set(main.commands)


def test_tree_lists_exactly_what_is_there() -> None:
    (tree,) = re.findall(r"```\n(squizd/.*?)```", README, re.DOTALL)
    listed = {line.split()[0] for line in tree.splitlines()}
    package = {p.name + "/" * p.is_dir() for p in (ROOT / "squizd").iterdir() if not p.name.startswith("_")}
    folders = {f"{name}/" for name in ("squizd", "spec", "fixtures", "tests", "tools", "benchmarks")}
    minor = {"py.typed", "errors.py", "backend.py", "architecture.py"}
    assert listed == (package - minor) | folders


def test_makefile_demo_is_a_command_that_works(workplace: Path, cli: CommandLine) -> None:
    """The demo's own two commands, as the Makefile has them."""
    makefile = (ROOT / "Makefile").read_text("utf-8")
    lines = [x.strip() for x in makefile.splitlines() if x.startswith("\t$(BIN)/squizd")]
    assert len(lines) == 2
    (workplace / "build" / "demo").mkdir(parents=True)
    commands = [shlex.split(line.replace("$(BIN)/squizd", "squizd").replace("$(DEMO)", "build/demo")) for line in lines]
    outcomes = cli.several(*(words[1:] for words in commands), cwd=workplace)
    assert "hit rate" in [outcome.success() for outcome in outcomes][-1].err
