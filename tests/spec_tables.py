"""Reads the tables of spec/*.md that a comment names: `<!-- name -->`, then rows between bars."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
SPEC = (ROOT / "spec" / "squizd.md").read_text("utf-8")
REGISTRIES = (ROOT / "spec" / "registries.md").read_text("utf-8")


def rows(text: str) -> list[list[str]]:
    """The cells of the first table in `text`, without its two heading lines."""
    lines = text[text.index("\n|") :].strip().splitlines()
    table = []
    for line in lines:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in line.strip()[1:-1].split("|")])
    return table[2:]


def table(name: str) -> list[list[str]]:
    """The rows of the spec's table `name`."""
    marker = f"<!-- {name} -->"
    assert SPEC.count(marker) == 1, name
    return rows(SPEC[SPEC.index(marker) :])


def tables(prefix: str) -> dict[str, list[list[str]]]:
    """All tables whose name starts with `prefix`, by the rest of the name, in order."""
    return {found: table(prefix + found) for found in re.findall(f"<!-- {prefix}(.*) -->", SPEC)}


def registry(heading: str) -> list[list[str]]:
    """The rows of a registry."""
    return rows(REGISTRIES[REGISTRIES.index(f"\n## {heading}\n") :])


def section(heading: str) -> str:
    """The text of one numbered section of the spec."""
    start = SPEC.index(f"\n## {heading}\n")
    end = SPEC.find("\n## ", start + 1)
    return SPEC[start : end if end >= 0 else None]


def number(cell: str) -> int:
    """64, 2^24, or 2^53 - 1."""
    found = re.fullmatch(r"(\d+)(?:\^(\d+))?(?: - (\d+))?", cell)
    assert found, cell
    return int(int(found[1]) ** int(found[2] or 1)) - int(found[3] or 0)
