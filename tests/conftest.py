"""What several test files share: the fixture checkpoint, files compressed from it, and the command line.

Failures are judged the way a user sees them: `Outcome.failure` wants exactly one "squizd:" line on
standard error, at most one "hint:" line after it, and an exit code that is not 0.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# As the command line does: two threads of BLAS on few cores wait for each other. NumPy must not have been imported yet.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest
from click.testing import CliRunner
from hypothesis import settings

settings.register_profile("squizd", deadline=None)  # a busy machine is no failure
settings.load_profile("squizd")

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, "-m", "squizd.cli"]

_DRIVER = """
import json, sys
from click.testing import CliRunner
from squizd.cli import main
for args in json.load(sys.stdin):
    result = CliRunner().invoke(main, args, prog_name="squizd")
    print(json.dumps([result.exit_code, result.stdout, result.stderr]))
"""

# Runs a command again and again, each time until `partial` takes more bytes of disk than the next line says: there it
# kills itself, from another thread, at whatever moment that is. The process that forks has computed nothing yet, so it
# has no threads; what takes long to import it has.
_DOOMED = """
import json, os, signal, sys, threading, time
import squizd.compression
from squizd.cli import main
assert threading.active_count() == 1
partial, args = json.loads(sys.stdin.readline())

def watch(size):
    while not os.path.exists(partial) or os.stat(partial).st_blocks * 512 <= size:
        time.sleep(0.0005)
    os.kill(os.getpid(), signal.SIGKILL)

for line in sys.stdin:
    child = os.fork()
    if not child:
        threading.Thread(target=watch, args=(float(line),), daemon=True).start()
        main(args)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclass
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str

    def failure(self, code: int = 1) -> str:
        """The whole of standard error, once it is one line and perhaps a hint."""
        lines = self.err.splitlines()
        assert self.code == code, self
        assert lines, self
        assert lines[0].startswith("squizd: "), self
        assert "internal error" not in lines[0], self
        assert len(lines) == 1 or (len(lines) == 2 and lines[1].startswith("hint: ")), self
        return self.err

    def success(self) -> Outcome:
        """Itself, once the exit code is 0 and nobody saw a traceback."""
        assert self.code == 0, self
        assert "Traceback" not in self.err, self
        return self


def environment(**changes: str | None) -> dict[str, str]:
    """This process's environment with `changes`, squizd importable, and no hub but the one a test names.

    SQUIZD_KERNELS stays: what another process computes must have the bits of what this one does.
    """
    dropped = ("HF_", "HUGGING_FACE", "SQUIZD_")
    env = {k: v for k, v in os.environ.items() if k == "SQUIZD_KERNELS" or not k.startswith(dropped)}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
    env["HF_HUB_OFFLINE"] = "1"
    env |= {key: value for key, value in changes.items() if value is not None}
    return {key: value for key, value in env.items() if key not in changes or changes[key] is not None}


def start(*args: str | Path, env: Mapping[str, str] | None = None, **options: Any) -> subprocess.Popen[str]:
    """The command in a process of its own, for a test that interferes with it."""
    options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen([*COMMAND, *map(str, args)], text=True, env=env or environment(), **options)


def finish(process: subprocess.Popen[str], timeout: float = 120) -> Outcome:
    """Wait for a started command."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate()
        raise
    return Outcome(process.returncode, out or "", err or "")


@dataclass
class CommandLine:
    """`squizd` as a call in this process, and as a process of its own."""

    def __call__(self, *args: str | Path, stdin: str | bytes | None = None) -> Outcome:
        from squizd.cli import main

        result = CliRunner().invoke(main, [str(a) for a in args], input=stdin, prog_name="squizd")
        return Outcome(result.exit_code, result.stdout, result.stderr)

    def process(self, *args: str | Path, env: Mapping[str, str] | None = None, **options: Any) -> Outcome:
        text = options.pop("input", None)
        started = start(*args, env=env, **options, **({"stdin": subprocess.PIPE} if text is not None else {}))
        if text is not None and started.stdin is not None:
            started.stdin.write(text)
        return finish(started)

    def several(
        self, *commands: Sequence[str | Path], env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> list[Outcome]:
        """Some commands in one other process, so that its start is paid once; for what depends on `env` or `cwd`."""
        given = json.dumps([[str(a) for a in command] for command in commands])
        driver = [sys.executable, "-c", _DRIVER]
        done = subprocess.run(
            driver, input=given, capture_output=True, text=True, env=env or environment(), cwd=cwd, timeout=120
        )
        assert done.returncode == 0, done
        assert done.stderr == "", done  # nothing but squizd's own lines
        return [Outcome(*json.loads(line)) for line in done.stdout.splitlines()]

    @contextmanager
    def doomed(
        self, partial: Path, *args: str | Path, env: Mapping[str, str] | None = None
    ) -> Iterator[Callable[[float], int]]:
        """A call runs the command, kills it once `partial` takes more than so many bytes of disk; its exit code."""
        driver = [sys.executable, "-c", _DOOMED]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        with subprocess.Popen(driver, text=True, env=env or environment(), **pipes) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            print(json.dumps([str(partial), [str(a) for a in args]]), file=process.stdin, flush=True)

            def run(size: float) -> int:
                print(size, file=process.stdin, flush=True)
                return int(process.stdout.readline())

            yield run

    environment = staticmethod(environment)
    start = staticmethod(start)
    finish = staticmethod(finish)


@pytest.fixture(scope="session")
def cli() -> CommandLine:
    """The command line; `cli(...)` calls it here, `cli.process(...)` and `cli.start(...)` elsewhere."""
    return CommandLine()


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The fixture checkpoint's folder: never write there."""
    return ROOT / "fixtures" / "tiny-moe"


@pytest.fixture
def checkpoint(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the fixture checkpoint that a test may damage."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny, folder)
    return folder


@pytest.fixture(scope="session")
def tiny_file(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_file("int4", quantizer="minmax")`: the fixture compressed so, once per session. Never write there."""
    folder, made = tmp_path_factory.mktemp("compressed"), dict[str, Path]()

    def make(
        recipe: str = "int4", quantizer: str = "minmax", overrides: Sequence[str] = (), zstd: bool = False
    ) -> Path:
        import squizd

        key = repr((recipe, quantizer, tuple(overrides), zstd))
        if key not in made:
            path = folder / f"{len(made)}.squizd"
            squizd.compress(tiny, path, recipe=recipe, quantizer=quantizer, overrides=overrides, zstd=zstd)
            made[key] = path
        return made[key]

    return make


def contents(path: Path) -> dict[str, Any]:
    """Everything that a file holds, decoded from its record codec: equal for files that mean the same."""
    import squizd

    with squizd.open(path) as f:
        return {
            "metadata": f.metadata,
            "files": f.bundle(),
            "residents": {name: (t, bytes(f.read(r, name))) for name, (t, r) in f.residents.items()},
            "layers": [(x.layer, x.path) for x in f.moe_layers],
            "experts": {
                (x.layer, i): (f.layouts[f.expert(x.layer, i).layout].tensors, bytes(f.read_expert(x.layer, i)))
                for x in f.moe_layers
                for i in range(x.expert_count)
            },
        }


def mount(folder: Path, options: str) -> None:
    """A file system in memory at `folder`; skips where this user may not."""
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs the right to mount a small file system: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        mount(folder, "size=1m")
    except FileNotFoundError:
        pytest.skip("needs the mount command")
    yield folder
    subprocess.run(["umount", folder], check=True)
