"""Recipes: lookup, files, checks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixbit.errors import MixbitError
from mixbit.recipe import FLOAT, LayerPrecision, Recipe

bits = st.one_of(st.none(), st.integers(2, 16))
precisions = st.builds(
    LayerPrecision,
    weight=bits,
    act=bits,
    signed_act=st.sampled_from([None, True, False]),
    granularity=st.sampled_from(["per_channel", "per_tensor"]),
    narrow_range=st.booleans(),
    rounding=st.sampled_from(["half_even", "half_up"]),
)
recipes = st.builds(
    Recipe,
    layers=st.dictionaries(st.text("abc.*0", min_size=1, max_size=6), precisions, max_size=5),
    default=st.one_of(st.none(), precisions),
    cost=st.dictionaries(st.sampled_from(["bops", "bits"]), st.floats(0, 1e12)),
    sqnr_db=st.one_of(st.none(), st.floats(-20, 60)),
)


@given(recipes)
def test_save_and_load_are_inverse_and_keep_the_order(tmp_path_factory, recipe: Recipe) -> None:
    path = tmp_path_factory.getbasetemp() / "recipe.json"
    recipe.save(path)
    again = Recipe.load(path)
    assert again == recipe
    assert list(again.layers) == list(recipe.layers)
    first = path.read_bytes()
    again.save(path)
    assert path.read_bytes() == first


def test_lookup_is_exact_then_first_glob_then_default_then_float() -> None:
    four, six, two = (LayerPrecision(weight=b, act=b) for b in (4, 6, 2))
    recipe = Recipe(layers={"features.*": four, "features.0.0": six, "*.0": two})
    assert recipe["features.0.0"] == six
    assert recipe["features.1.conv.0"] == four  # the star crosses dots; the first match in file order
    assert recipe["head.0"] == two
    assert recipe["head"] == FLOAT
    recipe.default = six
    assert recipe["head"] == six


def test_the_contract_example_loads() -> None:
    recipe = Recipe.from_dict(
        {
            "format": "mixbit-recipe",
            "version": 1,
            "default": {"weight": 8, "act": 8},
            "layers": {"conv1": {"weight": 4, "act": 6}},
            "tensors": {"default": {"act": 8}, "add*": {"act": 6}},
            "cost": {"bops": 12.0},
            "sqnr_db": 20.1,
        }
    )
    assert recipe["conv1"] == LayerPrecision(weight=4, act=6)
    assert recipe["other"].weight == 8
    assert recipe.tensor_bits("add_1") == 6
    assert recipe.tensor_bits("cat") == 8


@pytest.mark.parametrize(
    ("document", "complaint"),
    [
        ({"layrs": {}}, "unknown key 'layrs'.*did you mean 'layers'"),
        ({"layers": {"a": {"wieght": 4}}}, r"layers\['a'\]: unknown key 'wieght'.*did you mean 'weight'"),
        ({"layers": {"a": {"weight": 17}}}, "weight=17: expected a whole number of bits from 1 to 16"),
        ({"layers": {"a": {"weight": True}}}, "weight=True"),
        ({"layers": {"a": {"act": 4.5}}}, "act=4.5"),
        ({"layers": {"a": {"weight": 1}}}, "leaves only the level 0"),
        ({"layers": {"a": {"granularity": "per_chanel"}}}, "did you mean 'per_channel'"),
        ({"layers": {"a": {"rounding": "up"}}}, "rounding='up'"),
        ({"layers": {"a": 4}}, r"layers\['a'\] is 4"),
        ({"layers": [1]}, r"layers is \[1\]"),
        ({"tensors": {"default": {"act": None}}}, "act is null"),
        ({"sqnr_db": "high"}, "sqnr_db='high'"),
    ],
)
def test_bad_documents_are_named(document: dict, complaint: str) -> None:
    with pytest.raises(MixbitError, match=complaint):
        Recipe.from_dict(document)


def test_bad_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    Recipe().save(path)
    text = path.read_text()
    for content, complaint in [
        (text[: len(text) // 2], "not a whole JSON document"),
        (text.replace("mixbit-recipe", "mixbit-cost"), "not a mixbit-recipe file"),
        (text.replace('"version": 1', '"version": 2'), "newer than this mixbit reads"),
        (json.dumps({**json.loads(text), "layers": {"a": {"act": 99}}}), "r.json.*act=99"),
    ]:
        path.write_text(content)
        with pytest.raises(MixbitError, match=complaint):
            Recipe.load(path)


def test_unknown_names_are_refused_with_the_nearest() -> None:
    recipe = Recipe.uniform(["layer1.conv1", "*.fc"])
    recipe.check_names(["layer1.conv1"])
    with pytest.raises(MixbitError, match="no layer 'layer1.conv1'; did you mean 'layer1.conv2'"):
        recipe.check_names(["layer1.conv2"])
