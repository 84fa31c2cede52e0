"""Which encoding each tensor gets: named recipes, overrides by pattern, and roles.

Decides from names, roles and shapes alone; never sees a value.
"""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from .container.layout import AFFINE_BITS, AFFINE_GROUPS, MICROSCALING, Encoding
from .errors import RecipeError


@dataclass(frozen=True)
class Spec:
    """A quantization without its float type; mode "keep" stores a tensor as it comes."""

    mode: str
    bits: int = 0
    group_size: int = 0

    def __str__(self) -> str:
        return self.mode if self.mode != "affine" else f"{self.bits}g{self.group_size}"


KEEP: Final = Spec("keep")


def affine(bits: int, group_size: int = 64) -> Spec:
    """An affine spec."""
    return Spec("affine", bits, group_size)


def parse_spec(text: str) -> Spec:
    """ "keep", "4", "4g32", "mxfp4", "mxfp8" or "nvfp4"; RecipeError otherwise."""
    if text == "keep":
        return KEEP
    if text in MICROSCALING:
        return Spec(text, *MICROSCALING[text])
    found = re.fullmatch(r"([0-9])(?:g([0-9]+))?", text)
    if found:
        spec = affine(int(found[1]), int(found[2] or 64))
        if spec.bits in AFFINE_BITS and spec.group_size in AFFINE_GROUPS:
            return spec
    raise RecipeError(
        f"no such quantization: {text!r}",
        hint="use keep, mxfp4, mxfp8, nvfp4, or bits 2 3 4 5 6 8 with g32 g64 g128, as 4g64",
    )


@dataclass(frozen=True)
class Recipe:
    """Specs for experts, for routers, and for everything else that can be quantized.

    `apart`: by tensor name, specs that some experts have instead of what the rest says.
    """

    name: str
    experts: Spec
    routers: Spec
    others: Spec
    overrides: tuple[tuple[str, Spec], ...] = ()
    apart: Mapping[str, Mapping[int, Spec]] = field(default_factory=dict)

    def override(self, name: str) -> Spec | None:
        """The last override whose pattern matches "model.layers.0.mlp.gate.weight", with or without ".weight"."""
        return next((spec for pattern, spec in reversed(self.overrides) if _matches(pattern, name)), None)

    def check_overrides(self, names: Sequence[str]) -> None:
        """RecipeError for an override that matches none of `names`, the tensors that are there to quantize."""
        for pattern, spec in self.overrides:
            if not any(_matches(pattern, name) for name in names):
                example = f", as {names[0]}" if names else ""
                raise RecipeError(
                    f"override {pattern}={spec} matches no tensor that can be quantized",
                    hint=f"patterns are matched against whole tensor paths{example}",
                )

    def spec(self, role: str) -> Spec:
        """The spec for a tensor of `role`."""
        return {"expert": self.experts, "router": self.routers}.get(role, self.others)

    def describe(self) -> dict[str, object]:
        """For the file's metadata; of experts apart how many there are, as each record says what it has."""
        found: dict[str, object] = {
            "name": self.name,
            "experts": str(self.experts),
            "routers": str(self.routers),
            "others": str(self.others),
            "overrides": [[pattern, str(spec)] for pattern, spec in self.overrides],
        }
        if self.apart:
            found["apart"] = {name: Counter(map(str, some.values())) for name, some in self.apart.items()}
        return found


def _matches(pattern: str, name: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name.removesuffix(".weight"), pattern)


# Routers decide which experts run, are tiny, and never go below 8 bits.
RECIPES: Final = {
    "int8": Recipe("int8", affine(8), affine(8), affine(8)),
    "int4": Recipe("int4", affine(4), affine(8), affine(4)),
    "int3": Recipe("int3", affine(3), affine(8), affine(3)),
    "int2": Recipe("int2", affine(2), affine(8), affine(2)),
    "mixed": Recipe("mixed", affine(4), affine(8), affine(8)),
    "mixed3": Recipe("mixed3", affine(3), affine(8), affine(8)),
    "mixed2": Recipe("mixed2", affine(2), affine(8), affine(8)),
    "mxfp4": Recipe("mxfp4", parse_spec("mxfp4"), affine(8), parse_spec("mxfp4")),
    "keep": Recipe("keep", KEEP, KEEP, KEEP),
}


def make_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """A named recipe with "PATTERN=SPEC" overrides; RecipeError for an unknown name or bad override."""
    if name not in RECIPES:
        raise RecipeError(f"no recipe {name!r}", hint="recipes: " + ", ".join(RECIPES))
    parsed = []
    for text in overrides:
        pattern, separator, spec = text.rpartition("=")
        if not separator or not pattern:
            raise RecipeError(
                f"override {text!r} is not PATTERN=SPEC", hint="for example --override '*.down_proj=6g64'"
            )
        parsed.append((pattern, parse_spec(spec)))
    base = RECIPES[name]
    return Recipe(base.name, base.experts, base.routers, base.others, tuple(parsed))


def choose(spec: Spec, dtype: str, shape: tuple[int, ...]) -> Encoding | None:
    """The encoding of a tensor of float `dtype` under `spec`, or None where its rows fit no group.

    A row that is no multiple of the group size gets the next smaller affine group that divides it.
    """
    if spec is KEEP or spec.mode == "keep":
        return Encoding("raw", dtype)
    sizes = [spec.group_size]
    if spec.mode == "affine":
        sizes += [g for g in reversed(AFFINE_GROUPS) if g < spec.group_size]
    for size in sizes:
        if shape[-1] % size == 0:
            return Encoding(spec.mode, dtype, spec.bits, size)
    return None


def role_of(path: str, kind: str, expert_parents: frozenset[str]) -> str:
    """The registry role of a module from its path and class name.

    `expert_parents` are the paths of the modules that hold expert modules.
    """
    last = path.rpartition(".")[2]
    if kind == "Embedding":
        return "embedding"
    if last in ("lm_head", "output_layer") or path == "output":
        return "head"
    if "Norm" in kind or "norm" in last:
        return "norm"
    if last == "shared_expert_gate":  # decides, like a router, how much of the shared expert is heard
        return "router"
    if "shared" in path:
        return "shared"
    near_experts = any(path.startswith(p + ".") for p in expert_parents)
    if near_experts and re.search(r"\.(gate|router|wg)(\.|$)", path) and last not in ("gate_proj",):
        return "router"
    if re.search(r"attn|attention|mixer|mamba", path):
        return "attention"
    if re.search(r"mlp|ffn|feed_forward", path):
        return "dense"
    return "other"
