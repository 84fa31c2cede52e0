"""A repository compressed shard by shard: the same file, on little disk, after kills, from damaged shards."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from conftest import CommandLine, contents
from hub import Hub, Repo, serve

from squizd import weights
from squizd.architecture import build
from squizd.checkpoint import open_checkpoint
from squizd.errors import OutputError, SourceError
from squizd.hub import Shard, _errors
from squizd.streaming import _Hashes

SHARDS = 9

# Runs a command and prints the most bytes of disk that it took beside its output.
MEASURED = """
import sys
from pathlib import Path
from squizd import hub
from squizd.cli import main
folder, most = Path(sys.argv[1]), 0
def watch(kind, name):
    method = getattr(kind, name)
    def watched(*args):
        global most
        found = method(*args)
        used = [p.stat().st_blocks * 512 for p in folder.rglob("*") if p.is_file() and p.suffix != ".partial"]
        most = max(most, sum(used))
        return found
    setattr(kind, name, watched)
watch(hub.Remote, "fetch")
watch(hub.Shard, "copy")
sys.argv[1:] = sys.argv[2:]
try:
    main()
finally:
    print("most", most)
"""


@pytest.fixture(scope="module")
def sharded(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fixture in many shards, cut without regard to layers."""
    folder = tmp_path_factory.mktemp("sharded")
    for path in tiny.iterdir():
        if path.suffix in (".json", ".md") and path.name != "model.safetensors.index.json":
            shutil.copy(path, folder)
    found: dict[str, mx.array] = {}
    for path in sorted(tiny.glob("*.safetensors")):
        found |= mx.load(str(path))  # type: ignore[arg-type]
    names, total = sorted(found), sum(a.nbytes for a in found.values())
    shards: list[dict[str, mx.array]] = [{}]
    for name in names:
        if sum(a.nbytes for a in shards[-1].values()) > total / SHARDS:
            shards.append({})
        shards[-1][name] = found[name]
    files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards, strict=True):
        mx.save_safetensors(str(folder / file), shard)
    weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.fixture(scope="module")
def hub(sharded: Path) -> Iterator[Hub]:
    with serve() as hub:
        hub.repos["org/tiny"] = Repo()
        hub.repos["org/tiny"].commit(sharded)
        yield hub


def online(hub: Hub, home: Path) -> dict[str, str]:
    return CommandLine.environment(HF_ENDPOINT=hub.url, HF_HOME=str(home), HF_HUB_OFFLINE=None)


def shards_read(hub: Hub) -> list[str]:
    """Whole shards that were asked for."""
    return [path for method, path, _, part in hub.seen
            if method == "GET" and path.endswith(".safetensors") and not part]  # fmt: skip


def test_the_disk_holds_the_file_a_shard_and_what_is_left_of_a_layer(
    hub: Hub, sharded: Path, tmp_path: Path, tiny_file: Callable[..., Path]
) -> None:
    command = ["compress", "org/tiny", "-o", tmp_path / "x.squizd", "--quantizer", "minmax"]
    hub.seen.clear()
    home = tmp_path.parent / (tmp_path.name + "-home")
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, tmp_path, *map(str, command)],
        env=online(hub, home), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    checkpoint = open_checkpoint(sharded)
    sizes = [p.stat().st_size for p in checkpoint.shards]
    layers: dict[str, int] = {}
    for name, size in checkpoint.sizes.items():
        if ".layers." in name:
            layers[name.split(".")[2]] = layers.get(name.split(".")[2], 0) + size
    most = int(done.stdout.split("most ")[1])
    assert most < max(sizes) + max(layers.values()) + len(sizes) * 80_000  # headers of the stand-ins
    assert most < 0.6 * sum(sizes)
    assert sorted(shards_read(hub)) == sorted(set(shards_read(hub)))
    assert [p.name for p in tmp_path.iterdir()] == ["x.squizd"]
    assert not list(home.rglob("*.safetensors"))
    source = contents(tmp_path / "x.squizd")["metadata"]["provenance"]["source"]
    assert stored(tmp_path / "x.squizd") == stored(tiny_file())
    assert [f["sha256"] for f in source["files"]] == [f["sha256"] for f in checkpoint.hashes()]


