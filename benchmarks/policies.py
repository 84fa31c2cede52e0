"""Which expert to give up: policies against Belady's optimum, on routing recorded from a model.

    python benchmarks/policies.py FILE.squizd --text eval.jsonl --calibration calibration.jsonl [--tokens 2000]

Both texts are .jsonl with rows of {"domain", "text"}; `--text` must be held out. Streams: each domain decoded token
by token; pieces of 256 tokens of all domains in turns (switches); and chats of 128 prompt tokens at once, then 128
decoded. Hit rates are those of `runtime.simulation`, which counts as the pager does (tests/test_policy.py), from empty
slots. Figures: hit rate as a share of the optimum's in as many slots, mean and least over streams; last a line of JSON.
"""

from __future__ import annotations

import argparse
import json
from collections import deque
from collections.abc import Callable, Container, Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np

from squizd.runtime.budget import LayerDemand, by_need
from squizd.runtime.policy import HALF_LIFE, LRU, ONE, STEPS, Fading, Policy, Recall
from squizd.runtime.simulation import Call, belady, curve, decode_calls, replay

PIECE, PROMPT, ANSWER = 256, 128, 128
Trace = Any  # experts [tokens, layers, k]
Streams = dict[str, list[list[Call]]]  # by name, for each layer


class Scored:
    """Gives up the known expert of the least score."""

    def __init__(self, experts: int) -> None:
        self.known: set[int] = set()
        self.experts = experts

    def see(self, chosen: Any, choices: int) -> None:
        for token in np.asarray(chosen).reshape(-1, choices).tolist():
            self.token(token)

    def token(self, chosen: list[int]) -> None:
        raise NotImplementedError

    def scores(self) -> Any:
        raise NotImplementedError

    def use(self, expert: int) -> None:
        self.known.add(expert)

    def evict(self, keep: Container[int]) -> int:
        scores = self.scores()
        victim = min((e for e in self.known if e not in keep), key=lambda e: (scores[e], e))
        self.known.remove(victim)
        return victim

    def __iter__(self) -> Iterator[int]:
        scores = self.scores()
        return iter(sorted(self.known, key=lambda e: (scores[e], e)))


class Counted(Scored):
    """Frequencies that fade with several half-lives (inf: never), weighted; `prior` is added for good."""

    def __init__(self, experts: int, half_lives: dict[float, float], prior: Any = 0.0) -> None:
        super().__init__(experts)
        self.fade = np.array([2 ** (-1 / h) for h in half_lives])[:, None]
        self.weights = np.array(list(half_lives.values()))
        self.rates, self.prior, self.started = np.zeros((len(half_lives), experts)), prior, 0

    def token(self, chosen: list[int]) -> None:
        self.rates *= self.fade
        self.started += 1
        new = np.where(self.fade < 1, 1 - self.fade, 1.0)
        self.rates[:, chosen] += new

    def scores(self) -> Any:
        rates = np.where(self.fade < 1, self.rates, self.rates / max(self.started, 1))
        return (self.weights @ rates + self.prior).tolist()


class Successors(Counted):
    """Beside a fading frequency: which experts came after each of the present ones, learned as it goes."""

    def __init__(self, experts: int, weight: float = 0.08, rate: float = 0.03) -> None:
        super().__init__(experts, {HALF_LIFE: 1.0})
        self.table, self.last, self.weight, self.rate = np.zeros((experts, experts)), [0], weight, rate

    def token(self, chosen: list[int]) -> None:
        super().token(chosen)
        now = np.zeros(self.experts)
        now[chosen] = 1
        self.table[self.last] += self.rate * (now - self.table[self.last])
        self.last = chosen

    def scores(self) -> Any:
        return (self.rates[0] + self.weight * self.table[self.last].sum(0)).tolist()


class Pinned(LRU):
    """The `pinned` never go while there are others; those are least recently used first."""

    def __init__(self, pinned: Container[int]) -> None:
        super().__init__()
        self.pinned = pinned

    def evict(self, keep: Container[int]) -> int:
        order = list(self)
        for expert in [e for e in order if e not in self.pinned] + [e for e in order if e in self.pinned]:
            if expert not in keep:
                del self._order[expert]
                return expert
        raise LookupError


