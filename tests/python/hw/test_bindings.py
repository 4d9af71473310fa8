"""The mapper through its bindings: the points measured on the peer, notation, bad input."""

import json
from pathlib import Path
from typing import Any

import pytest

from mixbit import _C

DATA = json.loads((Path(__file__).parents[2] / "data" / "timeloop_points.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("point", DATA["points"], ids=lambda p: p["id"])
def test_reference_points(point: dict[str, Any]) -> None:
    expected = point["expected"]
    # The two points that the closed form misses ran with the peer's sampling off: true displacements.
    reuse = "sampled" if point["independent_closed_form_agrees"] else "walked"
    result = _C.hw.evaluate(
        DATA["architectures"][point["arch"]],
        point["problem"],
        point["mapping"],
        semantics="v4" if "semantics" in point else "v3",
        reuse=reuse,
    )
    assert result["cycles"] == expected["cycles"]
    assert result["mac"]["computes"] == expected["mac"]["computes"]
    assert result["mac"]["utilized_instances"] == expected["mac"]["utilized_instances"]
    levels = {level["name"]: level for level in result["levels"]}
    for level in expected["levels"]:
        got = levels[level["name"]]
        assert got["cycles"] == level["cycles"]
        assert got["data"].keys() == level["data"].keys()
        for tensor, counts in level["data"].items():
            energy = counts.pop("energy_total_pJ")
            assert got["data"][tensor].pop("energy_total_pJ") == pytest.approx(
                energy, abs=max(0.01 * counts["instances"], 1e-9 * energy)
            )
            assert got["data"][tensor] == counts
    if "energy_total_pJ" in expected:
        assert result["energy_pj"] == pytest.approx(expected["energy_total_pJ"], rel=1e-7)


ARCH = DATA["architectures"]["test4level"]
PROBLEM = {"C": 4, "M": 2}
MAPPING = [
    {"level": "RF", "keep": ["Weights", "Inputs", "Outputs"]},
    {"level": "DRAM", "keep": ["Weights", "Inputs", "Outputs"], "temporal_inner_to_outer": [["C", 4], ["M", 2]]},
]


def test_bits_replace_the_problems_own() -> None:
    own = PROBLEM | {"bitwidths": {"Inputs": 8, "Weights": 4, "Outputs": 8}}
    bits = {"act": 8, "weight": 4, "out": 8}
    assert _C.hw.evaluate(ARCH, own, MAPPING) == _C.hw.evaluate(ARCH, PROBLEM, MAPPING, bits)
    assert _C.hw.evaluate(ARCH, own, MAPPING)["energy_pj"] < _C.hw.evaluate(ARCH, PROBLEM, MAPPING)["energy_pj"]


def test_projections_spell_out_a_matrix_product() -> None:
    written = {
        "dims": {"M": 2, "N": 1, "K": 4},
        "projections": {
            "Weights": [[("M", 1)], [("K", 1)]],
            "Inputs": [[("N", 1)], [("K", 1)]],
            "Outputs": [[("N", 1)], [("M", 1)]],
        },
    }
    mapping = [MAPPING[0], MAPPING[1] | {"temporal_inner_to_outer": [["K", 4], ["M", 2]]}]
    expected = _C.hw.evaluate(ARCH, {"M": 2, "N": 1, "K": 4}, mapping)
    assert _C.hw.evaluate(ARCH, written, mapping) == expected == _C.hw.evaluate(ARCH, PROBLEM, MAPPING)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"problem": PROBLEM | {"Z": 3}}, "problem: unknown key Z"),
        ({"problem": PROBLEM | {"C": "four"}}, "problem.C: 'four', expected an integer"),
        ({"problem": PROBLEM | {"C": 0}}, "problem: C is 0, expected at least 1"),
        ({"problem": {"C": 4}}, "problem: no M"),
        ({"bits": {"acts": 8}}, "bits: unknown key acts, expected one of act, weight, out, partial"),
        ({"bits": {"act": 0}}, "bits.act: 0, expected at least 1"),
        ({"bits": {"act": 17}}, "bits: Inputs has 17 bits, but level RF has words of 16"),
        ({"semantics": "v5"}, "semantics: v5, expected v3 or v4"),
        ({"mapping": [{"level": "L9"}]}, "level L9 is not one of this architecture's: RF, BUF, GLB, DRAM"),
        ({"mapping": [*MAPPING, MAPPING[0]]}, "mapping: level RF is listed twice"),
        ({"mapping": [MAPPING[0] | {"keep": ["Bias"]}]}, "unknown tensor Bias"),
        ({"mapping": [MAPPING[0] | {"spatial_x": [["C"]]}]}, "expected a pair of dimension and factor"),
        ({"arch": {"mac": ARCH["mac"], "levels": []}}, "architecture: no levels"),
        ({"arch": {"mac": ARCH["mac"], "levels": [{"name": "A", "Er": 1.0}]}}, "arch: level A: no word_bits"),
        ({"scale_mac": True}, "scale_mac: the architecture's mac gives no scaling"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="(?s).*") as error:
        _C.hw.evaluate(**{"arch": ARCH, "problem": PROBLEM, "mapping": MAPPING} | change)
    assert message in str(error.value)
