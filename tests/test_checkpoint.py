"""Checkpoints: what a folder must hold, and the hub through its real client (tests/hub.py answers)."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import CommandLine, Outcome, contents
from hub import Hub, Repo, serve

from squizd.checkpoint import Checkpoint, open_checkpoint
from squizd.errors import SourceError

SHARD = "model-00002-of-00002.safetensors"
CARD = {"README.md": b"---\nlicense: mit\n---\n# An older card\n"}


# A folder


def test_a_checkpoint_is_config_and_shards(tiny: Path) -> None:
    found = open_checkpoint(tiny)
    assert found.config == json.loads((tiny / "config.json").read_text())
    assert [s.name for s in found.shards] == ["model-00001-of-00002.safetensors", SHARD]
    assert (found.repo, found.revision) == ("", "")
    weight_map = json.loads((tiny / "model.safetensors.index.json").read_text())["weight_map"]
    assert found.sizes.keys() == weight_map.keys()
    for shard in found.shards:
        data = shard.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        entries = {k: v["data_offsets"] for k, v in json.loads(data[8 : 8 + length]).items() if k != "__metadata__"}
        assert {name: found.sizes[name] for name in entries} == {name: b - a for name, (a, b) in entries.items()}


def test_a_single_unindexed_shard_will_do(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors.index.json").unlink()
    (checkpoint / SHARD).rename(checkpoint / "model.safetensors")
    (checkpoint / "model-00001-of-00002.safetensors").unlink()
    assert [s.name for s in open_checkpoint(checkpoint).shards] == ["model.safetensors"]


def damage(checkpoint: Path, how: str) -> None:
    shard, config, index = (checkpoint / n for n in (SHARD, "config.json", "model.safetensors.index.json"))
    data = shard.read_bytes()
    header = struct.unpack("<Q", data[:8])[0]
    match how:
        case "missing shard" | "a folder for a shard":
            shard.unlink()
            if how.startswith("a folder"):
                shard.mkdir()
        case "truncated shard":
            shard.write_bytes(data[:-1])
        case "truncated header":
            shard.write_bytes(data[: header // 2])
        case "empty shard":
            shard.write_bytes(b"")
        case "overlong shard":
            shard.write_bytes(data + b"\0")
        case "header of another kind":
            shard.write_bytes(struct.pack("<Q", 2) + b"[]")
        case "text shard":
            shard.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3383888\n")
        case "no config":
            config.unlink()
        case "binary config":
            config.write_bytes(b"\xff\xfe\x00")
        case "config of another kind":
            config.write_text("[]")
        case "no model_type":
            config.write_text("{}")
        case "index of another kind":
            index.write_text('{"weight_map": []}')
        case "no safetensors":
            for path in [*checkpoint.glob("*.safetensors"), index]:
                path.unlink()
            (checkpoint / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("missing shard", f"1 of 2 shards are missing, the first is {SHARD}"),
        ("a folder for a shard", f"the first is {SHARD}"),
        ("truncated shard", " bytes where its header says "),
        ("truncated header", "the header is cut short"),
        ("empty shard", f"{SHARD}: not a whole safetensors file"),
        ("overlong shard", " bytes where its header says "),
        ("header of another kind", f"{SHARD}: not a whole safetensors file"),
        ("text shard", f"{SHARD}: not a whole safetensors file"),
        ("no config", "has no config.json"),
        ("binary config", "config.json"),
        ("config of another kind", "config.json is not a JSON object"),
        ("no model_type", "names no model_type"),
        ("index of another kind", "has no weight_map"),
        ("no safetensors", "holds no .safetensors file"),
    ],
)
def test_an_incomplete_checkpoint_is_an_error_that_names_the_file(checkpoint: Path, how: str, says: str) -> None:
    damage(checkpoint, how)
    with pytest.raises(SourceError) as caught:
        open_checkpoint(checkpoint)
    assert says in str(caught.value)
    assert str(checkpoint) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere", "../nowhere/model", "~/nowhere", "org/name/more", ".hidden"])
def test_a_path_never_becomes_a_question_to_the_hub(name: str) -> None:
    with pytest.raises(SourceError, match="no such folder") as caught:
        open_checkpoint(name)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: apache-2.0\ntags: [moe]\n---\n# A model", "apache-2.0"),
        ("---\nlanguage:\n- en\nlicense: 'cc-by-4.0'\n---\n", "cc-by-4.0"),
        ("---\nlicense:\n- mit\nlanguage: en\n---\n", "mit"),
        ("---\nlicense:\nlanguage: en\n---\n", ""),
        ("---\nlicense_name: own\n---\nlicense: mit\n", ""),
        ("# A model\n\nlicense: mit\n", ""),
        ("", ""),
    ],
)
def test_the_licence_is_what_the_cards_front_matter_says(tmp_path: Path, card: str, licence: str) -> None:
    (tmp_path / "README.md").write_text(card)
    assert Checkpoint(tmp_path, {}, []).licence() == licence


def test_a_folder_without_a_card_has_no_licence(tmp_path: Path) -> None:
    assert Checkpoint(tmp_path, {}, []).licence() == ""


def test_the_bundle_is_the_tokenizer_and_never_code(checkpoint: Path) -> None:
    (checkpoint / "modeling_tiny.py").write_text("raise SystemExit")
    (checkpoint / "tokenization_tiny.py").write_text("raise SystemExit")
    (checkpoint / "chat_template.jinja").write_text("{{ messages }}")
    (checkpoint / "merges.txt").write_text("")
    bundle = open_checkpoint(checkpoint).bundle()
    names = {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"}
    assert bundle == {name: (checkpoint / name).read_bytes() for name in names}


def test_the_fingerprint_tells_sources_apart(checkpoint: Path, tiny: Path) -> None:
    before = open_checkpoint(checkpoint).fingerprint()
    assert open_checkpoint(checkpoint).fingerprint() == before
    os.utime(checkpoint / SHARD, (1, 1))
    touched = open_checkpoint(checkpoint).fingerprint()
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"rope_theta": 1.0}))
    assert len({before, touched, open_checkpoint(checkpoint).fingerprint()}) == 3


# The hub


@pytest.fixture(scope="module")
def hub(tiny: Path) -> Iterator[Hub]:
    """One public repository with two revisions, a gated and a private one."""
    with serve() as hub:
        for name, repo in {
            "org/tiny": Repo(),
            "org/gated": Repo(token="accepted", gated=True),
            "org/private": Repo(token="mine"),
        }.items():
            hub.repos[name] = repo
            repo.commit(tiny, "old", CARD)
            repo.commit(tiny)
        yield hub


def online(hub: Hub, home: Path, **changes: str | None) -> dict[str, str]:
    return CommandLine.environment(**{"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": None} | changes)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the hub's that `anonymous` warms."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def anonymous(hub: Hub, home: Path, cli: CommandLine) -> dict[str, Outcome]:
    """What commands without a token get, by name; each wrote NAME.squizd into `home` or failed."""
    old = hub.repos["org/tiny"].refs["old"]
    sources = {
        "main": ["org/tiny", "--keep-source"],
        "branch": ["org/tiny", "--revision", "old"],
        "commit": ["org/tiny", "--revision", old],
        "unknown repository": ["org/nothing"],
        "unknown revision": ["org/tiny", "--revision", "nothing"],
        "gated": ["org/gated"],
        "private": ["org/private"],
    }
    commands = [["compress", *s, "-o", home / f"{n}.squizd", "--quantizer", "minmax"] for n, s in sources.items()]
    return dict(zip(sources, cli.several(*commands, env=online(hub, home)), strict=True))


def test_a_repository_gives_what_its_folder_gives(
    hub: Hub, home: Path, anonymous: dict[str, Outcome], tiny_file: Callable[..., Path]
) -> None:
    anonymous["main"].success()
    downloaded, local = contents(home / "main.squizd"), contents(tiny_file())
    source = downloaded["metadata"]["provenance"]["source"]
    assert source.pop("repo") == "org/tiny"
    assert source.pop("revision") == hub.repos["org/tiny"].refs["main"]
    assert downloaded == local


@pytest.mark.parametrize("name", ["branch", "commit"])
def test_a_revision_is_pinned_and_recorded(hub: Hub, home: Path, anonymous: dict[str, Outcome], name: str) -> None:
    anonymous[name].success()
    metadata = contents(home / f"{name}.squizd")["metadata"]
    assert metadata["provenance"]["source"]["revision"] == hub.repos["org/tiny"].refs["old"]
    assert metadata["licence"] == "mit"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("unknown repository", "org/nothing: no such folder, and no such repository on the hub\nhint: check the name"),
        ("unknown revision", "org/tiny has no revision nothing\n"),
        ("gated", "org/gated is gated\nhint: accept its terms on the hub and set HF_TOKEN"),
        ("private", "org/private: no such folder, and no such repository on the hub\nhint: check the name, or set HF"),
    ],
)
def test_what_the_hub_refuses_is_one_line_and_a_hint(
    home: Path, anonymous: dict[str, Outcome], name: str, says: str
) -> None:
    assert says in anonymous[name].failure()
    assert not list(home.glob(f"{name}.squizd*"))


def test_a_token_opens_what_it_is_for_and_goes_to_nobody_else(hub: Hub, tmp_path: Path, cli: CommandLine) -> None:
    hub.seen.clear()
    opened, other = cli.several(
        ["compress", "org/gated", "-o", tmp_path / "gated.squizd", "--quantizer", "minmax"],
        ["compress", "org/private", "-o", tmp_path / "private.squizd"],
        env=online(hub, tmp_path, HF_TOKEN="accepted"),
    )
    opened.success()
    assert "no such repository" in other.failure()
    assert {token for _, path, token, _ in hub.seen if path.startswith("/org/gated/")} == {"accepted"}
    assert {token for _, path, token, _ in hub.seen if path.startswith("/store/")} == {""}


def test_a_token_that_nobody_issued_is_named_as_the_cause(hub: Hub, tmp_path: Path, cli: CommandLine) -> None:
    env = online(hub, tmp_path, HF_TOKEN="stale")
    outcome = cli.process("compress", "org/private", "-o", tmp_path / "x.squizd", env=env)
    assert outcome.failure().endswith("hint: check HF_TOKEN\n")


def test_offline_a_warm_cache_does_and_nobody_is_asked(
    hub: Hub, home: Path, anonymous: dict[str, Outcome], tmp_path: Path, cli: CommandLine
) -> None:
    anonymous["main"].success()
    hub.seen.clear()
    args = ["compress", "org/tiny", "--quantizer", "minmax", "-o"]
    cli.process(*args, tmp_path / "x.squizd", env=online(hub, home, HF_HUB_OFFLINE="1")).success()
    assert (tmp_path / "x.squizd").read_bytes() == (home / "main.squizd").read_bytes()
    assert not hub.seen


def test_offline_a_cold_cache_is_an_error(hub: Hub, tmp_path: Path, cli: CommandLine) -> None:
    hub.seen.clear()
    env = online(hub, tmp_path, HF_HUB_OFFLINE="1")
    outcome = cli.process("compress", "org/tiny", "-o", tmp_path / "x.squizd", env=env)
    assert "the hub cannot be reached\nhint: check the network, or unset HF_HUB_OFFLINE" in outcome.failure()
    assert not hub.seen


def test_an_endpoint_that_does_not_answer_is_one_line(hub: Hub, tmp_path: Path, cli: CommandLine) -> None:
    env = online(hub, tmp_path, HF_ENDPOINT="http://127.0.0.1:1")
    outcome = cli.process("compress", "org/tiny", "-o", tmp_path / "x.squizd", env=env)
    assert "org/tiny: no such folder, and the hub cannot be reached" in outcome.failure()


def test_a_broken_download_is_one_line_and_the_next_run_completes_it(
    hub: Hub, tmp_path: Path, cli: CommandLine, tiny_file: Callable[..., Path]
) -> None:
    command = ["compress", "org/tiny", "--quantizer", "minmax", "-o", tmp_path / "x.squizd"]
    hub.faults[:] = ["reset", "reset"]
    outcome = cli.process(*command, env=online(hub, tmp_path))
    assert "org/tiny: download failed: " in outcome.failure()
    assert "internal error" not in outcome.err
    assert not (tmp_path / "x.squizd").exists()

    hub.seen.clear()
    hub.faults[:] = ["close"]  # once midway: the client asks again by itself
    cli.process(*command, env=online(hub, tmp_path)).success()
    wholes = [part for _, path, _, part in hub.seen if path.startswith("/store/") and part != "bytes=0-100000"]
    assert len(wholes) == 3
    assert not list(tmp_path.glob("x.squizd.*"))
    assert contents(tmp_path / "x.squizd")["experts"] == contents(tiny_file())["experts"]


def test_hashes_are_those_of_the_files(tiny: Path) -> None:
    assert open_checkpoint(tiny).hashes() == [
        {"name": p.name, "size": p.stat().st_size, "sha256": hashlib.sha256(p.read_bytes()).hexdigest()}
        for p in sorted(tiny.glob("*.safetensors"))
    ]


def test_hashing_ends_soon_after_it_is_told_to(tmp_path: Path) -> None:
    shard, stop = tmp_path / "model.safetensors", threading.Event()
    shard.touch()
    os.truncate(shard, 1 << 36)  # 64 GiB of nothing
    stop.set()
    assert len(Checkpoint(tmp_path, {}, [shard]).hashes(stop)) == 1