class S3FIFO:
    """Yang et al. 2023: a tenth of the slots for newcomers, a main queue with second chances, ghosts of newcomers."""

    def __init__(self, slots: int) -> None:
        self.least, self.slots = max(1, slots // 10), slots
        self.small: deque[int] = deque()
        self.main: deque[int] = deque()
        self.ghosts: dict[int, None] = {}
        self.count: dict[int, int] = {}

    def see(self, chosen: Any, choices: int) -> None:
        pass

    def use(self, expert: int) -> None:
        if expert in self.count:
            self.count[expert] = min(3, self.count[expert] + 1)
            return
        self.count[expert] = 0
        (self.main if expert in self.ghosts else self.small).append(expert)
        self.ghosts.pop(expert, None)

    def evict(self, keep: Container[int]) -> int:
        for _ in range(8 * len(self.count) + 8):
            free = any(e not in keep for e in self.small)
            if free and (len(self.small) > self.least or all(e in keep for e in self.main)):
                expert = self.small.popleft()
                if expert in keep:
                    self.small.append(expert)
                elif self.count[expert] > 1:
                    self.count[expert] = 0
                    self.main.append(expert)
                else:
                    self.ghosts[expert] = None
                    if len(self.ghosts) > self.slots:
                        del self.ghosts[next(iter(self.ghosts))]
                    del self.count[expert]
                    return expert
                continue
            expert = self.main.popleft()
            if expert in keep or self.count[expert] > 0:
                self.count[expert] -= expert not in keep
                self.main.append(expert)
                continue
            del self.count[expert]
            return expert
        raise LookupError

    def __iter__(self) -> Iterator[int]:
        return iter([*self.small, *self.main])


def record(file: str, text: str, tokens: int) -> dict[str, Trace]:
    """Routing of up to `tokens` tokens of each domain."""
    import squizd
    from squizd.generation import encode
    from squizd.runtime.load import state
    from squizd.tracing import join, trace

    by_domain: dict[str, list[str]] = {}
    with open(text, encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            by_domain.setdefault(row["domain"], []).append(row["text"])
    model, tokenizer = squizd.load(file, context=1024)
    found = {}
    for domain, texts in by_domain.items():
        taken: list[list[int]] = []
        for passage in texts:
            left = tokens - sum(map(len, taken))
            if left > 0:
                taken.append(encode(tokenizer, passage[:8000])[: min(1024, left)])
        routing = join([join(parts) for parts in trace(model, taken)])
        found[domain] = np.stack(routing.experts, 1)
        print(f"{domain}: {len(found[domain])} tokens of {len(taken)} texts")
    state(model).close()
    return found


def streams_of(traces: dict[str, Trace]) -> dict[str, Streams]:
    """The streams of each kind."""
    layers = range(next(iter(traces.values())).shape[1])
    decode = {name: [decode_calls(t[:, i]) for i in layers] for name, t in traces.items()}
    longest = max(map(len, traces.values()))
    mixed = np.concatenate([t[s : s + PIECE] for s in range(0, longest, PIECE) for t in traces.values()])
    chats: Streams = {}
    for name, t in traces.items():
        calls: list[list[Call]] = [[] for _ in layers]
        for start in range(0, len(t), PROMPT + ANSWER):
            for i in layers:
                calls[i].append(t[start : start + PROMPT, i])
                calls[i] += decode_calls(t[start + PROMPT : start + PROMPT + ANSWER, i])
        chats[name] = calls
    return {"decode": decode, "switches": {"switches": [decode_calls(mixed[:, i]) for i in layers]}, "chats": chats}


def rate(stream: list[list[Call]], make: Callable[[int], Policy] | None, slots: Sequence[int]) -> float:
    """Hit rate over all layers; `make(layer)` gives a policy, None is Belady's optimum."""
    tallies = [
        belady(calls, n) if make is None else replay(make(i), calls, n)
        for i, (calls, n) in enumerate(zip(stream, slots, strict=True))
    ]
    return sum(t.hits for t in tallies) / sum(t.hits + t.misses for t in tallies)


def policies(experts: int, profile: Trace, slots: int) -> dict[str, Callable[[int], Policy]]:
    """What is compared, for one number of slots; `profile` is calibration text's share of tokens [layers, experts]."""
    prior = [[round(p * ONE) * sum(STEPS) // ONE for p in layer] for layer in profile]
    pinned = [set(np.argsort(-layer, kind="stable")[: slots // 2].tolist()) for layer in profile]
    return {
        "LRU": lambda i: LRU(),
        "LFU, never fading": lambda i: Counted(experts, {float("inf"): 1.0}),
        "S3-FIFO": lambda i: S3FIFO(slots),
        "half pinned by profile, LRU": lambda i: Pinned(pinned[i]),
        "half-life 8": lambda i: Counted(experts, {8: 1.0}),
        "half-life 16": lambda i: Counted(experts, {16: 1.0}),
        "half-life 32": lambda i: Counted(experts, {32: 1.0}),
        "Fading (half-life 24)": lambda i: Fading(experts),
        "Recall": lambda i: Recall(experts),
        "half-life 64": lambda i: Counted(experts, {64: 1.0}),
        "half-life 128": lambda i: Counted(experts, {128: 1.0}),
        "half-lives 8, 32, 256": lambda i: Counted(experts, {8: 0.25, 32: 1.0, 256: 0.5}),
        "Recall, seeded by profile": lambda i: Recall(experts, prior[i]),
        "half-life 32 + 0.2 profile": lambda i: Counted(experts, {32: 1.0}, 0.2 * profile[i]),
        "half-life 24 + successors": lambda i: Successors(experts),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--text", required=True, help="held-out .jsonl")
    parser.add_argument("--calibration", required=True, help="another .jsonl, for profiles and slots by need")
    parser.add_argument("--tokens", type=int, default=2000, help="of each domain")
    parser.add_argument("--parts", nargs="+", default=["decode", "switches", "chats", "need"], help="of the output")
    options = parser.parse_args()
    import squizd

    with squizd.open(options.file) as f:
        experts = f.moe_layers[0].expert_count
    traces, known = (record(options.file, path, options.tokens) for path in (options.text, options.calibration))
    layers, choices = next(iter(traces.values())).shape[1:]
    every = np.concatenate(list(known.values()))
    profile = np.stack([np.bincount(every[:, i].reshape(-1), minlength=experts) for i in range(layers)]) / len(every)
    kinds = streams_of(traces)
    sizes = {"75%": experts * 3 // 4, "50%": experts // 2, "25%": experts // 4, "least": choices}
    result: dict[str, Any] = {"benchmark": "policies", "file": options.file, "tokens": options.tokens}

    @cache
    def best(kind: str, stream: str, slots: int) -> float:
        return rate(kinds[kind][stream], None, [slots] * layers)

    for kind in [kind for kind in kinds if kind in options.parts]:
        streams = kinds[kind]
        rows: dict[str, list[str]] = {}
        result[kind] = {}
        for name, slots in sizes.items():
            optimum = np.mean([best(kind, stream, slots) for stream in streams])
            rows.setdefault("Belady's hit rate", []).append(f"{optimum:13.3f}")
            result[kind].setdefault("belady", {})[name] = round(float(optimum), 4)
            for policy, make in policies(experts, profile, slots).items():
                parts = [rate(c, make, [slots] * layers) / best(kind, s, slots) for s, c in streams.items()]
                rows.setdefault(policy, []).append(f"{np.mean(parts):6.3f} {np.min(parts):6.3f}")
                figures = [round(float(x), 4) for x in (np.mean(parts), np.min(parts))]
                result[kind].setdefault(policy, {})[name] = figures
        print(f"\n{kind + ' (mean, least)':32}" + "".join(f"{name:>16}" for name in sizes))
        for policy, cells in rows.items():
            print(f"{policy:32}" + "".join(f"{cell:>16}" for cell in cells))
    print("\nslots by need, from the calibration text, as a share of the optimum with the same slots in every layer")
    pieces = streams_of(known)["switches"]["switches"]
    curves: dict[str, Callable[[], Policy]] = {"LRU": LRU, "Recall": lambda: Recall(experts)}
    for policy, new in curves.items() if "need" in options.parts else ():
        demand = [LayerDemand(experts, choices, 1, tuple(curve(new, calls, choices, experts))) for calls in pieces]
        for name in ("75%", "50%", "25%"):
            slots_by_need = by_need(demand, (sizes[name],) * layers, sizes[name] * layers)
            uniform, uneven = [], []
            for stream, calls in {**kinds["decode"], **kinds["switches"]}.items():
                top = best("switches" if stream == "switches" else "decode", stream, sizes[name])
                uniform.append(rate(calls, lambda i, new=new: new(), [sizes[name]] * layers) / top)
                uneven.append(rate(calls, lambda i, new=new: new(), slots_by_need) / top)
            line = f"uniform {np.mean(uniform):.4f}, by need {np.mean(uneven):.4f} (least {np.min(uneven):.4f})"
            print(f"{policy:8} {name:>4}: {line}; slots {slots_by_need}")
            result[f"{policy} by need {name}"] = [round(float(np.mean(x)), 4) for x in (uniform, uneven)]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
