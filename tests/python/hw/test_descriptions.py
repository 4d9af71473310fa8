"""Architectures, workloads and mappings as dicts and files: round trips, and one sentence for each mistake."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
import torchvision
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mixbit.errors import MixbitError
from mixbit.hw import Architecture, Layer, Mapping, Workload, loop_nest, map_network

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from nets import Residual, Shared, seeded


@pytest.mark.parametrize("name", Architecture.shipped())
def test_shipped_architectures_round_trip(name: str, tmp_path: Path) -> None:
    arch = Architecture.load(name)
    assert arch.name == name and arch.about
    assert Architecture.from_dict(arch.to_dict()) == arch
    for suffix, dump in ((".yaml", yaml.safe_dump), (".json", json.dumps)):
        path = tmp_path / f"{name}{suffix}"
        path.write_text(dump(arch.to_dict()))
        assert Architecture.load(path) == arch
        assert Architecture.load(path).digest == arch.digest
    assert arch.levels[-1].size is None


def test_the_numbers_of_the_published_designs() -> None:
    eyeriss, simba = Architecture.load("eyeriss"), Architecture.load("simba")
    assert [(v.name, v.instances, v.size, v.block, v.read_pj, v.write_pj) for v in eyeriss.levels] == [
        ("psum_spad", 168, 24, 1, 0.30161, 0.30161),
        ("weights_spad", 168, 224, 1, 0.75891, 1.17943),
        ("ifmap_spad", 168, 12, 1, 0.23632, 0.23632),
        ("DummyBuffer", 14, 16, 1, 0.20203, 0.20203),
        ("shared_glb", 1, 51200, 4, 67.9377, 68.7512),
        ("DRAM", 1, None, 4, 512.0, 512.0),
    ]
    assert [(v.name, v.instances, v.size, v.read_pj) for v in simba.levels][4:] == [
        ("GlobalBuffer", 1, 32768, 167.0908),
        ("DRAM", 1, None, 512.0),
    ]
    assert (eyeriss.mac.energy, eyeriss.mac.mesh_x * eyeriss.mac.mesh_y) == (2.20035, 168)
    # 0.0857 b/32 + 8.63 (b/32)^2 at 16 bits is the table's multiplier.
    scaling = eyeriss.mac.scaling
    assert scaling["adder"] / 2 + scaling["multiplier"] / 4 == pytest.approx(2.20035)
    for name in ("eyeriss", "simba"):
        wide, narrow = Architecture.load(name), Architecture.load(f"{name}_8bit")
        for a, b in zip(wide.levels, narrow.levels, strict=True):
            assert (a.word_bits, b.word_bits) == (16, 8)
            assert a.word_bits * a.block == b.word_bits * b.block
            assert a.size is None or a.size * a.word_bits == b.size * b.word_bits
            assert (a.read_pj, a.write_pj, a.constraints) == (b.read_pj, b.write_pj, b.constraints)
        assert narrow.mac.energy == 0.5608


def document() -> dict:
    return copy.deepcopy(Architecture.load("eyeriss").to_dict())


def change(path: list, value) -> dict:
    """The document with one entry set, or deleted where value is `...`."""
    found = target = document()
    for key in path[:-1]:
        target = target[key]
    if value is ...:
        del target[path[-1]]
    else:
        target[path[-1]] = value
    return found


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        (change(["levles"], []), "architecture: unknown key 'levles'.*did you mean 'levels'"),
        (change(["levels"], ...), "architecture has no 'levels'"),
        (change(["levels"], []), "expected a list of at least one level"),
        (change(["levels"], {"a": 1}), "expected a list of at least one level"),
        (change(["levels", 0], 3), "level 0 is 3; expected keys and values"),
        (change(["levels", 0, "sise"], 3), "level 0: unknown key 'sise'.*did you mean 'size'"),
        (change(["levels", 0, "word_bits"], ...), "level 0 has no 'word_bits'"),
        (change(["levels", 0, "word_bits"], 0), "level 0 'psum_spad': word_bits is 0; expected a whole number"),
        (change(["levels", 0, "size"], "24"), "size is '24'"),
        (change(["levels", 0, "size"], True), "size is True"),
        (change(["levels", 0, "read_bw"], 0), "read_bw is 0; expected a finite number of at least 1e-06"),
        (change(["levels", 0, "read_bw"], 1e-320), "read_bw is 1e-320; expected a finite number of at least 1e-06"),
        (change(["levels", 0, "shared_bw"], float("inf")), "shared_bw is inf; expected a finite number"),
        (
            change(["levels", 0, "size"], 1 << 49),
            "size is 562949953421312; expected a whole number of at least 1 and at",
        ),
        (change(["levels", 0, "meshX"], 1 << 25), "meshX is 33554432; expected .* at most 16777216"),
        (change(["levels", 0, "Ew"], 1e16), r"Ew is 1e\+16; expected a finite number of at least 0 and at most 1e\+15"),
        (change(["levels", 0, "Er"], float("nan")), "Er is nan"),
        (change(["levels", 0, "Er"], ...), "has no 'Er'; expected Er and Ew in pJ, or energy: NAME"),
        (change(["levels", 0, "energy"], "lpddr4"), "energy and Er or Ew are given"),
        (change(["levels", 0, "name"], "DRAM"), "level 5 'DRAM': expected a name that no other level has"),
        (change(["levels", 0, "name"], 3), "name is 3"),
        (change(["levels", 0, "instances"], 160), "instances is 160; expected meshX . meshY, 14 . 12"),
        (change(["levels", 4, "meshX"], ...), "instances is 1|eyeriss"),
        (change(["levels", 3, "cluster"], 5), "cluster is 5; expected a divisor of its 14 instances"),
        (change(["levels", 0, "constraints", "kept"], []), "unknown key 'kept'.*did you mean 'keep'"),
        (change(["levels", 0, "constraints", "keep"], ["Weight"]), "unknown 'Weight'.*did you mean 'Weights'"),
        (change(["levels", 0, "constraints", "keep"], ["Weights"]), r"\['Weights'\] are both kept and bypassed"),
        (change(["levels", 0, "constraints", "temporal"], {"dim": []}), "unknown key 'dim'.*did you mean 'dims'"),
        (change(["levels", 0, "constraints", "temporal"], {"dims": "M"}), "dims is 'M'; expected a list"),
        (change(["levels", 0, "constraints", "temporal"], {"order": ["M", "M"]}), "expected each name once"),
        (change(["levels", 0, "constraints", "temporal"], {"factors": {"M": -1}}), "factors: M is -1"),
        (change(["levels", 0, "constraints", "temporal"], {"factors": [1]}), r"factors is \[1\]"),
        (change(["levels", 0, "constraints", "temporal"], {"max": {"M": 0}}), "max: M is 0"),
        (change(["mac", "energy"], ...), "mac has no 'energy'"),
        (change(["mac", "energy"], -1), "mac: energy is -1"),
        (change(["mac", "scaling"], {"adder": 1}), "mac: scaling has no 'multiplier'"),
        (change(["mac", "meshX"], 13), "mac: instances is 168; expected meshX . meshY, 13 . 12"),
        ({"base": "eyeris"}, "base is 'eyeris'.*did you mean 'eyeriss'"),
        ({"base": "eyeriss", "levels": {"psum_spat": {}}}, "unknown key 'psum_spat'.*did you mean 'psum_spad'"),
        ({"base": "eyeriss", "levels": {"psum_spad": 3}}, "psum_spad is 3"),
        ({"base": "eyeriss", "levels": {"psum_spad": {"energy": "lpdr4"}}}, "'lpdr4'.*did you mean 'lpddr4'"),
        ([1], r"architecture is \[1\]"),
        (None, "architecture is None"),
    ],
)
def test_bad_architectures_are_named(bad, complaint: str) -> None:
    if complaint.endswith("|eyeriss"):
        # Without meshX the instances say it all.
        assert Architecture.from_dict(bad).levels[4].instances == 1
        return
    with pytest.raises(MixbitError, match=complaint):
        Architecture.from_dict(bad)


def test_meshes_divide_each_other() -> None:
    bad = document()
    bad["levels"][3] |= {"instances": 13, "meshX": 13}
    with pytest.raises(MixbitError, match="'DummyBuffer' is a mesh of 13 x 1; expected divisors of the 14 x 12"):
        Architecture.from_dict(bad)


def test_a_derived_architecture_changes_only_what_it_says() -> None:
    base = Architecture.load("simba")
    derived = Architecture.from_dict(
        {
            "base": "simba",
            "name": "mine",
            "levels": {"GlobalBuffer": {"Er": 1, "Ew": 2}, "DRAM": {"energy": "register"}},
        }
    )
    assert derived.name == "mine"
    assert [(a.read_pj, a.write_pj) for a in derived.levels[-2:]] == [(1, 2), (pytest.approx(0.576),) * 2]
    assert derived.levels[:4] == base.levels[:4]
    assert derived.digest != base.digest


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(MixbitError, match="'eyris' is no file and none of the shipped .*did you mean 'eyeriss"):
        Architecture.load("eyris")
    bad = tmp_path / "bad.yaml"
    bad.write_text("levels: [1\nmac: 2")
    with pytest.raises(MixbitError, match=r"bad.yaml.*no YAML or JSON document"):
        Architecture.load(bad)
    bad.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(MixbitError, match=r"cannot read the architecture"):
        Architecture.load(bad)


leaves = st.none() | st.booleans() | st.integers(-3, 300) | st.floats() | st.text(max_size=5)
values = st.recursive(leaves, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=5), v, max_size=3))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_fuzzed_architectures_raise_nothing_but_our_error(data) -> None:
    """One or two entries anywhere in the document replaced by anything."""
    fuzzed = document()
    for _ in range(data.draw(st.integers(1, 2))):
        target, path = fuzzed, fuzzed
        while isinstance(path, (dict, list)) and path:
            keys = list(path) if isinstance(path, dict) else list(range(len(path)))
            key = data.draw(st.sampled_from(keys))
            target, path = path, path[key]
            if data.draw(st.booleans()):
                break
        target[key] = data.draw(values)
    try:
        arch = Architecture.from_dict(fuzzed)
    except MixbitError:
        return
    assert Architecture.from_dict(arch.to_dict()) == arch


CONV = {"C": 3, "M": 32, "R": 3, "S": 3, "P": 112, "Q": 112, "Wstride": 2, "Hstride": 2}


def test_layers() -> None:
    layer = Layer.from_dict(CONV, "first")
    assert layer.macs == 3 * 32 * 9 * 112 * 112
    assert layer.to_dict() == {**dict.fromkeys(("N", "G", "Wdilation", "Hdilation"), 1), **CONV, "name": "first"}
    assert Layer.from_dict(layer.to_dict()) == layer
    gemm = Layer.from_dict({"M": 10, "N": 4, "K": 64, "bitwidths": {"Inputs": 4}})
    assert gemm.macs == 2560
    assert Layer.from_dict(gemm.to_dict()) == gemm
    assert Layer.from_dict({**CONV, "name": "x"}).key == layer.key


#: A convolution in one dimension over rows, spelled out.
ROWS = {
    "dims": {"X": 8, "Y": 4, "K": 3},
    "projections": {
        "Weights": [[("K", 1)]],
        "Inputs": [[("X", 2), ("K", 1)], [("Y", 1)]],
        "Outputs": [[("X", 1)], [("Y", 1)]],
    },
}


def rows(tensor: str, ranks) -> dict:
    return ROWS | {"projections": ROWS["projections"] | {tensor: ranks}}


def test_layers_that_are_spelled_out() -> None:
    layer = Layer.from_dict({**ROWS, "bitwidths": {"Weights": 4}}, "rows")
    assert layer.macs == 8 * 4 * 3
    assert Layer.from_dict(json.loads(json.dumps(layer.to_dict()))) == layer
    assert layer.key != Layer.from_dict(rows("Inputs", [[("X", 1), ("K", 1)], [("Y", 1)]])).key
    net = Workload.from_shapes([layer, CONV])
    assert Workload.from_dict(json.loads(json.dumps(net.to_dict()))) == net


def test_a_convolution_spelled_out_is_mapped_as_the_convolution() -> None:
    conv = {"C": 4, "M": 6, "R": 3, "S": 1, "P": 8, "Q": 5, "N": 1, "G": 1}
    ranks = {
        "Weights": [[[d, 1]] for d in "CMRSG"],
        "Inputs": [[["N", 1]], [["C", 1]], [["R", 1], ["P", 2]], [["S", 1], ["Q", 1]], [["G", 1]]],
        "Outputs": [[[d, 1]] for d in "NMQPG"],
    }
    arch, bits = Architecture.load("eyeriss"), {"act": 8, "weight": 4}
    found = [
        map_network(arch, Workload.from_shapes([problem]), bits, "energy").layers[0]
        for problem in ({**conv, "Wstride": 2}, {"dims": conv, "projections": ranks})
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        ({"dims": ROWS["dims"]}, "layer 'l' has no 'projections'"),
        ({**ROWS, "C": 3}, "unknown key 'C'"),
        ({**ROWS, "dims": 3}, "dims is 3; expected names and bounds"),
        ({**ROWS, "dims": {}}, "expected names and bounds, at least one"),
        ({**ROWS, "dims": {"X": 0}}, "dims: X is 0"),
        ({**ROWS, "projections": {"Weights": []}}, "projections has no 'Inputs'"),
        (rows("Outputs", "XY"), "projections: Outputs is 'XY'; expected a list of at most 8 ranks"),
        (rows("Outputs", [[("X", 1)]] * 9), "at most 8 ranks"),
        (rows("Outputs", [("X", 1)]), "Outputs holds 'X'; expected .dimension, step."),
        (rows("Outputs", [[("X", 0)]]), "Outputs: X is 0"),
        (rows("Outputs", [[("x", 1)]]), "Outputs: unknown dimension 'x'; expected some of"),
        ({**ROWS, "dims": {**ROWS["dims"], "Z": 2}}, "no tensor depends on dimension 'Z'"),
        ({"C": 3}, "layer 'l' has no 'M'"),
        ({**CONV, "P": 0}, "layer 'l': P is 0; expected a whole number of at least 1"),
        ({**CONV, "P": 2.5}, "P is 2.5"),
        (
            {**CONV, "Wstride": 1 << 63},
            "Wstride is 9223372036854775808; expected a whole number of at least 1 and at most",
        ),
        ({**CONV, "Wstrid": 1}, "unknown key 'Wstrid'.*did you mean 'Wstride'"),
        ({**CONV, "bitwidths": {"Input": 8}}, "unknown key 'Input'.*did you mean 'Inputs'"),
        ({**CONV, "bitwidths": {"Inputs": 0}}, "Inputs is 0"),
        ({"M": 2, "N": 2, "K": 2, "R": 3}, "unknown key 'R'"),
        (3, "layer 'l' is 3"),
    ],
)
def test_bad_layers_are_named(bad, complaint: str) -> None:
    with pytest.raises(MixbitError, match=complaint):
        Layer.from_dict(bad, "l")


def test_a_workload_from_a_model() -> None:
    net = Workload.from_model(seeded(Residual), torch.randn(2, 3, 6, 6), tensor_bits=5)
    places = [(u.layer.name, u.calls, u.input_group, u.consumer) for u in net]
    assert places == [
        ("stem", 1, 0, "a"),
        ("a", 1, 1, "b"),
        ("b", 1, 2, 5),
        ("side", 1, 1, 5),
        ("head", 1, 3, None),
    ]
    b, head = net.uses[2].layer, net.uses[4].layer
    assert {k: b.shape[k] for k in ("G", "C", "M", "R", "P", "Q")} == {"G": 2, "C": 4, "M": 4, "R": 3, "P": 6, "Q": 6}
    assert (head.shape["C"], head.shape["M"], head.shape["P"]) == (8, 5, 1)
    assert Workload.from_dict(json.loads(json.dumps(net.to_dict()))) == net
    again = Workload.from_model(seeded(Shared), {"values": torch.randn(3, 6)}).uses[1]
    assert (again.calls, again.consumer, again.input_group) == (3, "again", 1)


def test_mobilenet_has_the_published_multiply_accumulates() -> None:
    model = torchvision.models.mobilenet_v2(weights=None).eval()
    x = torch.randn(1, 3, 224, 224)
    assert Workload.from_model(model, x).macs == 300_774_272
    full = Workload.from_model(model, x, depthwise_as_full=True)
    assert full.macs > 300_774_272
    assert all(u.layer.shape["G"] == 1 for u in full)


def test_width_and_height_are_told_apart() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, (3, 5), stride=(2, 1), dilation=(1, 2))).eval()
    shape = Workload.from_model(model, torch.randn(1, 2, 9, 20)).uses[0].layer.shape
    assert {k: shape[k] for k in ("R", "S", "P", "Q", "Wstride", "Hstride", "Wdilation", "Hdilation")} == {
        "R": 5,
        "S": 3,
        "P": 12,
        "Q": 4,
        "Wstride": 1,
        "Hstride": 2,
        "Wdilation": 2,
        "Hdilation": 1,
    }


def test_a_workload_from_shapes_is_a_chain() -> None:
    net = Workload.from_shapes([CONV, Layer.from_dict({"C": 32, "M": 8}, "second"), {"M": 1, "N": 1, "K": 8}])
    assert [(u.layer.name, u.consumer, u.input_group) for u in net] == [
        ("layer1", "second", 0),
        ("second", "layer3", 1),
        ("layer3", None, 2),
    ]


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: Workload.from_shapes([]), "workload has no layers"),
        (lambda: Workload.from_shapes([{**CONV, "name": "a"}] * 2), "two layers are named 'a'"),
        (lambda: Workload.from_dict({"layer": []}), "did you mean 'layers'"),
        (lambda: Workload.from_dict({"layers": "x"}), "layers is 'x'; expected a list"),
        (lambda: Workload.from_dict({"layers": [CONV]}), r"layers\[0\] has no 'calls'"),
        (
            lambda: Workload.from_dict(
                {"layers": [{**CONV, "name": "a", "calls": 1, "input_group": 0, "consumer": "b"}]}
            ),
            "consumer 'b' is no layer",
        ),
        (lambda: Workload.from_model(seeded(Residual), torch.randn(1, 3, 6, 6), tensor_bits=0), "tensor_bits is 0"),
    ],
)
def test_bad_workloads_are_named(make, complaint: str) -> None:
    with pytest.raises(MixbitError, match=complaint):
        make()


MAPPING = [
    {"level": "RF", "keep": ["Weights"], "temporal_inner_to_outer": [["R", 3], ["M", 1]], "spatial_x": [], "spatial_y": []},
    {"level": "GLB", "keep": [], "temporal_inner_to_outer": [["C", 2]], "spatial_x": [["M", 4]], "spatial_y": [["S", 3]]},
    {"level": "DRAM", "keep": ["Weights", "Inputs"], "temporal_inner_to_outer": [["P", 5], ["Q", 7]], "spatial_x": [], "spatial_y": []},
]  # fmt: skip


def test_a_mapping_round_trips_and_is_printed_outermost_first() -> None:
    mapping = Mapping.from_dict(MAPPING)
    assert mapping.to_dict() == MAPPING
    assert loop_nest(mapping).splitlines() == [
        "DRAM [Weights, Inputs]",
        "for q in 0..7",
        "  for p in 0..5",
        "    for c in 0..2",
        "      parallel_for s in 0..3 along y",
        "        parallel_for m in 0..4 along x",
        "          RF [Weights]",
        "          for r in 0..3",
        "            multiply-accumulate",
    ]


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        ({}, "expected a list of levels"),
        ([{"keep": []}], r"mapping\[0\] has no 'level'"),
        ([{"level": "RF", "kep": []}], "did you mean 'keep'"),
        ([{"level": "RF", "keep": ["Weight"]}], "did you mean 'Weights'"),
        ([{"level": "RF", "spatial_x": [["M"]]}], "level 'RF': spatial_x holds"),
        ([{"level": "RF", "spatial_x": [["M", 0]]}], "spatial_x: M is 0"),
        ([{"level": "RF", "spatial_x": 3}], "spatial_x is 3"),
    ],
)
def test_bad_mappings_are_named(bad, complaint: str) -> None:
    with pytest.raises(MixbitError, match=complaint):
        Mapping.from_dict(bad)
