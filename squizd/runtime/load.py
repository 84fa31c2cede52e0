"""A `.squizd` file as an mlx-lm model within a memory budget: `load`, and the `Residency` that comes with the model."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm import utils as mlx_lm_utils
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .. import container
from ..architecture import replace_module
from ..container.layout import RAW
from ..container.reader import File
from ..errors import ReadError, RequestError, SourceError
from ..kernels.replay import Replay
from . import device
from .blueprint import Blueprint, ExpertLayer, Resident, draw, fill
from .budget import Budget, Demand, LayerDemand, make_budget, parse_share, parse_size
from .caches import GROUP_SIZE, CacheOptions
from .deferral import Deferral
from .deferral import install as install_deferral
from .exchange import Exchange
from .fused import BOTH, GATE, UP, FusedSwitchGLU, fusable
from .lending import Lending
from .pager import READERS, Pager, Slots, Stats
from .policy import Recall
from .probe import Needs, probe
from .profile import LayerProfile, Profile, read_profile
from .source import Bytes, Source
from .switch import PagedSwitch
from .transfer import buffer_bytes
from .warm import Warmer

DEFAULT_CONTEXT = 4096
LEAST_CONTEXT = 256  # tokens; mlx-lm's caches grow by as many


class Residency:
    """What is in memory of one loaded model, and why. `state(model)` returns it.

    Attributes: `file` (the open container), `budget` (bytes by purpose, slots per layer), `paged_layers`
    (expert layers with fewer slots than experts; 0: the graph is mlx-lm's own), `replay` (how squizd's kernels
    compute single tokens, where there are kernels), `deferral` (how single tokens wait for routers on GPUs), `caches`
    (the prompt caches that the budget reserved).
    """

    def __init__(
        self,
        file: File,
        budget: Budget,
        pager: Pager,
        paged_layers: int,
        replay: Replay | None = None,
        deferral: Deferral | None = None,
        caches: CacheOptions | None = None,
    ) -> None:
        self.file, self.budget, self.paged_layers, self.replay = file, budget, paged_layers, replay
        self.caches = caches or CacheOptions()
        self.deferral = deferral
        self._pager = pager

    @property
    def context(self) -> int:
        """Tokens of prompt and answer for which the budget holds a cache."""
        return self.budget.context

    @property
    def prefill_step_size(self) -> int:
        """Prompt tokens to compute at once so that workspace stays within the budget (mlx-lm's `prefill_step_size`)."""
        return self.budget.prefill_step_size

    @property
    def resident_bytes(self) -> int:
        """Memory of resident tensors and expert slots."""
        return self.budget.residents + self.budget.experts

    @property
    def resident_share(self) -> float:
        """Slots per expert over all layers; 1.0 for a model without experts."""
        experts = sum(layer.expert_count for layer in self.file.moe_layers)
        return sum(self.budget.slots) / experts if experts else 1.0

    @property
    def arithmetic(self) -> str:
        """What computes: squizd's kernels, or MLX (and why, where the kernels could).

        With the kernels also why single tokens are not replayed, where they are not.
        """
        reason = self.replay.reason if self.replay is not None else ""
        return device.arithmetic() + (f", tokens not replayed: {reason}" if reason else "")

    @property
    def stats(self) -> Stats:
        """The counters since loading or `reset_stats`, as a copy."""
        self._pager.reclaim()
        return replace(self._pager.stats, resident_bytes=self.resident_bytes)

    def reset_stats(self) -> None:
        """Count from zero."""
        self._pager.reclaim()
        self._pager.stats = Stats()

    def close(self) -> None:
        """End the threads and close the file, as happens by itself when the model is collected; twice is fine.

        A paged model raises ReadError at its next miss.
        """
        self._pager.close()


def state(model: nn.Module) -> Residency:
    """The Residency of a model that `load` returned; RequestError for any other."""
    found = getattr(model, "squizd", None)
    if not isinstance(found, Residency):
        raise RequestError("this model was not loaded from a .squizd file")
    return found


def load(
    path: str | os.PathLike[str],
    *,
    memory: str | int | None = None,
    resident: str | float | None = None,
    context: int | None = None,
    kv_bits: int | None = None,
    kv_group_size: int = GROUP_SIZE,
    max_kv_size: int | None = None,
) -> tuple[nn.Module, TokenizerWrapper]:
    """Load a `.squizd` file as (mlx-lm model, tokenizer).

    `memory` ("6GB", "1.5GiB", or bytes) bounds resident tensors, expert slots, the cache of `context` tokens,
    staging and workspace together. `resident` ("25%", 0.25) is the share of each layer's experts to hold;
    "0%" is the least that works. With a profile in the file the layers have that memory by need, and the most used
    experts are read at once, in the background. With both, `memory` must suffice for that share. With neither, all
    experts are held if they fit in 70 % of the free memory, else that is the budget. `context` defaults to 4096
    tokens, or less where the model was made for less or their cache would take over a quarter of `memory`; with
    `max_kv_size` to all that the model was made for.

    No answer depends on these. With `kv_bits` (2, 3, 4, 8; one scale for `kv_group_size` numbers) the budget reserves
    mlx-lm's quantized cache, with `max_kv_size` its rotating one, which keeps the first 4 and the latest tokens; both
    change answers, exactly as in mlx-lm. `stream_generate` and `Session` use such caches; whoever generates otherwise
    takes them from `state(model).caches`.

    Floats are computed in float32 on CPU and as stored elsewhere. Sets MLX's
    process-wide cache limit to a part of the budget.

    Raises ReadError and FormatError (the file), SourceError (its model), BudgetError, RequestError.
    """
    model = load_model(
        path,
        memory=memory,
        resident=resident,
        context=context,
        kv_bits=kv_bits,
        kv_group_size=kv_group_size,
        max_kv_size=max_kv_size,
    )
    file = state(model).file
    return model, _load_tokenizer(file, file.metadata["model"]["config"])


def load_tokenizer(path: str | os.PathLike[str]) -> TokenizerWrapper:
    """The tokenizer of a `.squizd` file, as mlx-lm wraps it, without its model."""
    with container.open(path) as file:
        return _load_tokenizer(file, file.metadata["model"]["config"])


def load_model(
    path: str | os.PathLike[str],
    *,
    memory: str | int | None = None,
    resident: str | float | None = None,
    context: int | None = None,
    kv_bits: int | None = None,
    kv_group_size: int = GROUP_SIZE,
    max_kv_size: int | None = None,
) -> nn.Module:
    """`load` without the tokenizer, which a file need not have."""
    caches = CacheOptions(kv_bits, kv_group_size, max_kv_size)
    limit = None if memory is None else parse_size(memory)
    share = None if resident is None else parse_share(resident)
    if context is not None and context < 1:
        raise RequestError(f"a context of {context} tokens holds nothing")
    file = container.open(path)
    pager = Pager(file)
    try:
        blueprint = draw(file)
        needs = probe(blueprint, file.metadata["model"]["config"], file.path, caches)
        profile = read_profile(file)
        tokens = context or _default_context(needs, limit, caches)
        demand = _demand(blueprint, needs, file, profile)
        budget = make_budget(demand, tokens, memory=limit, share=share, available=device.available_memory())
        pager.transfer = device.transfer(_largest_record(blueprint, file))
        device.limit_buffer_cache(budget.workspace // 5)
        _load_residents(blueprint, file, pager.source)
        policies = _policies(file, profile)
        paged = [
            _load_layer(blueprint, x, n, pager, policy)
            for x, n, policy in zip(blueprint.layers, budget.slots, policies, strict=True)
        ]
        mx.eval(list(_arrays(blueprint.model)))
        switches = [m for m in blueprint.model.modules() if isinstance(m, PagedSwitch)]
        replay = device.accelerate(blueprint.model, Lending(pager, switches))
        deferral = _defer(blueprint, pager, needs) if switches and device.defers() else None
        pager.stats = Stats()
        if replay is not None and caches.bits is not None:
            replay.reason = "its cache is quantized"
        if profile is not None and pager.transfer is None:  # a transfer is untried beside a running model
            _warm(blueprint, pager, profile)
    except BaseException:
        pager.close()
        raise
    blueprint.model.squizd = Residency(file, budget, pager, sum(paged), replay, deferral, caches)
    return blueprint.model


def _largest_record(blueprint: Blueprint, file: File) -> int:
    """The most bytes of a native transfer's buffer that an expert needs; 0 without experts."""
    layers = [(x.scatters.values(), file.experts(x.layer.layer)) for x in blueprint.layers]
    sizes = [
        buffer_bytes([s.parts for s in scatters], [r.stored_size for r in records]) for scatters, records in layers
    ]
    return max(sizes, default=0)


def _defer(blueprint: Blueprint, pager: Pager, needs: Needs) -> Deferral:
    """Let single tokens wait for their routers late, or not at all."""
    deferral = Deferral(pager)
    modules = dict(blueprint.model.named_modules())
    found = [(modules[x.layer.path], k) for x, k in zip(blueprint.layers, needs.top_k, strict=True)]
    paged = [(module, k) for module, k in found if isinstance(module, PagedSwitch)]
    for index, (module, k) in enumerate(paged):
        module.defer_to(deferral, index, k, device.small_mail())
    ask = device.ask()
    if ask is not None:
        try:
            deferral.exchange = Exchange(pager, [(module.slots, k) for module, k in paged], ask, deferral.lock)
        except OSError as error:
            deferral.exchange_reason = str(error)
    install_deferral(blueprint.model, deferral)
    return deferral


def _default_context(needs: Needs, limit: int | None, caches: CacheOptions | None = None) -> int:
    """Tokens to reserve cache for when nobody said: at most a quarter of the budget. A bounded cache holds any text."""
    if caches is not None and caches.max_size is not None and needs.max_context:
        return needs.max_context
    tokens = min(DEFAULT_CONTEXT, needs.max_context or DEFAULT_CONTEXT)
    while limit is not None and tokens > LEAST_CONTEXT and 4 * needs.cache_bytes(tokens, LEAST_CONTEXT) > limit:
        tokens = max(LEAST_CONTEXT, tokens // 2)
    return tokens


def demand_of(path: str | os.PathLike[str], context: int | None = None) -> tuple[Demand, int]:
    """What loading a file would ask for, and the context in tokens, without loading it. Raises as `load` does."""
    with container.open(path) as file:
        blueprint = draw(file)
        needs = probe(blueprint, file.metadata["model"]["config"], file.path)
        return _demand(blueprint, needs, file, read_profile(file)), context or _default_context(needs, None)


def _policies(file: File, profile: Profile | None) -> list[Recall]:
    known = profile.layers if profile is not None else [LayerProfile(())] * len(file.moe_layers)
    tokens = profile.tokens if profile is not None else 0
    return [Recall(x.expert_count, p.prior(tokens)) for x, p in zip(file.moe_layers, known, strict=True)]


def _warm(blueprint: Blueprint, pager: Pager, profile: Profile) -> None:
    """Begin to read the most used experts of all paged layers."""
    modules = dict(blueprint.model.named_modules())
    found = [(modules[x.layer.path], p) for x, p in zip(blueprint.layers, profile.layers, strict=True)]
    paged = [(m, p.busiest(m.slots.count)) for m, p in found if isinstance(m, PagedSwitch)]
    if paged:
        Warmer(pager, paged)


def _demand(blueprint: Blueprint, needs: Needs, file: File, profile: Profile | None) -> Demand:
    curves = [p.curve() for p in profile.layers] if profile is not None else [()] * len(blueprint.layers)
    experts: list[int] = []
    for x in blueprint.layers:
        experts += {x.scatters[r.layout].staging_bytes(r.codec, r.raw_size) for r in file.experts(x.layer.layer)}
    threads = READERS + 1 + (profile is not None)  # with the one that asks, and the one that warms
    once = [x.scatter.staging_bytes(x.record.codec, x.record.raw_size) for x in blueprint.residents]
    return Demand(
        name=os.path.basename(file.path),
        residents=sum(target.part.target_bytes for x in blueprint.residents for target in x.targets),
        layers=[
            LayerDemand(x.layer.expert_count, k, x.slot_bytes, curve)
            for x, k, curve in zip(blueprint.layers, needs.top_k, curves, strict=True)
        ],
        staging=max([threads * size for size in experts] + once, default=0) + device.scratch_bytes(),
        cache=needs.cache_bytes,
        workspace=needs.workspace_bytes,
    )


def _load_residents(blueprint: Blueprint, file: File, source: Source) -> None:
    """Read every resident tensor into its array; encoded ones one after another, for they are staged whole."""
    arrays: list[tuple[str, mx.array]] = []
    jobs: list[tuple[Resident, list[Bytes]]] = []
    for resident in blueprint.residents:
        views = []
        for target in resident.targets:
            array, view = device.allocate(target.shape, target.dtype)
            arrays.append((target.name, array))
            views.append(view.reshape(-1))
        jobs.append((resident, views))

    def read(job: tuple[Resident, list[Bytes]]) -> None:
        resident, places = job
        views = device.drafts(places)
        try:
            resident.scatter.read(source, resident.record, views)
        except ReadError as error:
            where = f"{file.path}: {resident.tensor.name} at byte {resident.record.offset}"
            raise ReadError(f"{where}: {error}", hint="the file is damaged; fetch it again") from error
        device.publish(views, places)

    with ThreadPoolExecutor(READERS) as pool:
        for _ in pool.map(read, [job for job in jobs if job[0].record.codec == RAW]):
            pass
    for job in jobs:
        if job[0].record.codec != RAW:
            read(job)
    fill(blueprint.model, arrays)


def _load_layer(blueprint: Blueprint, layer: ExpertLayer, count: int, pager: Pager, policy: Recall) -> bool:
    """Give an expert module its slots. True if it is paged; else every expert is read into its own row now."""
    module, arrays = layer.module, []
    views: dict[str, Bytes] = {}
    fused = device.fuses() and fusable(module)
    for target in layer.targets:
        if target.name in views:
            continue
        shape, name, twin = target.shape, target.name, ""
        if fused and name.startswith((GATE, UP)):
            leaf = name.partition(".")[2]
            shape, name, twin = (2 * shape[0], *shape[1:]), BOTH + leaf, leaf
        array, view = device.allocate((count, *shape), target.dtype)
        arrays.append((name, array))
        if twin:
            views[GATE + twin], views[UP + twin] = np.split(view, 2, axis=1)
        else:
            views[name] = view
    if fused:
        module = FusedSwitchGLU(module)
        replace_module(blueprint.model, layer.layer.path, module)
    fill(module, arrays)
    slots = Slots(pager, layer.layer, [views[t.name] for t in layer.targets], layer.scatters, policy)
    if count < layer.layer.expert_count:
        replace_module(blueprint.model, layer.layer.path, PagedSwitch(module, slots))
        return True
    slots.acquire(range(count))  # empty slots are handed out in order
    return False


def _arrays(node: Any) -> Iterator[mx.array]:
    """Every array in a model, private ones too: what is lazy can only be evaluated by the thread that made it."""
    if isinstance(node, mx.array):
        yield node
    elif isinstance(node, dict | list | tuple):
        for child in node.values() if isinstance(node, dict) else node:
            yield from _arrays(child)


def _load_tokenizer(file: File, config: dict[str, Any]) -> TokenizerWrapper:
    """mlx-lm's tokenizer from the embedded files, which lie in a folder only while it is built."""
    embedded = {"config.json": json.dumps(config).encode(), **file.bundle()}
    try:
        with tempfile.TemporaryDirectory(prefix="squizd-") as folder:
            for name, content in embedded.items():
                (Path(folder) / name).write_bytes(content)
            stop = mlx_lm_utils.load_config(Path(folder)).get("eos_token_id")
            return mlx_lm_utils.load_tokenizer(Path(folder), {"trust_remote_code": False}, eos_token_ids=stop)
    except Exception as error:  # whatever transformers makes of the files
        raise SourceError(f"{file.path}: cannot build its tokenizer: {error}") from error
