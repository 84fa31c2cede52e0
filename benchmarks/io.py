"""How experts are read: engines of runtime/source.py, and the pager itself, from a disk and from the system's cache.

    python benchmarks/io.py FILE.squizd [--megabytes 200] [--rounds 5] [--parts engines decode prompt]

`engines`: the same expert extents in random order, in turns: positioned reads and the mapping, by threads, with and
without digest, announced ahead or not; cold and warm. `decode` and `prompt`: the model with a quarter of its experts
computes single tokens, or a prompt, with nothing of the file cached; bytes read, divided by the time that the model
waited for them. Then the very same extents are read once more as they are, by the best of several ways: all at
once, and, as a model must that waits for each layer's experts, layer by layer. Linux only: every cold figure
begins with an emptied cache, and ends the run if `mincore` finds more than 1 % of the extents there. Last line: JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import xxhash
from cold import drop

import squizd
from squizd.container.layout import Record
from squizd.runtime.io import PIECE_BYTES
from squizd.runtime.source import Mapped, Positioned, Source

Batches = Sequence[Sequence[Record]]
MOST_THREADS = 8


class Reader:
    """Reads batches of records into buffers of its threads, one batch after the other."""

    def __init__(self, size: int) -> None:
        self._buffers = [np.ones(size, np.uint8) for _ in range(MOST_THREADS)]
        self._pools = {n: ThreadPoolExecutor(n) for n in (1, 2, 4, 8)}

    def seconds(
        self, source: Source, batches: Batches, threads: int, announce: bool = False, digest: bool = False
    ) -> float:
        began = time.perf_counter()
        for batch in batches:
            self._batch(source, batch, threads, announce, digest)
        return time.perf_counter() - began

    def _batch(self, source: Source, batch: Sequence[Record], threads: int, announce: bool, digest: bool) -> None:
        todo, lock = iter(batch), threading.Lock()
        ahead = iter(batch)
        if announce:
            for record in itertools.islice(ahead, MOST_THREADS):
                source.announce(record.offset, record.stored_size)

        def work(buffer: Any) -> None:
            while True:
                with lock:
                    record, later = next(todo, None), next(ahead, None)
                if record is None:
                    return
                if announce and later is not None:
                    source.announce(later.offset, later.stored_size)
                if not digest:
                    source.fill([buffer[: record.stored_size]], record.offset)
                    continue
                check = xxhash.xxh64()
                for start in range(0, record.stored_size, PIECE_BYTES):
                    piece = buffer[start : min(start + PIECE_BYTES, record.stored_size)]
                    source.fill([piece], record.offset + start)
                    check.update(piece)
                if check.intdigest() != record.digest:
                    raise SystemExit("wrong digest")

        list(self._pools[threads].map(work, self._buffers[:threads]))


def engines(file: Any, options: argparse.Namespace, result: dict[str, Any]) -> None:
    """The two engines, and what each is without digest or announcements."""
    records = [record for x in file.moe_layers for record in file.experts(x.layer)]
    reader = Reader(max(r.stored_size for r in records))
    kinds: dict[str, Callable[[Any], Source]] = {"preadv": Positioned, "mapped": Mapped}
    sides = {
        f"{name}, {threads} thread{'s' * (threads > 1)}{', announced' * announce}{', digest' * digest}":
            (kind, threads, announce, digest)
        for name, kind in kinds.items()
        for digest in (False, True)
        for announce in (False, True)
        for threads in (1, 2, 4, 8)
    }  # fmt: skip
    found: dict[str, dict[str, list[float]]] = {"cold": {s: [] for s in sides}, "warm": {s: [] for s in sides}}
    chance = random.Random(0)
    for _ in range(options.rounds):
        chosen = chance.sample(records, max(1, min(len(records), options.megabytes * 10**6 // records[0].stored_size)))
        size = sum(r.stored_size for r in chosen)
        for temperature, rates in found.items():
            for name in chance.sample(list(sides), len(sides)):
                kind, threads, announce, digest = sides[name]
                if temperature == "cold":
                    drop(file.fileno(), chosen)
                source = kind(file)
                rates[name].append(size / reader.seconds(source, [chosen], threads, announce, digest) / 1e9)
                source.close()  # a mapped page cannot be dropped
    for temperature, rates in found.items():
        best = max(statistics.median(v) for name, v in rates.items() if "digest" not in name)
        print(f"\n{temperature}: GB/s, median (least to most) of {options.rounds}; share of the best raw read")
        for name, values in rates.items():
            middle = statistics.median(values)
            print(f"  {name:40} {middle:6.2f} ({min(values):.2f} to {max(values):.2f})  {middle / best:5.2f}")
            result[f"{temperature} {name}"] = round(middle, 3)


WAYS = {"4 threads": (4, False), "8 threads": (8, False), "1 announced": (1, True), "4 announced": (4, True)}


def same_extents(file: Any, batches: Batches, reader: Reader, source: Source) -> dict[tuple[str, str], float]:
    """Seconds of raw reads of `batches`, from an emptied cache: all at once, and one batch after the other."""
    flat = [record for batch in batches for record in batch]
    found = {}
    for order, work in (("at once", [flat]), ("by layer", batches)):
        for way, (threads, announce) in WAYS.items():
            drop(file.fileno(), flat)
            found[order, way] = reader.seconds(source, work, threads, announce)
    return found


def paging(path: str, options: argparse.Namespace, result: dict[str, Any], prompt: bool) -> None:
    """The pager, cold, beside raw reads of what it read."""
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    from squizd.runtime.load import load_model, state
    from squizd.runtime.pager import Slots
    from squizd.runtime.switch import PagedSwitch

    model: Any = load_model(path, resident=options.resident, context=2048)
    loaded = state(model)
    file, source = loaded.file, Positioned(loaded.file)
    switches = [m for _, m in model.named_modules() if isinstance(m, PagedSwitch)]
    switches.sort(key=lambda m: m.slots.layer.layer)
    records = [r for m in switches for r in m.slots.records]
    reader = Reader(max(r.stored_size for r in records))
    batches: list[list[Record]] = []
    bring = Slots._bring

    def watched(slots: Slots, missing: Sequence[int], kept: Any) -> Any:
        batches.append([slots.records[e] for e in missing])
        return bring(slots, missing, kept)

    Slots._bring = watched  # type: ignore[method-assign]
    chance = np.random.default_rng(7)
    cache = make_prompt_cache(model)
    mx.eval(model(mx.array([[1, 2, 3, 4]]), cache=cache))
    for token in (5, 6, 7):  # the first token that can be replayed is computed twice
        mx.eval(model(mx.array([[token]]), cache=cache))
    rates, sizes = [], []
    ratios: dict[tuple[str, str], list[float]] = {}
    for _ in range(options.rounds * (1 if prompt else 3)):
        tokens = options.prompt if prompt else options.tokens
        ids = chance.integers(0, model.args.vocab_size, tokens).tolist()
        loaded.reset_stats()
        drop(file.fileno(), records)
        batches.clear()
        if prompt:
            mx.eval(model(mx.array([ids]), cache=make_prompt_cache(model)))
        for token in [] if prompt else ids:
            before = [set(m.slots.slot_of) for m in switches]
            mx.eval(model(mx.array([[token]]), cache=cache))
            loaded.stats  # noqa: B018  (has the slots given back)
            if loaded.replay is not None and loaded.replay.in_use:  # nothing was read by Python
                now = [
                    [m.slots.records[e] for e in m.slots.slot_of if e not in b]
                    for m, b in zip(switches, before, strict=True)
                ]
                batches += [batch for batch in now if batch]
        stats = loaded.stats
        assert sum(map(len, batches)) == stats.misses
        if not batches:
            continue
        sizes.append(stats.bytes_read)
        rates.append(stats.bytes_read / stats.read_seconds / 1e9)
        for way, seconds in same_extents(file, batches[:], reader, source).items():
            ratios.setdefault(way, []).append(seconds / stats.read_seconds)
    Slots._bring = bring  # type: ignore[method-assign]
    loaded.close()
    what = f"a prompt of {options.prompt}" if prompt else f"{options.tokens} single tokens"
    middle = statistics.median(rates)
    print(
        f"\n{what}, {options.resident} resident, cold: {statistics.fmean(sizes) / 1e6:.0f} MB, "
        f"{middle:.2f} GB/s while paging"
    )
    result[f"{what}, GB/s"] = round(middle, 3)
    for order in ("at once", "by layer"):
        way = min((w for w in ratios if w[0] == order), key=lambda w: statistics.median(ratios[w]))
        share = statistics.median(ratios[way])
        spread = f"{min(ratios[way]):.2f} to {max(ratios[way]):.2f}"
        print(f"  {share:.2f} ({spread}) of the best raw read of the same extents {order} ({way[1]})")
        result[f"{what}, {order}"] = round(share, 3)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--megabytes", type=int, default=200, help="of extents in each measurement of an engine")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--resident", default="25%")
    parser.add_argument("--prompt", type=int, default=256, help="tokens")
    parser.add_argument("--tokens", type=int, default=4, help="decoded from one emptied cache")
    parser.add_argument("--parts", nargs="+", default=["engines", "decode", "prompt"])
    options = parser.parse_args()
    result: dict[str, Any] = {"benchmark": "io", "file": options.file}
    parts: dict[str, Callable[[], None]] = {
        "decode": lambda: paging(options.file, options, result, False),
        "prompt": lambda: paging(options.file, options, result, True),
    }
    if "engines" in options.parts:
        with squizd.open(options.file) as file:
            engines(file, options, result)
    for name, measure in parts.items():
        if name in options.parts:
            measure()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
