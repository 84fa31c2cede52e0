"""Recipes: what each name and override means, written out by hand."""

from __future__ import annotations

import pytest

from squizd.container.layout import MICROSCALING, ROLES, Encoding
from squizd.errors import RecipeError
from squizd.recipe import KEEP, RECIPES, Spec, choose, make_recipe, parse_spec, role_of

EIGHT, FOUR = Spec("affine", 8, 64), Spec("affine", 4, 64)


@pytest.mark.parametrize(
    ("name", "experts", "others"),
    [
        ("int8", EIGHT, EIGHT),
        ("int4", FOUR, FOUR),
        ("int3", Spec("affine", 3, 64), Spec("affine", 3, 64)),
        ("int2", Spec("affine", 2, 64), Spec("affine", 2, 64)),
        ("mixed", FOUR, EIGHT),
        ("mixed3", Spec("affine", 3, 64), EIGHT),
        ("mixed2", Spec("affine", 2, 64), EIGHT),
        ("mxfp4", Spec("mxfp4", 4, 32), Spec("mxfp4", 4, 32)),
        ("keep", KEEP, KEEP),
    ],
)
def test_a_recipe_gives_every_role_its_bits(name: str, experts: Spec, others: Spec) -> None:
    recipe = make_recipe(name)
    assert recipe.spec("expert") == experts
    assert recipe.spec("router") == (KEEP if name == "keep" else EIGHT)
    assert {recipe.spec(role) for role in ROLES.values() if role not in ("expert", "router")} == {others}


def test_every_recipe_is_tested_above() -> None:
    assert set(RECIPES) == {"int8", "int4", "int3", "int2", "mixed", "mixed3", "mixed2", "mxfp4", "keep"}


@pytest.mark.parametrize(
    ("text", "spec"),
    [("4", FOUR), ("8g64", EIGHT), ("3g128", Spec("affine", 3, 128)), ("6g32", Spec("affine", 6, 32)), ("keep", KEEP)]
    + [(mode, Spec(mode, *numbers)) for mode, numbers in MICROSCALING.items()],
)
def test_specs_read_back_as_they_print(text: str, spec: Spec) -> None:
    assert parse_spec(text) == spec
    assert parse_spec(str(spec)) == spec


@pytest.mark.parametrize("text", ["", "1", "7", "4g", "4g16", "4g256", "44", "g64", "-4", "4 g64", "int4", "KEEP", "٤"])
def test_other_specs_are_refused_with_the_list(text: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_spec(text)
    assert "2 3 4 5 6 8" in caught.value.hint


def test_the_last_override_that_matches_wins() -> None:
    recipe = make_recipe("int4", ["*.experts.*=3", "*.down_proj=6g32", "model.layers.0.*=keep"])
    assert recipe.override("model.layers.1.mlp.experts.down_proj.weight") == Spec("affine", 6, 32)
    assert recipe.override("model.layers.1.mlp.experts.up_proj.weight") == Spec("affine", 3, 64)
    assert recipe.override("model.layers.0.mlp.experts.down_proj.weight") is KEEP
    assert recipe.override("model.norm.weight") is None


@pytest.mark.parametrize("text", ["4", "=4", "*.down_proj", "*.down_proj=", "*.down_proj=9"])
def test_a_bad_override_is_refused(text: str) -> None:
    with pytest.raises(RecipeError):
        make_recipe("int4", [text])


def test_an_unknown_recipe_is_refused_with_the_list() -> None:
    with pytest.raises(RecipeError, match="no recipe 'int5'") as caught:
        make_recipe("int5")
    assert all(name in caught.value.hint for name in RECIPES)


@pytest.mark.parametrize(
    ("spec", "row", "stored"),
    [
        ("4g128", 256, Encoding("affine", "f16", 4, 128)),
        ("4g128", 192, Encoding("affine", "f16", 4, 64)),
        ("4g128", 96, Encoding("affine", "f16", 4, 32)),
        ("4g32", 128, Encoding("affine", "f16", 4, 32)),
        ("4g128", 80, None),
        ("mxfp4", 96, Encoding("mxfp4", "f16", 4, 32)),
        ("mxfp4", 80, None),
        ("nvfp4", 80, Encoding("nvfp4", "f16", 4, 16)),
        ("keep", 80, Encoding("raw", "f16")),
    ],
)
def test_a_row_gets_the_largest_group_that_divides_it(spec: str, row: int, stored: Encoding | None) -> None:
    assert choose(parse_spec(spec), "f16", (8, row)) == stored


@pytest.mark.parametrize(
    ("path", "kind", "role"),
    [
        ("model.embed_tokens", "Embedding", "embedding"),
        ("lm_head", "Linear", "head"),
        ("model.norm", "RMSNorm", "norm"),
        ("model.layers.0.post_attention_layernorm", "RMSNorm", "norm"),
        ("model.layers.0.self_attn.q_norm", "RMSNorm", "norm"),
        ("model.layers.0.self_attn.q_proj", "Linear", "attention"),
        ("model.layers.0.mlp.gate", "Linear", "router"),
        ("model.layers.0.mlp.router.gate", "Linear", "router"),
        ("model.layers.0.mlp.shared_experts.gate_proj", "Linear", "shared"),
        ("model.layers.1.mlp.gate_proj", "Linear", "dense"),
        ("model.layers.1.mlp.down_proj", "Linear", "dense"),
        ("model.rotary", "Rope", "other"),
    ],
)
def test_roles_follow_from_the_path(path: str, kind: str, role: str) -> None:
    assert role_of(path, kind, frozenset({"model.layers.0.mlp"})) == role
