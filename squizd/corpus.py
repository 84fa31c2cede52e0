"""Text to measure or calibrate with: files as lists of texts, texts as windows of tokens.

Knows jsonl (rows with a "text"), plain text, and folders of both. Knows no model.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import TextError

_SUFFIXES = (".jsonl", ".txt", ".md", ".text")
PIECE = 1 << 16  # characters of a text that are tokenized at once: tokenizers take some 200 bytes for each
_JSONL = "a jsonl file has one object with a text per line"


@dataclass(frozen=True)
class Corpus:
    """Texts in file order, and what provenance needs: SHA-256 and size in bytes of all files together."""

    name: str
    texts: tuple[str, ...]
    sha256: str
    size: int


def read(path: str | os.PathLike[str]) -> Corpus:
    """The texts of a file, or of all .jsonl, .txt, .md and .text files in a folder (by name, folders within included).

    A .jsonl file gives one text per row, any other file is one text. Raises TextError for what is absent,
    empty, binary (not UTF-8, or with NUL characters) or not as its name says.
    """
    root = Path(path)
    digest, size, texts = hashlib.sha256(), 0, list[str]()
    for file, data in _contents(root):
        digest.update(len(data).to_bytes(8, "little") + data)
        size += len(data)
        texts += _texts(file, data)
    if not any(text.strip() for text in texts):
        raise TextError(f"{root} is empty: there is no text in it")
    return Corpus(root.name, tuple(texts), digest.hexdigest(), size)


def first_texts(path: str | os.PathLike[str], characters: int) -> list[str]:
    """The texts of `read` that are not blank, until they have so many characters together."""
    found, size = list[str](), 0
    for file, data in _contents(Path(path)):
        for text in _texts(file, data):
            if text.strip() and size <= characters:
                found.append(text)
                size += len(text)
        if size > characters:
            break
    if not found:
        raise TextError(f"{path} is empty: there is no text in it")
    return found


def _contents(root: Path) -> Iterator[tuple[Path, bytes]]:
    files = sorted(p for p in root.rglob("*") if p.suffix in _SUFFIXES and p.is_file()) if root.is_dir() else [root]
    if not files:
        raise TextError(f"{root} holds no text", hint="files ending in " + ", ".join(_SUFFIXES) + " are read")
    for file in files:
        try:
            yield file, file.read_bytes()
        except OSError as error:
            raise TextError(f"{file}: {error.strerror or error}") from error


def _texts(file: Path, data: bytes) -> list[str]:
    try:
        content = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TextError(f"{file} is not text: no UTF-8 at byte {error.start}") from error
    if "\0" in content:
        raise TextError(f"{file} is not text: byte {data.index(0)} is NUL")
    if file.suffix != ".jsonl":
        return [content]
    found = []
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise TextError(f"{file} line {number}: {error}", hint=_JSONL) from error
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise TextError(f'{file} line {number} has no "text"', hint=_JSONL)
        found.append(row["text"])
    return found


Encode = Callable[[str], Sequence[int]]


def leading_windows(corpus: Corpus, encode: Encode, context: int, count: int) -> list[list[int]]:
    """For evaluation: the first `context` tokens of each of `count` texts that are spread evenly over the corpus.

    A corpus of one text is cut into pieces of `context` tokens, the first `count` of them. Texts of fewer than
    two tokens are left out. Raises TextError if all texts together are shorter than one context.
    """
    total = len(corpus.texts)
    tokens = (
        [list(encode(corpus.texts[i * total // count])) for i in range(count)]
        if total > count
        else [list(encode(text)) for text in corpus.texts]
    )
    if len(tokens) == 1:
        tokens = [tokens[0][i : i + context] for i in range(0, len(tokens[0]), context)][:count]
    windows = [ids[:context] for ids in tokens if len(ids) > 1]
    _check(corpus, sum(map(len, windows)), context)
    return windows


def sampled_windows(corpus: Corpus, encode: Encode, context: int, count: int, seed: int) -> list[list[int]]:
    """For calibration: up to `count` windows of exactly `context` tokens, drawn by `seed`, no token twice.

    Every text is cut into windows; what is left at its end, shorter than one window, is joined with the
    remainders of others. A text longer than `PIECE` counts as several. Raises TextError if all texts together are
    shorter than one context.
    """
    texts = [piece for text in corpus.texts for piece in _pieces(text)]
    order = list(range(len(texts)))
    source = random.Random(seed)
    source.shuffle(order)
    windows, rest, seen = list[list[int]](), list[int](), 0
    for position in order:
        ids = list(encode(texts[position]))
        seen += len(ids)
        start = source.randrange(len(ids) % context + 1)
        whole = (len(ids) - start) // context
        windows += [ids[start + i * context : start + (i + 1) * context] for i in range(whole)]
        rest += ids[:start] + ids[start + whole * context :]
        while len(rest) >= context:
            windows.append(rest[:context])
            rest = rest[context:]
        if len(windows) >= 4 * count:  # enough to draw from: a large text is not tokenized to its end
            break
    _check(corpus, seen, context)
    source.shuffle(windows)
    return windows[:count]


def _pieces(text: str) -> Iterator[str]:
    """The text in pieces of up to `PIECE` characters, each ending with a line, else with a word if it can."""
    start = 0
    while len(text) - start > PIECE:
        most = start + PIECE
        end = 1 + text.rfind("\n", start, most) or 1 + text.rfind(" ", start, most) or most
        yield text[start:end]
        start = end
    yield text[start:]


def _check(corpus: Corpus, tokens: int, context: int) -> None:
    if tokens < context:
        raise TextError(
            f"{corpus.name} is too short: {tokens} tokens, one context has {context}",
            hint="give more text, or a smaller --context",
        )
