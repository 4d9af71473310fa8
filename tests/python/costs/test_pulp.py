"""The stand-in for PULP clusters: golden totals of MobileNets before and after refinement, and its CSV."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

import mixbit
from mixbit.costs.pulp import TARGETS
from mixbit.errors import MixbitError
from mixbit.recipe import LayerPrecision, Recipe
from mixbit.tables import CostTable
from mixbit.zoo.imagenet import MobileNetV1

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from nets import Residual, seeded

WIDTHS = (2, 4, 8)
X = torch.zeros(1, 3, 6, 6)


@functools.cache
def network(name: str) -> nn.Module:
    """The networks with symmetric padding inside the convolutions, as the golden values have them."""
    if name == "MNv2-1.0":
        return torchvision.models.mobilenet_v2(weights=None).eval()
    return MobileNetV1(float(name.removeprefix("MNv1-")), same=False).eval()


@functools.cache
def table(name: str, target: str) -> CostTable:
    return mixbit.costs.pulp(target, network(name), torch.zeros(1, 3, 224, 224))


def start(costs: CostTable, pattern: str) -> Recipe:
    """Uniform "a4w4" or the cyclic pattern; the first layer's act is 8."""

    def bits(i: int) -> tuple[int, int]:
        return (WIDTHS[7 * i % 3], WIDTHS[(5 * i + 1) % 3]) if pattern == "cyc" else (int(pattern[1]), int(pattern[3]))

    return Recipe(
        layers={n: LayerPrecision(act=bits(i)[0] if i else 8, weight=bits(i)[1]) for i, n in enumerate(costs.layers)}
    )


GOLDEN = [
    ("MNv1-0.75", "xpulpv2", "a4w4", 21_533_805, 50_749_383, 21_149_757, 27, 20_957_733),
    ("MNv1-0.75", "xpulpv2", "a2w2", 21_533_805, 49_211_868, 20_957_733, 27, 20_957_733),
    ("MNv1-0.75", "xpulpv2", "cyc", 21_533_805, 39_503_418, 21_149_733, 18, 20_957_733),
    ("MNv1-0.75", "xpulpnn", "a4w4", 15_448_005, 9_944_661, 9_495_597, 1, 6_519_393),
    ("MNv1-0.75", "xpulpnn", "a2w2", 15_448_005, 6_948_045, 6_519_393, 1, 6_519_393),
    ("MNv1-0.75", "xpulpnn", "cyc", 15_448_005, 19_218_426, 11_572_389, 9, 6_519_393),
    ("MNv1-0.75", "xpulpnn-mixed", "a4w4", 15_448_005, 9_495_597, 9_495_597, 0, 6_519_393),
    ("MNv1-0.75", "xpulpnn-mixed", "a2w2", 15_448_005, 6_519_393, 6_519_393, 0, 6_519_393),
    ("MNv1-0.75", "xpulpnn-mixed", "cyc", 15_448_005, 11_558_865, 11_558_865, 0, 6_519_393),
    ("MNv2-1.0", "xpulpv2", "a4w4", 22_596_541, 50_490_020, 21_956_461, 52, 21_636_421),
    ("MNv2-1.0", "xpulpv2", "a2w2", 22_596_541, 48_851_822, 21_636_421, 52, 21_636_421),
    ("MNv2-1.0", "xpulpv2", "cyc", 22_596_541, 39_601_591, 21_636_461, 35, 21_636_421),
    ("MNv2-1.0", "xpulpnn", "a4w4", 17_151_661, 11_986_991, 11_388_239, 1, 8_506_528),
    ("MNv2-1.0", "xpulpnn", "a2w2", 17_151_661, 9_078_064, 8_506_528, 1, 8_506_528),
    ("MNv2-1.0", "xpulpnn", "cyc", 17_151_661, 13_998_867, 13_288_331, 18, 8_506_528),
    ("MNv2-1.0", "xpulpnn-mixed", "a4w4", 17_151_661, 11_388_239, 11_388_239, 0, 8_506_528),
    ("MNv2-1.0", "xpulpnn-mixed", "a2w2", 17_151_661, 8_506_528, 8_506_528, 0, 8_506_528),
    ("MNv2-1.0", "xpulpnn-mixed", "cyc", 17_151_661, 13_270_446, 13_270_446, 0, 8_506_528),
]


@pytest.mark.parametrize(("name", "target", "pattern", "eight", "before", "after", "changed", "least"), GOLDEN)
def test_golden_totals(
    name: str, target: str, pattern: str, eight: int, before: int, after: int, changed: int, least: int
) -> None:
    costs = table(name, target)
    assert costs.unit == "cycles (stand-in)"
    recipe = start(costs, pattern)
    refined = mixbit.refine(recipe, costs)
    report = refined.report
    assert costs.uniform(8, 8) == report["latency_8bit"] == eight
    assert costs.total(recipe) == report["latency_before"] == before
    assert costs.total(refined) == report["latency_after"] == refined.cost["cycles (stand-in)"] == after
    assert len(report["raised"]) == changed
    assert report["latency_minimum"] == least


