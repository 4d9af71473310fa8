"""Costs of real shapes; latency tables."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

import mixbit
from mixbit.costs.latency import COLUMNS, shape_key
from mixbit.errors import MixbitError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from nets import Residual, seeded

X = torch.randn(2, 3, 6, 6)


def test_totals_of_known_networks() -> None:
    model = torchvision.models.mobilenet_v2(weights=None).eval()
    x = torch.randn(1, 3, 224, 224)
    assert mixbit.costs.bops(model, x).uniform(8, 8) == 300_774_272 * 64
    assert mixbit.costs.weight_memory(model, x).uniform(8, 4) == 3_469_760 * 4
    assert mixbit.costs.ops(model, x).uniform(8, 4) == 300_774_272 * 8


def test_each_cost_by_hand() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 2)).eval()
    macs, weights = [16 * 4 * 27, 128], [108, 128]
    recipe = mixbit.Recipe.uniform(["0", "2"], weight=4, act=8)
    assert mixbit.costs.ops(model, X).total(recipe) == sum(macs) * 8
    assert mixbit.costs.bops(model, X).total(recipe) == sum(macs) * 32
    assert mixbit.costs.weight_memory(model, X).total(recipe) == sum(weights) * 4
    peak = mixbit.costs.activation_memory(model, X)
    assert peak.total(recipe) == 108 * 8 + 64 * 8
    assert peak.reduce == "max"


def test_costs_are_for_one_image_and_know_the_groups() -> None:
    model = seeded(Residual)
    one, four = (mixbit.costs.bops(model, torch.randn(n, 3, 6, 6)) for n in (1, 4))
    assert one.uniform(8, 8) == four.uniform(8, 8)
    assert one.input_group == (0, 1, 2, 1, 3)


def latency_rows(model: nn.Module, widths=(4, 8)) -> list[list]:
    rows = []
    for layer in mixbit.layers(model, X):
        for a in widths:
            for w in widths:
                rows.append([*shape_key(layer), a, w, 8, float(a * w), "us"])
    return rows


def write(path: Path, rows: list[list], header=COLUMNS) -> Path:
    path.write_text("\n".join(",".join(str(v) for v in row) for row in [list(header), *rows]) + "\n")
    return path


def test_a_latency_table_prices_a_model(tmp_path: Path) -> None:
    model = seeded(Residual)
    path = write(tmp_path / "l.csv", latency_rows(model))
    table = mixbit.costs.latency(path, model, X)
    assert table.unit == "us"
    assert table.uniform(8, 4) == 5 * 32


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda rows: rows[:-1], "no latency for 1 entries: head .*act=8 weight=8"),
        (lambda rows: [*rows, [*rows[0][:15], 99.0, "us"]], "contradicts an earlier row"),
        (lambda rows: [*rows, [*rows[0][:15], -1.0, "us"]], "latency=-1.0; expected a finite number"),
        (lambda rows: [*rows, [*rows[0][:15], "nan", "us"]], "latency=nan"),
        (lambda rows: [*rows, [*rows[0][:15], rows[0][15], "ms"]], "mixes the units"),
        (lambda rows: [*rows, ["conv2d", "x", *rows[0][2:]]], "expected whole numbers"),
        (lambda rows: [], "has no rows"),
    ],
)
def test_bad_latency_tables_are_named(tmp_path: Path, change, complaint: str) -> None:
    model = seeded(Residual)
    path = write(tmp_path / "l.csv", change(latency_rows(model)))
    with pytest.raises(MixbitError, match=complaint):
        mixbit.costs.latency(path, model, X)


def test_a_latency_table_without_a_column_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "l.csv", [], [c for c in COLUMNS if c != "hin"] + ["hinn"])
    with pytest.raises(MixbitError, match="no column 'hin'; did you mean 'hinn'"):
        mixbit.costs.latency(path, seeded(Residual), X)
