"""A `.squizd` file as an mlx-lm model within a memory budget: `load`, and the `Residency` that comes with the model."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm import tokenizer_utils
from mlx_lm import utils as mlx_lm_utils

from .. import container
from ..container.layout import RAW
from ..container.reader import File
from ..errors import ReadError, RequestError, SourceError
from . import device
from .blueprint import Blueprint, ExpertLayer, draw, fill
from .budget import Budget, Demand, LayerDemand, Workspace, make_budget, parse_share, parse_size
from .pager import READERS, Pager, Slots, Stats
from .probe import Needs, probe
from .switch import PagedSwitch

DEFAULT_CONTEXT = 4096


class Residency:
    """What is in memory of one loaded model, and why. `state(model)` returns it; closes with the model."""

    def __init__(self, path: str, budget: Budget, pager: Pager, expert_count: int, paged_layers: int) -> None:
        self.path = path
        self.budget = budget
        self.expert_count = expert_count  # in all layers together
        self.paged_layers = paged_layers  # 0: every expert is resident, the graph is mlx-lm's own
        self._pager = pager
        self._cache_limit: int | None = None

    @property
    def context(self) -> int:
        """Tokens of prompt and answer for which the budget holds a cache."""
        return self.budget.context

    @property
    def prefill_step_size(self) -> int:
        """Prompt tokens to compute at once so that the workspace keeps to the budget (mlx-lm's `prefill_step_size`)."""
        return self.budget.prefill_step_size

    @property
    def resident_bytes(self) -> int:
        """Memory of the resident tensors and expert slots."""
        return self.budget.residents + self.budget.experts

    @property
    def stats(self) -> Stats:
        """The counters since loading or `reset_stats`: hits, misses, evictions, bytes_read, waves, hit_rate."""
        return self._pager.snapshot()

    def reset_stats(self) -> None:
        """Count from zero."""
        self._pager.stats = Stats()

    def close(self) -> None:
        """Stop reading: threads end, the file closes. A paged model then raises ReadError at its next miss."""
        self._pager.close()

    def __del__(self) -> None:
        self.close()


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
) -> tuple[nn.Module, tokenizer_utils.TokenizerWrapper]:
    """Load a `.squizd` file as (mlx-lm model, tokenizer); `state(model)` tells what is resident.

    `memory` ("6GB", "1.5GiB", bytes) bounds resident tensors, expert slots, the cache of `context` tokens
    and workspace together. `resident` ("25%", 0.25) is the share of each layer's experts to hold instead.
    With neither, all experts are resident if they fit in 70 % of the free memory, else that is the
    budget. `context` defaults to 4096 tokens or to what the model can, if that is less.

    The answers do not depend on any of these. On CPU the model computes in float32.

    Raises ReadError and FormatError (the file), SourceError (its model), BudgetError, RequestError.
    """
    wanted = parse_size(memory) if memory is not None else None
    share = parse_share(resident) if resident is not None else None
    file = container.open(path)
    pager = Pager(file)
    try:
        blueprint = draw(file)
        config = file.metadata["model"]["config"]
        tokens = _context(context, config)
        needs = probe(blueprint, file.path)
        budget = make_budget(
            _demand(blueprint, needs, config, file.path),
            tokens, memory=wanted, share=share, available=device.available_memory(),
        )  # fmt: skip
        _load_residents(blueprint, file)
        paged = 0
        for layer, slots in zip(blueprint.layers, budget.slots, strict=True):
            paged += _load_layer(blueprint, layer, slots, pager)
        pager.stats = Stats()
        mx.eval([array for _, array in _arrays(blueprint.model)])
        tokenizer = _load_tokenizer(file, config)
    except BaseException:
        pager.close()
        raise
    device.limit_buffer_cache(budget.workspace // 2)
    blueprint.model.squizd = Residency(
        file.path, budget, pager, sum(layer.layer.expert_count for layer in blueprint.layers), paged
    )
    return blueprint.model, tokenizer


def _context(asked: int | None, config: dict[str, Any]) -> int:
    most = _find(config, "max_position_embeddings", "max_seq_len", "n_positions", "max_sequence_length")
    if asked is None:
        return min(DEFAULT_CONTEXT, most) if most else DEFAULT_CONTEXT
    if asked < 1:
        raise RequestError(f"a context of {asked} tokens holds nothing")
    return asked


def _find(config: dict[str, Any], *names: str) -> int:
    """The first positive integer under one of `names`, in the config or its `text_config`; 0 if there is none."""
    for scope in (config, config.get("text_config")):
        for name in names:
            value = scope.get(name) if isinstance(scope, dict) else None
            if isinstance(value, int) and value > 0:
                return value
    return 0


def _demand(blueprint: Blueprint, needs: Needs, config: dict[str, Any], path: str) -> Demand:
    tensors = [x.tensor for x in blueprint.residents]
    residents = sum(t.part.target_bytes for x in blueprint.residents for t in x.targets)
    layers = [LayerDemand(x.layer.expert_count, k, x.slot_bytes) for x, k in zip(blueprint.layers, needs.top_k, strict=True)]
    embedding = max((t.shape for t in tensors if t.role in ("embedding", "head") and len(t.shape) == 2), default=(1, 1))
    hidden = _find(config, "hidden_size", "n_embd", "d_model", "dim", "model_dim") or embedding[1]
    dense = max((t.shape[-2] for t in tensors if t.role not in ("embedding", "head") and len(t.shape) > 1), default=0)
    expert = max((k * max(t.shape[0] for t in x.targets) for x, k in zip(blueprint.layers, needs.top_k, strict=True)), default=0)
    space = Workspace(
        hidden=hidden,
        inner=max(dense, expert),
        top_k=max(needs.top_k, default=0),
        heads=_find(config, "num_attention_heads", "n_head", "n_heads", "num_heads") or max(1, hidden // 64),
        vocabulary=embedding[0],
        item_bytes=4 if device.on_cpu() else 2,
        layers=len(blueprint.layers),
    )
    return Demand(
        os.path.basename(path), residents, layers, _staging(blueprint),
        needs.cache_bytes,
        lambda chunk, context: space.bytes(chunk, context) + 2 * needs.largest_cache_entry(context, chunk),
    )  # fmt: skip


def _staging(blueprint: Blueprint) -> int:
    return 0


def _load_residents(blueprint: Blueprint, file: File) -> None:
    """Read every resident tensor into its array, large compressed ones one at a time."""
    arrays: list[tuple[str, mx.array]] = []
    with ThreadPoolExecutor(READERS) as pool:
        jobs = []
        for resident in blueprint.residents:
            views = []
            for target in resident.targets:
                array, view = device.allocate(target.shape, target.dtype)
                arrays.append((target.name, array))
                views.append(view.reshape(-1))
            jobs.append((resident, views))

        def read(job: Any) -> None:
            resident, views = job
            try:
                resident.scatter.read(file, resident.record, views)
            except ReadError as error:
                where = f"{file.path}: {resident.tensor.name} at byte {resident.record.offset}"
                raise ReadError(f"{where}: {error}") from error

        list(pool.map(read, [job for job in jobs if job[0].record.codec == RAW]))
        for job in jobs:
            if job[0].record.codec != RAW:
                read(job)
    blueprint.set_arrays(arrays)


def _load_layer(blueprint: Blueprint, layer: ExpertLayer, slots: int, pager: Pager) -> bool:
    """Give an expert module its banks; True if it is paged, else all of its experts are read now, in order."""
    arrays, views = [], []
    for target in layer.targets:
        array, view = device.allocate((slots, *target.shape), target.dtype)
        arrays.append((target.name, array))
        views.append(view)
    fill(layer.module, arrays)
    table = Slots(pager, layer.layer, views, layer.scatters)
    if slots < layer.layer.expert_count:
        blueprint.replace(layer.layer.path, PagedSwitch(layer.module, table))
        return True
    table.acquire(range(slots))
    return False


def _arrays(module: Any) -> Iterator[tuple[str, mx.array]]:
    """Every array in a model, private ones too: what is lazy must be evaluated by the thread that made it."""
    if isinstance(module, mx.array):
        yield "", module
    elif isinstance(module, dict):
        for value in module.values():
            yield from _arrays(value)
    elif isinstance(module, list | tuple):
        for value in module:
            yield from _arrays(value)


def _load_tokenizer(file: File, config: dict[str, Any]) -> tokenizer_utils.TokenizerWrapper:
    """mlx-lm's tokenizer from the embedded files, which exist as files only while it is built."""
    embedded = file.bundle()
    embedded.setdefault("config.json", json.dumps(config).encode())
    with tempfile.TemporaryDirectory(prefix="squizd-") as folder:
        for name, content in embedded.items():
            (Path(folder) / name).write_bytes(content)
        try:
            eos = mlx_lm_utils.load_config(Path(folder)).get("eos_token_id")
            return mlx_lm_utils.load_tokenizer(Path(folder), {"trust_remote_code": False}, eos_token_ids=eos)
        except Exception as error:  # whatever transformers makes of the files
            raise SourceError(f"{file.path}: cannot build its tokenizer: {error}") from error
