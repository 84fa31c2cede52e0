"""What a checkpoint holds and what becomes of each tensor: its name in mlx-lm's model, role, shape and encoding.

Sees names, shapes and types, never a value.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import infer_quant_config

from .architecture import build, expert_modules
from .checkpoint import Checkpoint
from .container.layout import FLOATS, Encoding
from .errors import RecipeError, SourceError
from .recipe import KEEP, Recipe, choose, role_of
from .weights import read as read_weights

_DTYPES = {
    mx.float32: "f32", mx.float16: "f16", mx.bfloat16: "bf16", mx.uint8: "u8", mx.int8: "i8", mx.uint16: "u16",
    mx.int16: "i16", mx.uint32: "u32", mx.int32: "i32", mx.uint64: "u64", mx.int64: "i64",
}  # fmt: skip
QUANTIZATION_KEYS = ("quantization", "quantization_config")


@dataclass
class Item:
    """One tensor to store: `parts` are the lazy arrays of a tensor that comes quantized."""

    name: str
    role: str
    encoding: Encoding
    shape: tuple[int, ...]  # of one expert where role is expert
    weight: str  # key of the (codes or raw) array in the sanitized checkpoint
    packed: bool = False
    apart: dict[int, Encoding] = field(default_factory=dict)  # by expert, where it is not `encoding`

    def names(self) -> list[str]:
        """All of its arrays in the sanitized checkpoint."""
        path = self.weight.rpartition(".")[0]
        more = [f"{path}.scales", *([f"{path}.biases"] if self.encoding.mode == "affine" else [])]
        return [self.weight, *(more if self.packed else [])]

    def entry(self, expert: int = -1) -> tuple[str, str, Encoding, tuple[int, ...]]:
        """As a plan of a file has it, for one expert where it has several."""
        return self.name, self.role, self.apart.get(expert, self.encoding), self.shape


@dataclass
class Inventory:
    """The whole plan: residents in order, and per expert module its items."""

    residents: list[Item] = field(default_factory=list)
    experts: dict[str, list[Item]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    quantizable: list[str] = field(default_factory=list)
    unquantized: list[str] = field(default_factory=list)

    def weight_bytes(self, widest: bool = False) -> int:
        """What all tensors take as they are stored, without padding; or with every expert in the widest encoding."""
        items = [(item, item.encoding) for item in self.residents]
        for path, group in self.experts.items():
            for item in group:
                some = [item.apart.get(expert, item.encoding) for expert in range(self.counts[path])]
                most = max(some, key=lambda encoding: encoding.bits)
                items += [(item, most if widest else encoding) for encoding in some]
        return sum(sum(encoding.part_sizes(item.shape)) for item, encoding in items)

    def starts(self) -> dict[str, int]:
        """By expert module, the number of its first record."""
        found, at = dict[str, int](), len(self.residents)
        for path in self.experts:
            found[path] = at
            at += self.counts[path]
        return found


def lay_out(checkpoint: Checkpoint, recipe: Recipe) -> tuple[dict[str, mx.array], Inventory]:
    """Lazy arrays by name, and what is stored of them; SourceError or RecipeError where things do not fit."""
    where = str(checkpoint.repo or checkpoint.folder)
    found = [checkpoint.config[key] for key in QUANTIZATION_KEYS if isinstance(checkpoint.config.get(key), dict)]
    method = found[0].get("quant_method") if found else None
    if method in ("awq", "gptq"):
        raise SourceError(f"{where} is {method}-quantized", hint="convert it with mlx_lm.convert first")
    model = build(checkpoint.config, where)
    weights = read_weights(checkpoint, model)
    job, left = Inventory(), set(weights)
    modules = expert_modules(model)
    parents = frozenset(path.rpartition(".")[0] for path in modules)
    owners: dict[str, nn.Module] = dict(model.named_modules())
    for name, parameter in tree_flatten(model.parameters()):
        path, _, leaf = name.rpartition(".")
        owner = owners.get(path)
        expert_path = next((p for p in modules if name.startswith(p + ".")), "")
        role = "expert" if expert_path else role_of(path, type(owner).__name__, parents)
        if name not in weights:
            raise SourceError(f"{where} has no tensor {name}")
        for item in _items(name, path, leaf, role, parameter.shape, owner, weights, recipe, model, job, where):
            left -= {item.weight, *([f"{path}.scales", f"{path}.biases"] if item.packed else [])}
            if expert_path:
                item.name = item.name.removeprefix(expert_path + ".")
                job.counts[expert_path] = item.shape[0]
                item.shape = item.shape[1:] or (1,)
                job.experts.setdefault(expert_path, []).append(item)
            else:
                job.residents.append(item)
    if left:
        raise SourceError(
            f"{where}: tensor {min(left)} has no place in {checkpoint.config['model_type']} ({len(left)} such)"
        )
    recipe.check_overrides(job.quantizable)
    if unknown := sorted(recipe.apart.keys() - set(job.quantizable)):
        raise RecipeError(
            f"{unknown[0]}: no tensor of this name can be quantized",
            hint="experts apart are listed by whole tensor names, with .weight",
        )
    return weights, job


def _items(
    name: str, path: str, leaf: str, role: str, shape: tuple[int, ...], owner: Any, weights: dict[str, mx.array],
    recipe: Recipe, model: nn.Module, job: Inventory, where: str,
) -> list[Item]:  # fmt: skip
    """How the parameter `name` is stored: one item, or two where it comes with an nvfp4 global scale."""
    w = weights[name]
    if leaf == "weight" and f"{path}.scales" in weights:
        encoding = _packed_encoding(name, path, shape, owner, weights, where)
        items = [Item(name, role, encoding, tuple(shape), name, packed=True)]
        if f"{path}.global_scale" in weights:
            scale = weights[f"{path}.global_scale"]
            items.append(
                Item(
                    f"{path}.global_scale",
                    role,
                    Encoding("raw", dtype_of(scale)),
                    tuple(scale.shape),
                    f"{path}.global_scale",
                )
            )
        return items
    if tuple(w.shape) != tuple(shape):
        raise SourceError(
            f"{where}: {name} has shape {list(w.shape)}, {type(model).__module__.split('.')[-1]} wants {list(shape)}"
        )
    if w.dtype not in _DTYPES:
        raise SourceError(f"{where}: {name} has type {w.dtype}, which the format does not know")
    encoding = Encoding("raw", dtype_of(w))
    if leaf == "weight" and hasattr(owner, "to_quantized") and encoding.dtype in FLOATS:
        predicate = getattr(model, "quant_predicate", None)
        vetoed = predicate is not None and predicate(path, owner) is False  # mlx-lm knows tensors that must stay
        job.quantizable.append(name)
        spec = recipe.override(name) or (KEEP if vetoed else recipe.spec(role))
        quantized = choose(spec, encoding.dtype, tuple(shape))
        if quantized is None:
            job.unquantized.append(name)
        encoding = quantized or encoding
    return [Item(name, role, encoding, tuple(shape) or (1,), name, apart=_apart(name, role, encoding, shape, recipe))]


def _apart(name: str, role: str, encoding: Encoding, shape: tuple[int, ...], recipe: Recipe) -> dict[int, Encoding]:
    """What the experts apart from the others get. RecipeError if a reader could not hold them in one array."""
    found = {}
    for expert, spec in recipe.apart.get(name, {}).items():
        if role != "expert":
            raise RecipeError(f"{name} has no experts", hint="experts apart are listed by tensors of expert modules")
        if not 0 <= expert < shape[0]:
            raise RecipeError(
                f"{name} has {shape[0]} experts, and {expert} is none of them", hint="experts are counted from 0"
            )
        other = choose(spec, encoding.dtype, tuple(shape))
        if other is None or encoding.mode != "affine" or replace(other, bits=encoding.bits) != encoding:
            raise RecipeError(
                f"{name}: expert {expert} cannot be {spec} beside {encoding}",
                hint="experts of a tensor may differ in bits, not in group size",
            )
        found[expert] = other
    return found


def _packed_encoding(
    name: str, path: str, shape: tuple[int, ...], owner: Any, weights: dict[str, mx.array], where: str
) -> Encoding:
    """The encoding of a tensor that comes quantized; SourceError unless its parts have the sizes that follow."""
    parts = [weights.get(key) for key in (name, f"{path}.scales", f"{path}.biases")]
    try:
        found = infer_quant_config(path, owner, weights)
        dtype = dtype_of(weights[f"{path}.scales"]) if found["mode"] == "affine" else "bf16"
        encoding = Encoding(found["mode"], dtype, found["bits"], found["group_size"])
    except (ValueError, KeyError, ZeroDivisionError) as error:
        raise SourceError(f"{where}: cannot tell how {name} is quantized: {error}") from error
    if not encoding.is_registered():
        raise SourceError(f"{where}: {name} is stored as {encoding}, which the format does not know")
    sizes = tuple(0 if part is None else part.nbytes for part in parts)
    if sizes != encoding.part_sizes(tuple(shape)):
        raise SourceError(f"{where}: {name} and its scales do not make {encoding} of shape {list(shape)}")
    return encoding


def dtype_of(array: mx.array) -> str:
    """The format's name of an array's type."""
    return _DTYPES[array.dtype]
