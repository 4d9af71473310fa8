"""Sensitivity and cost tables: shapes, files, totals, errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mixbit import CostTable, LayerPrecision, Recipe, SensitivityTable
from mixbit.errors import MixbitError

BITS = [2, 4, 8]


def sensitivity() -> SensitivityTable:
    values = np.arange(18, dtype=float).reshape(2, 3, 3)
    values[0, 0, 0], values[1, 2, 2] = -np.inf, np.inf
    return SensitivityTable.from_arrays(["a", "b"], values, BITS, BITS, input_group=[0, 1])


def cost(**options) -> CostTable:
    bits = np.array([*BITS, 32], float)
    values = np.array([10.0, 3.0])[:, None, None] * bits[:, None] * bits
    return CostTable.from_arrays(
        ["a", "b"], values, [*BITS, 32], [*BITS, 32], unit="bops", input_group=[0, 1], **options
    )


def test_sensitivity_survives_a_file_with_infinities(tmp_path: Path) -> None:
    table = sensitivity()
    table.point, table.options = "layer_output", {"joint": False}
    table.weight_sqnr_db = np.ones((2, 3))
    table.save(tmp_path / "t.json")
    again = SensitivityTable.load(tmp_path / "t.json")
    assert np.array_equal(again.sqnr_db, table.sqnr_db)
    assert (again.layers, again.act_bits, again.input_group) == (table.layers, table.act_bits, table.input_group)
    assert again.options == table.options
    assert np.array_equal(again.weight_sqnr_db, table.weight_sqnr_db)
    first = (tmp_path / "t.json").read_bytes()
    again.save(tmp_path / "t.json")
    assert (tmp_path / "t.json").read_bytes() == first
    again.to_csv(tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_text().splitlines()[:2] == ["layer,act_bits,weight_bits,sqnr_db", "a,2,2,-inf"]


def test_prediction_adds_noise_ratios() -> None:
    table = SensitivityTable.from_arrays(["a", "b"], [[[10.0, 20], [10, 20]]] * 2, [2, 4], [2, 4])
    recipe = Recipe(layers={"a": LayerPrecision(weight=4, act=2), "b": LayerPrecision(weight=2, act=4)})
    assert table.predicted_sqnr_db(recipe) == pytest.approx(-10 * np.log10(0.01 + 0.1))
    recipe.layers["b"] = LayerPrecision(weight=None, act=None)
    assert table.predicted_sqnr_db(recipe) == pytest.approx(20.0)
    assert table.diagonal().sqnr_db.tolist() == [[10, 20], [10, 20]]
    assert table.diagonal().joint


def test_totals_and_uniform() -> None:
    table = cost()
    recipe = Recipe(layers={"a": LayerPrecision(weight=2, act=4), "b": LayerPrecision(weight=None, act=8)})
    assert table.total(recipe) == 10 * 8 + 3 * 8 * 32
    assert table.uniform(8, 8) == 13 * 64
    assert table.uniform(act=4, weight=4) == 10 * 4 * 8 + 3 * 16  # the network input stays at 8
    assert table.uniform(None, None) == 13 * 1024
    assert table.uniform(2, 2, first_last=8) == 13 * 64
    peak = cost(reduce="max")
    assert peak.total(recipe) == 3 * 8 * 32


def test_a_missing_width_names_layer_and_width() -> None:
    recipe = Recipe.uniform(["a", "b"], weight=3, act=8)
    with pytest.raises(KeyError, match="layer 'a': no weight width 3"):
        cost().total(recipe)
    with pytest.raises(KeyError, match="layer 'a': no act width 32"):
        sensitivity().entry("a", None, 2)


def test_outputs_are_priced_at_the_consumer() -> None:
    values = np.ones((2, 2, 2))
    out = np.broadcast_to(np.array([4.0, 8.0]), (2, 2, 2, 2))
    table = CostTable.from_arrays(["a", "b"], values, [4, 8], [4, 8], values_out=out, consumer=["b", None])
    recipe = Recipe(layers={"a": LayerPrecision(weight=8, act=8), "b": LayerPrecision(weight=8, act=4)})
    assert table.total(recipe) == 4 + 8
    added = CostTable.from_arrays(["a", "b"], values, [4, 8], [4, 8], values_out=out, consumer=[4, 4])
    assert added.total(recipe) == 8


def test_cost_survives_a_file(tmp_path: Path) -> None:
    out = np.ones((2, 4, 4, 4))
    table = cost(values_out=out, consumer=["b", None])
    table.save(tmp_path / "c.json")
    again = CostTable.load(tmp_path / "c.json")
    assert np.array_equal(again.values, table.values)
    assert np.array_equal(again.values_out, out)
    assert (again.unit, again.reduce, again.consumer) == ("bops", "sum", ("b", None))
    table.to_csv(tmp_path / "c.csv")
    assert "a,2,2,40.0,bops" in (tmp_path / "c.csv").read_text()


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: SensitivityTable.from_arrays(["a"], np.ones((1, 2, 3)), [2, 4], [2, 4]), r"expected \(1, 2, 2\)"),
        (lambda: SensitivityTable.from_arrays(["a"], np.ones((1, 2)), [2, 4], [2, 8]), "joint"),
        (lambda: SensitivityTable.from_arrays(["a"], [[np.nan]], [2], [2]), "holds NaN"),
        (lambda: SensitivityTable.from_arrays(["a", "a"], np.ones((2, 1)), [2], [2]), "'a' appears twice"),
        (lambda: CostTable.from_arrays(["a"], np.ones((1, 2, 1)), [4, 2], [2]), "ascending bit-widths"),
        (lambda: CostTable.from_arrays(["a"], -np.ones((1, 1, 1)), [2], [2]), "negative or non-finite"),
        (lambda: CostTable.from_arrays(["a"], [[[np.inf]]], [2], [2]), "negative or non-finite"),
        (lambda: cost(consumer=["c", None]), "no layer 'c'"),
        (lambda: cost(reduce="mean"), "reduce='mean'"),
        (lambda: cost(values_out=np.ones((2, 4, 4, 3))), "values_out has shape"),
        (lambda: CostTable.from_arrays(["a"], [[[1.0]]], [2], [2], input_group=[0, 1]), "expected 1 numbers"),
    ],
)
def test_bad_tables_are_named(make, complaint: str) -> None:
    with pytest.raises(MixbitError, match=complaint):
        make()


def test_bad_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    sensitivity().save(path)
    text = path.read_text()
    for content, complaint in [
        (text[:-30], "not a whole JSON document"),
        (text.replace("mixbit-sensitivity", "mixbit-cost"), "not a mixbit-sensitivity file"),
        (text.replace('"version": 1', '"version": 9'), "newer than"),
        (text.replace('"act_bits"', '"act"'), "lacks 'act_bits'"),
        (text.replace('"-inf"', '"minus"'), "holds 'minus'"),
    ]:
        path.write_text(content)
        with pytest.raises(MixbitError, match=complaint):
            SensitivityTable.load(path)


def test_plot_is_a_figure() -> None:
    figure = sensitivity().plot()
    assert figure.axes[0].get_xlabel() == "bits of act and weight"
