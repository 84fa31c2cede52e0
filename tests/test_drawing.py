"""Charts: scales hold their values, and what is written can be read."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from squizd.drawing import HEIGHT, WIDTH, Chart, Scale, linear, logarithmic

VALUES = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=9)


@given(VALUES, st.booleans())
def test_scales_hold_their_values_in_order_between_few_round_labels(values: list[float], log: bool) -> None:
    scale = logarithmic(values) if log else linear(values)
    assert scale.low <= min(values) * (1 + 1e-9)
    assert scale.high >= max(values) * (1 - 1e-9)
    places = [scale.share(v) for v in sorted(values)]
    assert places == sorted(places)
    assert all(0 <= place <= 1 for place in places)
    assert 1 <= len(scale.labels) <= 13
    for value, text in scale.labels.items():
        assert float(text) == pytest.approx(value, rel=1e-4)
        assert re.fullmatch(r"[125]0*|0|[\d.e+-]+", text)


def test_a_logarithmic_scale_puts_the_mean_of_logarithms_in_the_middle() -> None:
    assert Scale(0.01, 100.0, {}, (), True).share(1.0) == 0.5
    assert logarithmic([0.03, 0.7]).labels == {0.02: "0.02", 0.05: "0.05", 0.1: "0.1", 0.2: "0.2", 0.5: "0.5", 1.0: "1"}


def chart(points: list[tuple[float, float, str]]) -> ElementTree.Element:
    x, y = linear([p[0] for p in points]), logarithmic([p[1] for p in points])
    made = Chart(x, y, "title <1>", "what it shows", x_title="x & more", y_title="y", note="a note " * 40)
    for h, v, name in points:
        made.point(h, v, v / 50, name, f"{name} exactly")
    return ElementTree.fromstring(made.svg())


def test_names_do_not_cover_each_other_or_points() -> None:
    names = [f"a-file-of-some-length-{i}" for i in range(9)]
    found = chart(
        [(4.5 + 0.02 * (i % 3), 0.05 * 1.02**i, name) for i, name in enumerate(names)] + [(8.5, 0.001, "far")]
    )
    boxes = []
    for e in found.iter("{http://www.w3.org/2000/svg}text"):
        if e.text in names or e.text == "far":
            left, base = float(e.attrib["x"]), float(e.attrib["y"])
            boxes.append((left, base - 10, left + 6.2 * len(e.text or ""), base + 2))
    assert len(boxes) == 10
    dots = [(float(e.attrib["cx"]), float(e.attrib["cy"])) for e in found.iter("{http://www.w3.org/2000/svg}circle")]
    for i, a in enumerate(boxes):
        assert 0 <= a[0] < a[2] <= WIDTH
        assert 0 <= a[1] < a[3] <= HEIGHT
        assert not any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for b in boxes[:i])
        assert not any(a[0] - 3 < x < a[2] + 3 and a[1] - 3 < y < a[3] + 3 for x, y in dots)


def test_a_picture_is_described_escaped_and_needs_nothing_else() -> None:
    found = chart([(4.5, 0.1, "<b>")])
    texts = [e.text for e in found.iter() if e.text]
    assert "title <1>" in texts
    assert "what it shows" in texts
    assert "x & more" in texts
    assert "<b> exactly" in texts
    text = ElementTree.tostring(found, "unicode")
    assert not re.search(r"href|url\(|@import|<script", text)
    assert "prefers-color-scheme: dark" in text