def test_killed_between_shards_it_fetches_what_is_missing_and_ends_in_the_same_bytes(
    hub: Hub, tmp_path: Path, cli: CommandLine
) -> None:
    env = online(hub, tmp_path / "home")
    cli.process("compress", "org/tiny", "-o", tmp_path / "whole.squizd", env=env).success()
    target = tmp_path / "x.squizd"
    with cli.doomed(Path(f"{target}.partial"), "compress", "org/tiny", "-o", target, env=env) as run:
        for share in (0.2, 0.4, 0.6):
            assert run(share * (tmp_path / "whole.squizd").stat().st_size) == -signal.SIGKILL
            assert not target.exists()
    hub.seen.clear()
    outcome = cli.process("compress", "org/tiny", "-o", target, "--json", env=env).success()
    assert json.loads(outcome.out)["resumed"] > 0
    assert 0 < len(shards_read(hub)) < SHARDS
    assert target.read_bytes() == (tmp_path / "whole.squizd").read_bytes()


def test_a_disk_that_fills_up_while_shards_arrive_leaves_a_run_to_go_on_with(
    hub: Hub, disk: Path, tmp_path: Path, cli: CommandLine, tiny_file: Callable[..., Path]
) -> None:
    target, env = disk / "x.squizd", online(hub, tmp_path / "home")
    command = ["compress", "org/tiny", "-o", str(target), "--quantizer", "minmax", "--json"]
    subprocess.run(["mount", "-o", "remount,size=2800k", disk], check=True)  # not for what is left of shards
    error = cli.process(*command, env=env).failure()
    assert "hollow/model-" in error
    assert "No space left on device\nhint: free some space and run the same command again" in error
    assert not target.exists()
    subprocess.run(["mount", "-o", "remount,size=9m", disk], check=True)
    assert json.loads(cli.process(*command, env=env).success().out)["resumed"] > 0
    assert stored(target) == stored(tiny_file())
    assert [p.name for p in disk.iterdir()] == [target.name]


def test_a_disk_that_fills_up_under_the_hubs_client_is_not_a_failing_hub() -> None:
    message = "org/tiny: download failed: No space left on device"
    with pytest.raises(OutputError, match=message) as caught, _errors("org/tiny", None):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert "free some space" in caught.value.hint


def stored(path: Path) -> object:
    """All of a file but where it came from."""
    found = contents(path)
    found["metadata"]["provenance"].pop("source")
    return found


def test_what_a_tensor_is_made_from_is_read_off_sanitize(tiny: Path) -> None:
    checkpoint = open_checkpoint(tiny)
    model = build(checkpoint.config, "tiny")
    found = weights.sources(checkpoint, model)
    at = "model.layers.1.mlp"
    assert found[f"{at}.switch_mlp.up_proj.weight"] == {f"{at}.experts.{i}.up_proj.weight" for i in range(32)}
    assert found["model.norm.weight"] == {"model.norm.weight"}
    assert set().union(*found.values()) == set(checkpoint.sizes)


def test_a_model_that_looks_at_numbers_cannot_be_fetched_in_parts(tiny: Path) -> None:
    class Looking(nn.Module):
        def sanitize(self, found: dict[str, mx.array]) -> dict[str, mx.array]:
            name = "model.norm.weight"
            found[name] = found[name] * float(found["model.embed_tokens.weight"].max()) + mx.ones(128)
            mx.eval(found[name])
            return found

    with pytest.raises(SourceError, match="cannot be fetched one by one") as caught:
        weights.sources(open_checkpoint(tiny), Looking())
    assert "--keep-source" in caught.value.hint


def test_a_shard_that_is_not_what_the_hub_says_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"something else")
    with pytest.raises(SourceError, match="damaged on its way"):
        _Hashes(tmp_path / "hashes.json").add(Shard(path.name, 14, "0" * 64, {}), path)
    assert not path.exists()