def test_golden_layers() -> None:
    costs = table("MNv1-0.75", "xpulpv2")
    first, last = costs.layers[0], costs.layers[-1]
    assert [costs.entry(first, 8, w) for w in WIDTHS] == [1_189_936, 1_221_688, 523_144]
    assert [costs.entry(last, 8, w) for w in WIDTHS] == [193_221, 385_221, 769_221]
    refined = mixbit.refine(start(costs, "a4w4"), costs)
    assert {n for n in costs.layers if (refined[n].act, refined[n].weight) != (8, 8)} == {last}
    vectors = table("MNv1-0.75", "xpulpnn")
    assert [vectors.entry("pw13", *b) for b in ((4, 4), (8, 4), (8, 8))] == [516_088, 2_623_144, 1_026_472]
    raised = mixbit.refine(start(vectors, "cyc"), vectors)
    changed = {n["layer"]: (n["to"]["act"], n["to"]["weight"]) for n in raised.report["raised"]}
    assert changed == {"conv1": (8, 8)} | {f"pw{i}": (4, 4) for i in (2, 3, 5, 6, 8, 9, 11, 12)}


def test_a_core_without_narrow_kernels_gives_bits_away() -> None:
    costs = table("MNv1-0.75", "8bit")
    assert costs.uniform(2, 2) == costs.uniform(8, 8) == table("MNv1-0.75", "xpulpv2").uniform(8, 8)
    assert not mixbit.refine(start(costs, "a2w2"), costs).report["raised"]
    free = mixbit.refine(start(costs, "a2w2"), costs, "no_slower")
    assert {(p.act, p.weight) for p in free.layers.values()} == {(8, 8)}


@pytest.mark.parametrize("target", TARGETS)
def test_the_csv_gives_the_same_table(tmp_path: Path, target: str) -> None:
    model = seeded(Residual)
    made = mixbit.costs.pulp(target, model, X, widths=range(1, 9))
    path = mixbit.costs.pulp_csv(tmp_path / "l.csv", target, model, X, widths=range(1, 9))
    read = mixbit.costs.latency(path, model, X)
    assert (read.values == made.values).all()
    assert (read.layers, read.act_bits, read.unit, read.input_group) == (
        made.layers,
        made.act_bits,
        made.unit,
        made.input_group,
    )
    # A width without a kernel runs in the next wider one.
    assert (made.values[:, 2] == made.values[:, 3]).all()
    assert (made.values[:, :, 0] == made.values[:, :, 1]).all()
    assert made.entry("a", 5, 7) == mixbit.costs.pulp(target, model, X).entry("a", 8, 8)


def test_layers_of_equal_shapes_share_rows_and_calls_add_up(tmp_path: Path) -> None:
    conv = nn.Conv2d(3, 3, 3, padding=1)
    model = nn.Sequential(conv, nn.Conv2d(3, 3, 3, padding=1), nn.MaxPool2d(2), conv).eval()
    path = mixbit.costs.pulp_csv(tmp_path / "l.csv", "xpulpnn", model, X)
    assert len(path.read_text().splitlines()) == 1 + 2 * 9
    costs = mixbit.costs.pulp("xpulpnn", model, X)
    large = costs.entry("1", 8, 8)
    small = mixbit.costs.pulp("xpulpnn", nn.Sequential(nn.Conv2d(3, 3, 3, padding=1)).eval(), X[..., :3, :3])
    assert costs.entry("0", 8, 8) == large + small.entry("0", 8, 8)


def test_groups_and_vectors_of_an_image() -> None:
    # By hand: 4 channels of 2 groups, 6 x 6, 3 x 3: 36 * 4 * 18 MACs and 36 patches of 2 * 18 values.
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=2)).eval()
    costs = mixbit.costs.pulp("xpulpv2", model, torch.zeros(1, 4, 6, 6))
    assert costs.entry("0", 8, 8) == -(-(2592 * 14 / 32 / 8 + 36 * 36 / 2 / 8 + 2 * 144 * 8 / 64) // 1) + 1000
    # A linear layer on 5 vectors computes five times as much, and fetches its weights once.
    costs = mixbit.costs.pulp("xpulpnn", nn.Sequential(nn.Linear(64, 64)).eval(), torch.zeros(1, 5, 64))
    assert costs.entry("0", 8, 8) == 64 * 64 + 2 * 5 * 64 * 8 / 64 + 1000
    costs = mixbit.costs.pulp("xpulpnn", nn.Sequential(nn.Linear(64, 64)).eval(), torch.zeros(1, 50, 64))
    assert costs.entry("0", 8, 8) == 50 * 64 * 64 * 9 / 32 / 8 + 2 * 50 * 64 * 8 / 64 + 1000


@pytest.mark.parametrize(
    ("target", "widths", "complaint"),
    [
        ("xpulp", WIDTHS, "target='xpulp'.*did you mean 'xpulp"),
        ("xpulpnn", (2, 16), r"widths=\[2, 16\]: expected some of 1 ... 8"),
        ("xpulpnn", (), r"widths=\[\]"),
        ("xpulpnn", (0, 4), r"widths=\[0, 4\]"),
    ],
)
def test_bad_input_is_named(target: str, widths, complaint: str) -> None:
    with pytest.raises(MixbitError, match=complaint):
        mixbit.costs.pulp(target, seeded(Residual), X, widths)
