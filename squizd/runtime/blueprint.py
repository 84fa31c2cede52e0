"""The model that a file describes, complete in shape and empty of weights, and where every stored part goes.

Knows module paths and array shapes; reads no payload and materialises nothing: after `draw` each
parameter is a lazy constant of the type and shape that the loaded one will have.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from .. import architecture
from ..container.layout import Layout, MoeLayer, Record, Tensor
from ..container.reader import File
from ..errors import SourceError, SquizdError
from .device import compute_type, widened
from .io import Part, Scatter


@dataclass(frozen=True)
class Target:
    """One array of the model: parameter name, shape, type, and the part of a record that fills it.

    In an expert layer the name is relative to the expert module and the shape is that of one expert.
    """

    name: str
    shape: tuple[int, ...]
    dtype: mx.Dtype
    part: Part


@dataclass(frozen=True)
class Resident:
    """A record that is loaded once: its arrays and how to read it."""

    tensor: Tensor
    record: Record
    targets: tuple[Target, ...]
    scatter: Scatter


@dataclass(frozen=True)
class ExpertLayer:
    """A module whose arrays hold one row per expert, and how to read a row.

    `targets` are made for the widest codes that an expert of the layer has; others are widened when they are read.
    """

    layer: MoeLayer
    module: nn.Module
    targets: tuple[Target, ...]
    scatters: dict[int, Scatter]  # by shard-layout id; all fill `targets`

    @property
    def slot_bytes(self) -> int:
        """Memory of one expert."""
        return sum(target.part.target_bytes for target in self.targets)


@dataclass(frozen=True)
class Blueprint:
    """An mlx-lm model without weights, and what fills it."""

    model: nn.Module
    residents: tuple[Resident, ...]
    layers: tuple[ExpertLayer, ...]


def fill(module: nn.Module, arrays: Iterable[tuple[str, mx.array]]) -> None:
    """Give the named parameters of `module` these arrays."""
    tree: Any = tree_unflatten(list(arrays))
    module.update(tree, strict=False)


def draw(file: File) -> Blueprint:
    """The blueprint of an open file.

    Raises SourceError, naming the tensor, for an unknown architecture and for names or shapes that
    are missing, left over or different from what the architecture wants.
    """
    config = file.metadata.get("model", {}).get("config")
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise SourceError(f"{file.path}: the metadata holds no model config")
    if config.get("quantize_activations"):
        raise SourceError(f"{file.path} asks for quantized activations, which squizd cannot run")
    members = file.metadata.get("set", {}).get("count", 1)
    if members > 1:
        raise SourceError(f"{file.path} is one of a set of {members} files", hint="this version runs single files only")
    state: Any = mx.random.state
    key = state[0].tolist()  # the seed's upper and lower half
    try:
        return _draw(file, config)
    finally:  # building a model draws random numbers, lazily; a caller's seed must not depend on that
        mx.random.seed(key[0] << 32 | key[1])


def _draw(file: File, config: dict[str, Any]) -> Blueprint:
    model = _build(config, file.path)
    kind = config["model_type"]
    layouts = {x.path: sorted({record.layout for record in file.experts(x.layer)}) for x in file.moe_layers}
    # A draft head's tensors belong to no module of the model itself.
    stored = [(tensor, record) for tensor, record in file.residents.values() if tensor.role != "draft"]
    tensors = {tensor.name: tensor for tensor, _ in stored}
    widest = {path: _widest(file, path, found) for path, found in layouts.items()}
    for path, chosen in widest.items():
        tensors |= {f"{path}.{t.name}": t for t in chosen.values()}
    modules = architecture.expert_modules(model)
    counts = {x.path: x.expert_count for x in file.moe_layers}
    _quantize(model, tensors, counts, file.path)

    wanted: dict[str, tuple[int, ...]] = {name: tuple(array.shape) for name, array in tree_flatten(model.parameters())}
    stand_ins: list[tuple[str, mx.array]] = []

    def claim(name: str, shape: tuple[int, ...], dtype: mx.Dtype) -> tuple[int, ...]:
        """The shape that the model has for this array. The format stores a scalar as [1]."""
        if name not in wanted:
            raise SourceError(f"{file.path}: tensor {name} has no place in {kind}")
        own = wanted.pop(name)
        if shape not in (own, (*own, 1)):
            raise SourceError(f"{file.path}: tensor {name} is stored as {list(shape)}, {kind} wants {list(own)}")
        stand_ins.append((name, mx.broadcast_to(mx.zeros((), dtype), own)))
        return own

    residents, layers = [], []
    for tensor, record in stored:
        targets = tuple(replace(t, shape=claim(t.name, t.shape, t.dtype)) for t in _targets(tensor))
        residents.append(Resident(tensor, record, targets, Scatter([t.part for t in targets], record.raw_size)))
    for layer in file.moe_layers:
        if layer.path not in modules:
            raise SourceError(f"{file.path}: {kind} has no expert module {layer.path}")
        targets = tuple(
            replace(t, shape=claim(f"{layer.path}.{t.name}", (layer.expert_count, *t.shape), t.dtype)[1:])
            for t in _expert_targets(widest[layer.path].values())
        )
        scatters = {i: _scatter(file.layouts[i], widest[layer.path]) for i in layouts[layer.path]}
        layers.append(ExpertLayer(layer, modules[layer.path], targets, scatters))
    if wanted:
        name = min(wanted)
        raise SourceError(
            f"{file.path}: no tensor {name} {list(wanted[name])}, which {kind} wants ({len(wanted)} such)"
        )
    blueprint = Blueprint(model, tuple(residents), tuple(layers))
    fill(model, stand_ins)
    return blueprint


def _build(config: dict[str, Any], where: str) -> nn.Module:
    try:
        return architecture.build(config, where)
    except SquizdError:
        raise
    except Exception as error:  # whatever a constructor raises on a config that nobody vouches for
        raise SourceError(f"{where}: mlx-lm cannot build {config['model_type']}: {error!r}") from error


def _quantize(model: nn.Module, tensors: dict[str, Tensor], counts: dict[str, int], where: str) -> None:
    """Turn every module whose weight is stored quantized into its quantized kind; `counts`: experts by module path."""
    left = {name for name, tensor in tensors.items() if tensor.encoding.mode != "raw"}

    def predicate(path: str, module: nn.Module) -> bool | dict[str, Any]:
        name = f"{path}.weight"
        if name not in left or not hasattr(module, "to_quantized"):
            return False
        left.remove(name)
        encoding, shape, own = tensors[name].encoding, tensors[name].shape, tuple(module["weight"].shape)
        count = counts.get(path.rpartition(".")[0])
        if (shape if count is None else (count, *shape)) != own:
            raise SourceError(f"{where}: tensor {name} is stored as {list(shape)}, its module wants {list(own)}")
        parameters: dict[str, Any] = {"group_size": encoding.group_size, "bits": encoding.bits, "mode": encoding.mode}
        if f"{path}.global_scale" in tensors:
            parameters["global_scale"] = True
        return parameters

    try:
        nn.quantize(model, class_predicate=predicate)
    except (ValueError, TypeError) as error:
        raise SourceError(f"{where}: mlx-lm cannot hold these encodings: {error}") from error
    if left:
        raise SourceError(f"{where}: tensor {min(left)} is stored quantized, its module cannot be ({len(left)} such)")


def _widest(file: File, path: str, layouts: list[int]) -> dict[str, Tensor]:
    """The expert tensors of a layer by name, each as it is where it has the most bits: what slots are made for."""
    found = {t.name: t for t in file.layouts[layouts[0]].tensors}
    for i in layouts[1:]:
        others = {t.name: t for t in file.layouts[i].tensors}
        if {name: _kind(t) for name, t in others.items()} != {name: _kind(t) for name, t in found.items()}:
            raise SourceError(
                f"{file.path}: the experts of {path} are not all stored alike (see shard layout {i})",
                hint="inside a layer only the bits of affine tensors may differ: no name, shape, type or group size",
            )
        found = {name: max(t, others[name], key=lambda t: t.encoding.bits) for name, t in found.items()}
    return found


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    """What the experts of a layer must have in common."""
    encoding = tensor.encoding
    return tensor.shape, replace(encoding, bits=8) if encoding.mode == "affine" else encoding


def _expert_targets(tensors: Iterable[Tensor]) -> list[Target]:
    return sorted((target for tensor in tensors for target in _targets(tensor)), key=lambda target: target.name)


def _scatter(layout: Layout, widest: dict[str, Tensor]) -> Scatter:
    """How records of `layout` fill slots made for `widest`."""
    narrow = {t.name: (t.encoding.bits, widest[t.name].encoding.bits) for t in layout.tensors}

    def part(target: Target) -> Part:
        bits = narrow.get(target.name)  # codes have their tensor's name
        return target.part if bits is None or bits[0] == bits[1] else replace(target.part, bits=bits)

    return Scatter([part(target) for target in _expert_targets(layout.tensors)], layout.raw_size)


def _targets(tensor: Tensor) -> tuple[Target, ...]:
    """The arrays that a stored tensor becomes, in MLX's shapes (`mx.quantize`)."""
    encoding, shape = tensor.encoding, tensor.shape
    floats, wide = compute_type(encoding.dtype), widened(encoding.dtype)
    if encoding.mode == "raw":
        return (Target(tensor.name, shape, floats, Part(*tensor.codes, wide)),)
    path = tensor.name.removesuffix("weight")
    row = shape[-1]
    codes = (*shape[:-1], row * encoding.bits // 32)
    groups = (*shape[:-1], row // encoding.group_size)
    found = [Target(tensor.name, codes, mx.uint32, Part(*tensor.codes))]
    if encoding.mode == "affine":
        found.append(Target(path + "scales", groups, floats, Part(*tensor.scales, wide)))
        found.append(Target(path + "biases", groups, floats, Part(*tensor.biases, wide)))
    else:
        found.append(Target(path + "scales", groups, mx.uint8, Part(*tensor.scales)))
    return tuple(found)
