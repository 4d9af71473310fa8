"""The mapper through its bindings: the points measured on the peer, notation, bad input."""

import ast
import json
from pathlib import Path
from typing import Any

import numpy as np
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


def eyeriss() -> dict[str, Any]:
    """The published constraints, read from the page that documents them."""
    page = (Path(__file__).parents[3] / "docs" / "mapper.md").read_text(encoding="utf-8")
    block = page.split("The published constraints of Eyeriss", 1)[1].split("```python\n", 1)[1].split("```", 1)[0]
    constraints = ast.literal_eval("{" + block + "}")
    arch = DATA["architectures"]["eyeriss_16bit"]
    return arch | {"levels": [level | {"constraints": constraints[level["name"]]} for level in arch["levels"]]}


LAYER_2 = {"C": 32, "M": 32, "R": 3, "S": 3, "P": 112, "Q": 112}


@pytest.mark.parametrize("run", DATA["exhaustive_runs"], ids=lambda r: str(r["bitwidths_I_W_O"]))
def test_exhaustive_runs(run: dict[str, Any]) -> None:
    bits = dict(zip(("act", "weight", "out"), run["bitwidths_I_W_O"], strict=True))
    counts = _C.hw.count_mappings(eyeriss(), LAYER_2, bits)
    assert counts == {k: run[k] for k in ("total", "fanout_invalid", "capacity_invalid", "valid")} | {"relaxed": []}
    found = _C.hw.search(eyeriss(), LAYER_2, bits)
    assert found["energy_pj"] == pytest.approx(run["best_energy_uJ"] * 1e6, abs=501)  # printed in nJ
    assert found["cycles"] == run["best_cycles"]
    assert found["edp"] == pytest.approx(run["best_edp_J_cycle"], rel=1e-5)
    certificate = found["certificate"]
    parts = ("fanout_invalid", "capacity_invalid", "bound_pruned", "dominance_pruned", "evaluated")
    assert sum(certificate[part] for part in parts) == certificate["total"] == run["total"]
    assert found["energy_pj"] == _C.hw.evaluate(eyeriss(), LAYER_2, found["mapping"], bits)["energy_pj"]


def test_sweep_is_a_search_for_every_triple() -> None:
    widths = {"act": [4, 8], "weight": [2, 4, 7], "out": [8]}
    sweep = _C.hw.sweep(eyeriss(), LAYER_2, widths, objective="energy", threads=2)
    assert sweep["energy_pj"].shape == sweep["mapping"].shape == (2, 3, 1)
    assert sweep["classes"] == 6
    for a, act in enumerate(widths["act"]):
        for w, weight in enumerate(widths["weight"]):
            bits = {"act": act, "weight": weight, "out": 8}
            found = _C.hw.search(eyeriss(), LAYER_2, bits, objective="energy")
            assert sweep["energy_pj"][a, w, 0] == pytest.approx(found["energy_pj"], rel=1e-12)
            mapping = sweep["mappings"][sweep["mapping"][a, w, 0]]
            assert sweep["cycles"][a, w, 0] == _C.hw.evaluate(eyeriss(), LAYER_2, mapping, bits)["cycles"]
    assert np.all(np.diff(sweep["energy_pj"][:, :, 0], axis=0) > 0)


def test_pareto_and_random_search() -> None:
    bits = {"act": 8, "weight": 8, "out": 8}
    problem = {"C": 32, "M": 64, "P": 112, "Q": 112}
    front = _C.hw.pareto(eyeriss(), problem, bits)
    energies = [point["energy_pj"] for point in front["points"]]
    assert energies == sorted(energies)
    best = _C.hw.search(eyeriss(), problem, bits, objective="energy")
    assert energies[0] == pytest.approx(best["energy_pj"], rel=1e-12)
    drawn = _C.hw.random_search(eyeriss(), problem, bits, objective="energy", seed=1)
    assert drawn["energy_pj"] >= best["energy_pj"]
    assert drawn["counts"]["valid"] >= 500


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": "speed"}, "objective: speed, expected energy, delay, edp or last_level_accesses"),
        ({"method": "fast"}, "method: fast, expected bounded or exhaustive"),
        ({"threads": 0}, "threads: 0, expected at least 1"),
        ({"bits": {"weight": 17}}, "bits: Weights has 17 bits, but level psum_spad has words of 16"),
        ({"problem": LAYER_2 | {"G": 2}}, "no factors of G that the levels allow multiply to 2"),
        (
            {"problem": LAYER_2 | {"R": 13}},
            "the closest needs 13 words at level ifmap_spad (13 for Inputs), which has 12",
        ),
    ],
)
def test_bad_search(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="(?s).*") as error:
        _C.hw.search(**{"arch": eyeriss(), "problem": LAYER_2} | change)
    assert message in str(error.value)


@pytest.mark.parametrize("widths", [[], [0], ["8"], "8", {"act": [8]}, {"act": 8, "weight": [8], "out": [8]}])
def test_bad_widths(widths: Any) -> None:
    with pytest.raises(ValueError, match="widths"):
        _C.hw.sweep(eyeriss(), LAYER_2, widths)
