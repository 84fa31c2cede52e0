"""The fuzzing tools in tools/fuzz work, without atheris; a few hundred of their mutations on the way."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "tools" / "fuzz"))
import flips
import mutators
import target

ROOT = Path(__file__).parent.parent
INVALID = ROOT / "fixtures" / "invalid"

VALID = {
    p.stem: p.read_bytes()
    for p in sorted((ROOT / "fixtures" / "valid").glob("*.squizd"))
    if p.stem not in ("aligned", "line-limits")
}


@pytest.mark.parametrize("name", VALID)
def test_mutations_keep_the_promises(name: str, tmp_path: Path) -> None:
    def generic(data: bytes, largest: int) -> bytes:
        out = bytearray(data)
        for _ in range(source.randrange(1, 4)):
            out[source.randrange(len(out))] = source.randrange(256)
        return bytes(out[:largest])

    source, data, found = random.Random(name), VALID[name], set[str]()
    for seed in range(40):
        changed = mutators.mutate(data, target.LARGEST, seed, generic)
        found.add(target.check(tmp_path / "mutated.squizd", changed))
        if seed % 4 == 0:
            data = VALID[name]
        elif changed[:4] == data[:4]:
            data = changed
    assert len(found) > 3


def test_small_buffers_change_no_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (target.payload, target.validator):
        for name in ("PIECE", "_DECODED"):
            monkeypatch.setattr(module, name, getattr(module, name))  # to be put back
    monkeypatch.setattr(target.frames, "_STEP", target.frames._STEP)
    target.small_buffers()
    assert target.payload.PIECE == target.validator.PIECE == 4096
    for rule in json.loads((INVALID / "index.json").read_text()):
        assert target.check(tmp_path / "x.squizd", (INVALID / rule["file"]).read_bytes()) == rule["code"]
    for name, data in VALID.items():
        assert target.check(tmp_path / "x.squizd", data) == "", name


def test_digests_are_made_right_where_they_are() -> None:
    for name, data in VALID.items():
        assert mutators.reseal_all(bytearray(data)) == data, name
        assert len(mutators.records(bytearray(data))) > 0


def test_an_appendix_can_grow(tmp_path: Path) -> None:
    data = bytearray(VALID["two-forms"])
    entry = next(at for at in mutators.entries(data) if data[at : at + 4] == b"SPRS")
    offset, size = mutators.spans(data)[b"SPRS"]
    content = bytes(data[offset : offset + size]).replace(b"{", b"{" + b" " * 99)
    data = mutators.replace_appendix(data, entry, content)
    data[32:40] = len(data).to_bytes(8, "little")
    assert target.check(tmp_path / "grown.squizd", bytes(mutators.reseal_all(data))) == ""


def test_flips_stop_when_time_is_up_and_refuse_invalid_files(tmp_path: Path) -> None:
    assert flips.flip(tmp_path / "x.squizd", VALID["toy"], range(100), until=0) == ([], 0)
    with pytest.raises(ValueError, match="not valid"):
        flips.flip(tmp_path / "x.squizd", VALID["toy"][:-1], range(1))
