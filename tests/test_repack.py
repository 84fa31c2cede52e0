"""Repacking changes the container and never the values."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import squizd
from squizd.container import Writer
from squizd.container.layout import Encoding
from squizd.errors import OutputError, RequestError
from squizd.repack import _plan, _records, repack, same_payload

VALID = Path(__file__).parent.parent / "fixtures" / "valid"


def decoded(path: Path | str) -> dict[str, bytes]:
    """Every record's decoded bytes by name."""
    with squizd.open(path) as f:
        found = {name: bytes(f.read(record, name)) for name, (_, record) in f.residents.items()}
        found |= {
            f"{x.layer}:{e}": bytes(f.read_expert(x.layer, e)) for x in f.moe_layers for e in range(x.expert_count)
        }
        return found | f.bundle()


def test_there_and_back_gives_the_same_bytes(tiny_file: Callable[..., Path], tmp_path: Path) -> None:
    raw, small, back = tiny_file(), tmp_path / "small.squizd", tmp_path / "back.squizd"
    repack(raw, small, codec="zstd")
    repack(small, back, codec="raw")
    assert small.stat().st_size < raw.stat().st_size
    assert decoded(small) == decoded(raw)
    assert back.read_bytes() == raw.read_bytes()
    assert squizd.validate(small, deep=True).ok


@pytest.mark.parametrize("path", sorted(VALID.glob("*.squizd")), ids=lambda p: p.stem)
def test_every_vector_can_be_repacked(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.squizd"
    repack(path, out)
    assert squizd.validate(out, deep=True).ok
    assert decoded(out) == decoded(path)
    with squizd.open(path) as a, squizd.open(out) as b:
        assert a.metadata == b.metadata
        assert [s.type for s in a.sections] == [s.type for s in b.sections]


def test_appendices_come_and_go(tmp_path: Path) -> None:
    source, bare, again = VALID / "appendices.squizd", tmp_path / "bare.squizd", tmp_path / "again.squizd"
    with squizd.open(source) as f:
        kinds = [s.type.decode() for s in f.sections if not s.critical and s.type != b"DRFT"]
        profile = b"".join(json.dumps(d).encode() + b"\n" for d in f.appendix(b"PROF"))
    repack(source, bare, drop=kinds)
    with squizd.open(bare) as f:
        assert [s.type for s in f.sections if not s.critical] == [b"DRFT"]
    repack(bare, again, add={"PROF": profile})
    with squizd.open(source) as a, squizd.open(again) as b:
        assert a.appendix(b"PROF") == b.appendix(b"PROF")
    assert squizd.validate(again, deep=True).ok


def test_what_cannot_be_is_refused_and_writes_nothing(tmp_path: Path) -> None:
    source, out = VALID / "toy.squizd", tmp_path / "out.squizd"
    cases: list[tuple[dict[str, Any], str]] = [
        ({"drop": ["PROF"]}, "no appendix PROF"),
        ({"add": {"NOPE": b"{}"}}, "no appendix type"),
        ({"codec": "lz4"}, "no codec"),
    ]
    for options, message in cases:
        with pytest.raises(RequestError, match=message):
            repack(source, out, **options)
    with pytest.raises(RequestError, match="sparsity appendix"):
        repack(VALID / "appendices.squizd", out, codec="zstd")
    with pytest.raises(RequestError, match="draft head"):
        repack(VALID / "appendices.squizd", out, drop=["DRFT"])
    with pytest.raises(OutputError, match="is the file to repack"):
        repack(source, source, force=True)
    assert not list(tmp_path.iterdir())


def test_a_draft_head_is_carried_along_and_does_not_disturb_the_model(
    tiny_file: Callable[..., Path], tmp_path: Path
) -> None:
    out, again = tmp_path / "draft.squizd", tmp_path / "again.squizd"
    with squizd.open(tiny_file()) as f:
        plan = _plan(f, "raw", {b"DRFT": b'{"appendix":"draft","version":1}\n'})
        plan.residents.append(("draft.fc.weight", "draft", Encoding("raw", "f32"), (2, 2)))
        with Writer(out, plan) as writer:
            records = list(_records(f))
            for position, (tensors, record, what) in enumerate(records):
                if position == len(f.residents):
                    writer.write([[np.ones((2, 2), np.float32)]])
                raw = f.read(record, what)
                writer.write([[raw[at : at + size] for _, at, size in t.parts] for t in tensors])
            writer.finish()
    repack(out, again, codec="zstd")
    with squizd.open(again) as f:
        assert f.array("draft.fc.weight").tolist() == [[1, 1], [1, 1]]
    ids = mx.array([[3, 4, 5]])
    assert mx.array_equal(squizd.load(again)[0](ids), squizd.load(tiny_file())[0](ids))


def test_same_payload_sees_one_changed_value(tiny_file: Callable[..., Path]) -> None:
    with squizd.open(tiny_file()) as a, squizd.open(tiny_file(quantizer="mse")) as b:
        assert same_payload(a, a)
        assert not same_payload(a, b)


def test_inspect_shows_an_expert_and_a_tensor(cli: Any, tiny_file: Callable[..., Path]) -> None:
    path = tiny_file()
    found = json.loads(
        cli("inspect", path, "--expert", "2:5", "--tensor", "model.embed_tokens.weight", "--json").success().out
    )
    assert [t["name"] for t in found] == [
        "model.embed_tokens.weight",
        "gate_proj.weight",
        "up_proj.weight",
        "down_proj.weight",
    ]
    with squizd.open(path) as f:
        values = f.expert_arrays(2, 5)["up_proj.weight"]
        assert found[2]["record"]["offset"] == f.expert(2, 5).offset
    assert found[2]["shape"] == list(values.shape)
    np.testing.assert_allclose([found[2]["min"], found[2]["max"]], [values.min(), values.max()])
    assert "affine 4-bit g64" in cli("inspect", path, "--expert", "0:0").success().out
    cli("inspect", path, "--expert", "0:99").failure()
    cli("inspect", path, "--expert", "zero").failure()
    cli("inspect", path, "--tensor", "nothing").failure()
