"""A text's routing profile, as the PROF appendix holds it (spec, "Appendices"), and into a file with it.

The text is run through the model token by token in effect (routing does not depend on chunks), each text
from an empty cache. `runtime.profile` is what reads the result.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from .container import appendices
from .container.writer import check_target
from .corpus import first_texts
from .errors import RequestError
from .generation import encode
from .repack import repack
from .runtime.load import load, state
from .runtime.policy import Recall
from .runtime.profile import MEMBER
from .runtime.simulation import curve, decode_calls
from .tracing import Routing, join, trace

Progress = Callable[[int, int], None]
DEFAULT_TOKENS = 8192
_CURVE_TOKENS, _PASSAGE = 4096, 512  # `hits_by_slots` comes from so many tokens, in passages of so many: see LOG
WINDOW = 1024  # tokens of one text that are run at once; the rest of it begins anew
_MOST_CHARACTERS = 1 << 26
_MOST_PAIRS = 1024  # of a layer: every load parses them


def _passages(
    texts: Sequence[str], encode: Callable[[str], list[int]], tokens: int, window: int
) -> Iterator[tuple[int, list[int]]]:
    """(index of its text, token ids) of passages, `tokens` in all: a first one of each text, then a second ...

    Texts come spread over the whole list (by the golden ratio), for neighbours are often alike; passages are
    as long as `window` or, of many texts, shorter.
    """
    window = min(window, max(_PASSAGE, tokens // max(len(texts), 1)))
    steps = (int(len(texts) * (i * 0.6180339887498949 % 1)) for i in range(3 * len(texts)))
    order = list(dict.fromkeys([*steps, *range(len(texts))]))
    ids: dict[int, list[int]] = {}
    start = 0
    while order:
        for index in list(order):
            if index not in ids:
                ids[index] = encode(texts[index][: 16 * tokens])  # hardly a token has more characters
            part = ids[index][start : start + min(window, tokens)]
            tokens -= len(part)
            if part:
                yield index, part
            else:
                order.remove(index)
            if not tokens:
                return
        start += window


@dataclass
class _Counts:
    """Of one expert module."""

    counts: npt.NDArray[np.int64]
    mass: npt.NDArray[np.float64]
    together: npt.NDArray[np.int64]
    observed: bool = True  # whether gate weights are

    def add(self, experts: npt.NDArray[np.uint16], gates: npt.NDArray[np.float32] | None) -> None:
        if not len(experts):
            return
        chosen = np.zeros((len(experts), len(self.counts)), np.float32)
        np.put_along_axis(chosen, experts.astype(np.int64), 1, 1)
        self.counts += chosen.sum(0).astype(np.int64)
        self.together += (chosen.T @ chosen).astype(np.int64)  # below 2^24 in one text, so exact
        if gates is None:
            self.observed, gates = False, np.full(experts.shape, 1 / experts.shape[1], np.float32)
        np.add.at(self.mass, experts.reshape(-1), gates.reshape(-1))

    def pairs(self) -> list[list[int]]:
        """[a, b, n] by (a, b), the most frequent `_MOST_PAIRS` of them."""
        a, b = np.nonzero(np.triu(self.together, 1))
        n = self.together[a, b]
        kept = np.sort(np.argsort(-n, kind="stable")[:_MOST_PAIRS])
        return [[int(x), int(y), int(z)] for x, y, z in zip(a[kept], b[kept], n[kept], strict=True)]


@dataclass(frozen=True)
class Summary:
    """What `profile` found. `unobserved`: expert modules whose gate weights cannot be seen (stored as equal shares)."""

    path: str
    tokens: int
    texts: int
    layers: int
    never_used: int
    unobserved: int
    hit_rate: dict[str, float]  # the pager's own, decoding this text, by share of experts resident


def profile(
    path: str | os.PathLike[str],
    text: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    tokens: int = DEFAULT_TOKENS,
    memory: str | int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Summary:
    """Run up to `tokens` tokens of `text` (see `corpus.read`) through the model in `path`, and store the profile.

    Of many texts there is some of each. Writes `output`, or replaces `path`: the same payload with one PROF
    appendix. Raises TextError for what is no text, RequestError where there is no expert, and what `load` and `repack`
    raise.
    """
    target = os.fspath(path if output is None else output)
    in_place = os.path.exists(target) and os.path.samefile(path, target)
    if not in_place:
        check_target(target, force)
    content, summary = make_profile(path, text, tokens=tokens, memory=memory, progress=progress)
    if not in_place:
        repack(path, target, add={"PROF": content}, force=force)
    else:
        target = os.path.realpath(path)
        repack(path, f"{target}.profile", add={"PROF": content}, force=True)
        os.chmod(f"{target}.profile", stat.S_IMODE(os.stat(target).st_mode))
        os.replace(f"{target}.profile", target)
    return replace(summary, path=os.fspath(path if output is None else output))


def make_profile(
    path: str | os.PathLike[str],
    text: str | os.PathLike[str],
    *,
    tokens: int = DEFAULT_TOKENS,
    memory: str | int | None = None,
    progress: Progress | None = None,
) -> tuple[bytes, Summary]:
    """The decoded content of the appendix, and what is in it."""
    if tokens < 1:
        raise RequestError(f"{tokens} tokens are no text")
    texts = first_texts(text, _MOST_CHARACTERS)
    model, tokenizer = load(path, memory=memory, context=WINDOW)
    loaded = state(model)
    layers = loaded.file.moe_layers
    getattr(tokenizer, "_tokenizer", tokenizer).model_max_length = 1 << 60  # or it warns of texts that are cut here
    digest, done, used = hashlib.sha256(), 0, set[int]()
    found = [
        _Counts(np.zeros(n, np.int64), np.zeros(n, np.float64), np.zeros((n, n), np.int64))
        for n in (layer.expert_count for layer in layers)
    ]

    def parts_of() -> Iterator[Sequence[int]]:
        nonlocal done
        for index, part in _passages(texts, lambda t: encode(tokenizer, t), tokens, min(WINDOW, loaded.context)):
            if index not in used:
                digest.update(texts[index].encode())
                used.add(index)
            yield part
            done += len(part)
            if progress is not None:
                progress(done, tokens)

    try:
        if not layers:
            raise RequestError(f"{os.fspath(path)}: its model has no experts, so nothing to profile")
        whole: list[Routing] = []
        for parts in trace(model, parts_of()):
            whole.append(join(parts))
            for counts, experts, gates in zip(found, whole[-1].experts, whole[-1].gates, strict=True):
                counts.add(experts, gates)
    finally:
        loaded.close()
    if not done:
        raise RequestError(f"{os.fspath(text)} has no text")
    routing = join(whole)
    lines, rates = [], dict.fromkeys(("75%", "50%", "25%"), 0.0)
    for layer, counts, experts in zip(layers, found, routing.experts, strict=True):
        n = layer.expert_count
        line: dict[str, Any] = {"layer": layer.layer, "counts": counts.counts.tolist(), "coactivation": counts.pairs()}
        line["gate_mass"] = [round(float(m), 4) for m in counts.mass]
        if len(experts):
            line[MEMBER] = _hits(experts, n)
            for share in rates:
                slots, hits = np.array(line[MEMBER]).T
                at = np.interp(n * int(share[:-1]) / 100, slots, hits)
                rates[share] += float(at) / experts.size / len(layers)
        lines.append(line)
    header = {"appendix": "profile", "version": 1, "tokens": done, "text_sha256": digest.hexdigest()}
    unused = sum(int((c.counts == 0).sum()) for c in found)
    unobserved = sum(not c.observed for c in found)
    summary = Summary(os.fspath(path), done, len(used), len(layers), unused, unobserved, rates)
    return appendices.encode_lines([header, *lines]), summary


def _hits(experts: npt.NDArray[Any], count: int) -> list[list[int]]:
    """`hits_by_slots` for experts [tokens, k]; of a long text from passages of it, scaled to the whole."""
    used = experts
    if len(experts) > _CURVE_TOKENS:
        starts = np.linspace(0, len(experts) - _PASSAGE, _CURVE_TOKENS // _PASSAGE).astype(int)
        used = np.concatenate([experts[start : start + _PASSAGE] for start in starts])
    found = curve(lambda: Recall(count), decode_calls(used), experts.shape[1], count)
    best, points = 0, []
    for slots, hits in found:  # more slots never harm by more than chance: stored as never
        best = max(best, hits * len(experts) // len(used))
        points.append([slots, best])
    return points
