"""Costs of real shapes; latency tables."""

from __future__ import annotations

import functools
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


@pytest.mark.parametrize(
    ("width", "act", "weight", "bops", "effective", "kib"),
    [
        (0.75, 8, 8, 20_825_628_672, 8.0, 2507.95),
        (0.75, 8, 4, 10_412_814_336, 5.6569, 1253.98),
        (0.75, 4, 8, 10_672_926_720, 5.7271, 2507.95),
        (0.75, 4, 4, 5_336_463_360, 4.0497, 1253.98),
        (0.75, 8, 2, 5_206_407_168, 4.0, 626.99),
        (0.75, 2, 2, 1_399_143_936, 2.0736, 626.99),
        (1.0, 8, 8, 36_399_382_528, 8.0, 4110.44),
        (1.0, 8, 4, 18_199_691_264, 5.6569, 2055.22),
        (1.0, 4, 8, 18_546_507_776, 5.7105, 4110.44),
        (1.0, 4, 4, 9_273_253_888, 4.0379, 2055.22),
        (1.0, 8, 2, 9_099_845_632, 4.0, 1027.61),
        (1.0, 2, 2, 2_405_017_600, 2.0564, 1027.61),
        (None, 8, 8, 19_249_553_408, 8.0, 3388.44),
        (None, 8, 4, 9_624_776_704, 5.6569, 1694.22),
        (None, 4, 8, 9_971_593_216, 5.7579, 3388.44),
        (None, 4, 4, 4_985_796_608, 4.0714, 1694.22),
        (None, 8, 2, 4_812_388_352, 4.0, 847.11),
        (None, 2, 2, 1_333_153_280, 2.1053, 847.11),
    ],
)
def test_bops_of_uniform_mobilenets(
    width: float | None, act: int, weight: int, bops: int, effective: float, kib: float
) -> None:
    """MobileNetV1 by width and MobileNetV2 (None), network input at 8 bits; effective width is 8 sqrt(BOPs / 8 bit)."""
    bit_operations, memory = mobilenet_costs(width)
    assert bit_operations.uniform(act, weight) == bops
    share = bops / bit_operations.uniform(8, 8)
    assert 8 * share**0.5 == pytest.approx(effective, abs=5e-5)
    assert memory.uniform(act, weight) / 8 / 1024 == pytest.approx(kib, abs=5e-3)


@functools.cache
def mobilenet_costs(width: float | None) -> tuple[mixbit.CostTable, mixbit.CostTable]:
    model = mixbit.zoo.mobilenet_v2() if width is None else mixbit.zoo.mobilenet_v1(width)
    x = torch.zeros(1, 3, 224, 224)
    return mixbit.costs.bops(model, x), mixbit.costs.weight_memory(model, x)


@pytest.mark.parametrize(
    ("width", "count", "macs", "weights", "largest"),
    [
        (0.25, 28, 41_030_272, 463_600, 3_211_264),
        (0.5, 28, 149_497_088, 1_319_648, 12_845_056),
        (0.75, 28, 325_400_448, 2_568_144, 28_901_376),
        (1.0, 28, 568_740_352, 4_209_088, 51_380_224),
        (None, 53, 300_774_272, 3_469_760, 20_070_400),
    ],
)
def test_sizes_of_mobilenets(width: float | None, count: int, macs: int, weights: int, largest: int) -> None:
    model = mixbit.zoo.mobilenet_v2() if width is None else mixbit.zoo.mobilenet_v1(width)
    found = mixbit.layers(model, torch.zeros(1, 3, 224, 224))
    per_layer = [layer.macs for layer in found]
    assert (len(found), sum(per_layer), max(per_layer)) == (count, macs, largest)
    assert sum(layer.weights for layer in found) == weights


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


def test_layers_of_equal_shapes_share_rows_and_calls_add_up(tmp_path: Path) -> None:
    tokens = nn.Linear(4, 4)
    model = nn.Sequential(tokens, nn.Linear(4, 4), nn.Flatten(), nn.Linear(12, 4), tokens).eval()
    x = torch.zeros(2, 3, 4)
    shapes = {shape_key(layer, call) for layer in mixbit.layers(model, x) for call in layer.call_shapes}
    assert {key[1:3] + key[10:] for key in shapes} == {(4, 4, 3, 1), (4, 4, 1, 1), (12, 4, 1, 1)}
    path = write(tmp_path / "l.csv", [[*key, 8, 8, 8, 10 ** key[10] * key[1], "us"] for key in sorted(shapes)])
    costs = mixbit.costs.latency(path, model, x)
    assert costs.values.ravel().tolist() == [4000 + 40, 4000, 120]


def test_the_row_with_8_output_bits_counts_else_the_slowest(tmp_path: Path) -> None:
    model = seeded(Residual)
    rows = latency_rows(model, (8,))
    for out in (2, 4):
        rows += [[*row[:14], out, row[15] + out, row[16]] for row in rows[:1]]
    assert mixbit.costs.latency(write(tmp_path / "l.csv", rows), model, X).entry("stem", 8, 8) == 64
    assert mixbit.costs.latency(write(tmp_path / "l.csv", rows[1:]), model, X).entry("stem", 8, 8) == 68


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda rows: rows[:-1], "no latency for 1 entries: head .*act=8 weight=8"),
        (
            lambda rows: [r for r in rows if r[0] == "linear"],
            r"for 16 entries: stem \(conv2d,3,8,1,3,3,1,1,1,1,6,6\) act=4 weight=4; (.*; ){9}and 6 more$",
        ),
        (lambda rows: [*rows, [*rows[0][:15], 99.0, "us"]], "line 22: latency=99.0 contradicts line 2 .*16.0"),
        (lambda rows: [*rows, [*rows[0][:15], -1.0, "us"]], "latency=-1.0; expected a finite number"),
        (lambda rows: [*rows, [*rows[0][:15], "nan", "us"]], "latency=nan"),
        (lambda rows: [*rows, [*rows[0][:15], rows[0][15], "ms"]], "line 22: unit 'ms', after rows in 'us'"),
        (lambda rows: [*rows, [*rows[0][:12], 0, *rows[0][13:]]], "line 22: act_bits=0; expected 1 ... 32"),
        (lambda rows: [*rows, [*rows[0][:14], 64, *rows[0][15:]]], "line 22: out_bits=64; expected 1 ... 32"),
        (lambda rows: [*rows, ["conv", *rows[0][1:]]], "line 22: kind='conv'.*did you mean 'conv2d'"),
        (lambda rows: [*rows, rows[0][:-1]], "line 22 has another number of fields"),
        (lambda rows: [*rows, [*rows[0], "more"]], "line 22 has another number of fields"),
        (lambda rows: [*rows, [*rows[0][:15], "inf", "us"]], "latency=inf"),
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
