"""`squizd eval`: every figure against a direct computation, and the ways text can be wrong."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import mlx.core as mx
import numpy as np
import pytest
from conftest import CommandLine

import squizd
from squizd import corpus, report
from squizd.errors import TextError
from squizd.evaluation import Result, agreement, clustered_mean, divergence, evaluate

ROWS = [
    "The city was founded in the year of the great fire, and the river",
    "A war began between the two kingdoms because of the northern island and its people.",
    "She was born in the capital, where her father taught music at the school.",
]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in ROWS))
    return path


def logits(path: Path, ids: list[int]) -> np.ndarray:
    model, _ = squizd.load(path)
    return np.array(model(mx.array([ids]))[0].astype(mx.float32)).astype(np.float64)


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def test_figures_are_those_of_a_direct_float64_computation(
    tiny: Path, tiny_file: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    file, reference = tiny_file("int3"), tiny_file("keep")
    found = evaluate(str(file), corpus.read(text), reference=str(tiny), context=12, cache=tmp_path / "c")
    _, tokenizer = squizd.load(file)
    klds, losses, same = [], [], []
    for row in ROWS:
        ids = tokenizer.encode(row)[:12]
        p, q = log_softmax(logits(reference, ids)[:-1]), log_softmax(logits(file, ids)[:-1])
        klds.append((np.exp(p) * (p - q)).sum(axis=-1))
        losses.append(-q[np.arange(len(ids) - 1), ids[1:]])
        same.append(p.argmax(axis=-1) == q.argmax(axis=-1))
    kld = np.concatenate(klds)
    assert found.tokens == kld.size
    assert found.kld_mean == pytest.approx(kld.mean(), rel=2e-3)  # log-probabilities are kept as float16
    assert found.kld_median == pytest.approx(np.median(kld), rel=5e-3)
    assert found.kld_999 == pytest.approx(np.quantile(kld, 0.999), rel=5e-3)
    assert found.kld_max == pytest.approx(kld.max(), rel=5e-3)
    assert found.perplexity == pytest.approx(math.exp(np.concatenate(losses).mean()), rel=1e-5)
    assert found.top1_agreement == pytest.approx(np.concatenate(same).mean())
    assert 0.5 < min(found.router_agreement.values()) < 1
    with squizd.open(file) as f:
        assert list(found.router_agreement) == [layer.path for layer in f.moe_layers]
        stored = sum(t.weight_bytes for t, _ in f.residents.values())
        stored += sum(x.expert_count * sum(t.weight_bytes for t in f.layouts[f.expert(x.layer, 0).layout].tensors)
                      for x in f.moe_layers)  # fmt: skip
    assert found.bits_per_weight == stored * 8 / found.parameters
    assert (found.weight_bytes, found.file_bytes) == (stored, file.stat().st_size)
    assert found.memory_bytes >= stored


def test_a_file_against_itself_and_against_another_file(
    tiny_file: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"context": 12, "cache": tmp_path / "c"}
    same = evaluate(str(tiny_file()), corpus.read(text), reference=str(tiny_file()), **options)
    assert same.kld_max is not None
    assert same.kld_max < 1e-5
    assert same.top1_agreement == 1
    assert set(same.router_agreement.values()) == {1.0}
    assert same.perplexity == same.reference_perplexity
    paged = evaluate(tiny_file(), text, reference=str(tiny_file()), memory="120MB", **options)
    assert paged.perplexity == same.perplexity
    alone = evaluate(str(tiny_file()), corpus.read(text), context=12)
    assert (alone.kld_mean, alone.perplexity) == (None, same.perplexity)


def test_the_reference_runs_once(
    tiny: Path, tiny_file: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from squizd import evaluation

    options: dict[str, Any] = {"context": 12, "reference": str(tiny), "cache": tmp_path / "c"}
    first = evaluate(str(tiny_file()), corpus.read(text), **options)
    with monkeypatch.context() as m:
        m.setattr(evaluation, "_load_checkpoint", None)
        assert evaluate(str(tiny_file()), corpus.read(text), **options) == first
    kept = list((tmp_path / "c").iterdir())
    assert len(kept) == 1
    evaluate(str(tiny_file()), corpus.read(text), **{**options, "context": 10})  # other windows
    assert len(list((tmp_path / "c").iterdir())) == 2


def test_divergence_agreement_and_errors_of_means() -> None:
    source = np.random.default_rng(1)
    p, q = (log_softmax(source.normal(size=(50, 300)) * 3) for _ in range(2))
    expected = (np.exp(p) * (p - q)).sum(axis=-1)
    np.testing.assert_allclose(divergence(mx.array(p.astype(np.float32)), mx.array(q.astype(np.float32))), expected,
                               rtol=1e-4)  # fmt: skip
    assert agreement(np.array([[1, 2, 3], [4, 5, 6]]), np.array([[3, 1, 9], [4, 6, 5]])) == [pytest.approx(2 / 3), 1]
    values = source.normal(size=2000)
    mean, error = clustered_mean([values[i : i + 1] for i in range(2000)])
    assert mean == pytest.approx(values.mean())
    assert error == pytest.approx(values.std(ddof=1) / math.sqrt(2000), rel=1e-3)
    _, tied = clustered_mean([np.repeat(v, 10) for v in values[:200]])  # ten copies are no ten observations
    assert tied == pytest.approx(values[:200].std(ddof=1) / math.sqrt(200), rel=1e-6)


def test_command_prints_json_and_writes_a_page_that_needs_nothing(
    tiny: Path, tiny_file: Callable[..., Path], text: Path, tmp_path: Path, cli: CommandLine
) -> None:
    page = tmp_path / "page.html"
    files = [tiny_file(), tiny_file("int2")]
    options = ["--text", text, "--reference", tiny, "--context", "12", "--cache", tmp_path / "c"]
    outcome = cli("eval", *files, *options, "--report", page, "--json").success()
    rows = [json.loads(line) for line in outcome.out.splitlines()]
    assert [row["file"] for row in rows] == [str(f) for f in files]
    assert 0 < rows[0]["kld_mean"] < rows[1]["kld_mean"]
    html = page.read_text("utf-8")
    assert not re.search(r"(src|href)=|<script|@import|url\(", html)
    (svg,) = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    circles = [e for e in ElementTree.fromstring(svg).iter() if e.tag.endswith("circle")]
    assert len(circles) == 2
    assert float(circles[0].attrib["cx"]) < float(circles[1].attrib["cx"])  # more bits
    assert float(circles[0].attrib["cy"]) < float(circles[1].attrib["cy"])  # less divergence: further down
    for row in rows:
        assert row["file_id"] in html
        assert f"{row['kld_mean']:.5f} ± {row['kld_mean_error']:.5f}" in html
    assert rows[0]["text_sha256"] in html
    assert str(tiny) not in html  # where things lie here is nobody's business
    assert "KL divergence" in cli("eval", files[0], *options).success().out


def test_page_escapes_names_and_takes_a_divergence_of_zero() -> None:
    result = Result(
        "<b>.squizd", "r", 4.5, 10, 5, 7, 9, 1, 2, 3.0, 0.1, 3.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, {"l": 1.0}
    )
    html = report.page([result])
    assert "<b>" not in html
    assert "&lt;b&gt;.squizd" in html


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "is empty"),
        ("a.jsonl", b"\n\n", "is empty"),
        ("a.txt", b"\x80\x81 text", "is not text"),
        ("a.txt", b"text\0text", "is not text: byte 4"),
        ("a.jsonl", b'{"text": "x"}\n{"txt": 1}\n', 'line 2 has no "text"'),
        ("a.jsonl", b"{", "line 1"),
        ("a.txt", b"Few words.", "too short"),
    ],
)
def test_text_that_cannot_be_used(
    name: str, content: bytes, message: str, tiny_file: Callable[..., Path], tmp_path: Path, cli: CommandLine
) -> None:
    (tmp_path / name).write_bytes(content)
    assert message in cli("eval", tiny_file(), "--text", tmp_path / name).failure()


def test_windows() -> None:
    texts = corpus.Corpus("x", ("abcdefg", "hi", "j", "klmnop"), "0" * 64, 1)

    def encode(text: str) -> list[int]:
        return [ord(c) for c in text]

    assert ["".join(map(chr, w)) for w in corpus.leading_windows(texts, encode, 5, 9)] == ["abcde", "hi", "klmno"]
    assert ["".join(map(chr, w)) for w in corpus.leading_windows(texts, encode, 5, 2)] == ["abcde"]  # "j" is too short
    one = corpus.Corpus("x", ("abcdefg",), "0" * 64, 1)
    assert ["".join(map(chr, w)) for w in corpus.leading_windows(one, encode, 3, 9)] == ["abc", "def"]
    for seed in range(20):
        drawn = corpus.sampled_windows(texts, encode, 5, 9, seed)
        assert [len(w) for w in drawn] == [5, 5, 5]
        letters = [c for w in drawn for c in w]
        assert len(set(letters)) == 15
        assert drawn == corpus.sampled_windows(texts, encode, 5, 9, seed)
    assert len({str(corpus.sampled_windows(texts, encode, 5, 9, seed)) for seed in range(20)}) > 5
    with pytest.raises(TextError, match="16 tokens, one context has 17"):
        corpus.sampled_windows(texts, encode, 17, 9, 0)


def test_a_long_text_is_tokenized_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """At lines, else at spaces, else anywhere; nothing is lost, and nothing is tokenized in vain."""
    monkeypatch.setattr(corpus, "PIECE", 10)
    seen = list[str]()

    def encode(text: str) -> list[int]:
        seen.append(text)
        return list(map(ord, text))

    text = "one line\n\nand more words thanfitonaline\n1234567890"
    drawn = corpus.sampled_windows(corpus.Corpus("x", (text,), "0" * 64, 1), encode, 1, 99, 0)
    assert sorted(seen) == sorted(["one line\n\n", "and more ", "words ", "thanfitona", "line\n", "1234567890"])
    assert sorted(drawn) == sorted([ord(c)] for c in text)
    seen.clear()
    corpus.sampled_windows(corpus.Corpus("x", (text * 100,), "0" * 64, 1), encode, 1, 4, 0)
    assert len(seen) <= 16


def test_a_folder_is_read_by_name(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("two")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "c.bin").write_bytes(b"\0")
    found = corpus.read(tmp_path)
    assert found.texts == ("one", "two")
    assert found.size == 16 + 3
    assert [corpus.first_texts(tmp_path, most) for most in (0, 2, 9)] == [["one"], ["one"], ["one", "two"]]
    (tmp_path / "b.txt").write_text("too")
    assert corpus.read(tmp_path).sha256 != found.sha256
