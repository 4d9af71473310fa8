"""Damaged architectures, layers, mappings, widths and files: our error, or a finite result; the same inputs in each run."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mixbit import hw
from mixbit.errors import MixbitError

SEED = 20_240_513
#: Without constraints: whatever has dimensions maps on it.
MINI = {
    "name": "mini",
    "mac": {"energy": 1.0, "instances": 4},
    "levels": [
        {"name": "RF", "size": 16, "word_bits": 16, "instances": 4, "read_bw": 2.0, "Er": 0.5, "Ew": 0.75},
        {"name": "DRAM", "size": None, "word_bits": 16, "block": 4, "shared_bw": 8, "Er": 100.0, "Ew": 120.0},
    ],
}
DESIGNS = {name: hw.Architecture.load(name) for name in ("eyeriss", "simba", "edge_npu")}
DESIGNS["mini"] = hw.Architecture.from_dict(MINI)
LAYER = {"C": 16, "M": 24, "R": 3, "S": 3, "P": 14, "Q": 14, "Wstride": 2, "Hstride": 2, "bitwidths": {"Inputs": 4}}
GEMM = {"M": 24, "N": 8, "K": 32}
ROWS = {
    "dims": {"X": 8, "Y": 4, "K": 3},
    "projections": {
        "Weights": [[["K", 1]]],
        "Inputs": [[["X", 2], ["K", 1]], [["Y", 1]]],
        "Outputs": [[["X", 1]], [["Y", 1]]],
    },
}
BITS = {"act": 8, "weight": 4, "out": 8, "partial": 16}
ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 1 << 31, 1 << 48, (1 << 63) - 1, 1 << 63, 1 << 80, 0.0, 0.5, -0.0, 1e-320, 1e308,
    math.nan, math.inf, -math.inf, "", "M", "all", "*", "Weights", "\x00", "ü" * 50, [], {}, [[]], [["M", 2]], {"M": 2},
]  # fmt: skip


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a document."""
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [pair for key in keys for pair in ((value, key), *places(value[key]))]


def mutated(source: random.Random, document: Any) -> Any:
    """One to three small damages, of which some leave the document valid."""
    document = copy.deepcopy(document)
    for _ in range(source.choice((1, 1, 2, 3))):
        found = places(document)
        if not found:
            return source.choice(ODD)
        container, key = source.choice(found)
        value = container[key]
        kind = source.randrange(7)
        if kind == 0:
            container[key] = copy.deepcopy(source.choice(ODD))
        elif kind == 1:
            del container[key]
        elif kind == 2:  # a part from elsewhere
            other, place = source.choice(found)
            container[key] = copy.deepcopy(other[place])
        elif kind == 3 and isinstance(container, list):
            container.insert(source.randrange(len(container) + 1), copy.deepcopy(value))
        elif kind == 4 and isinstance(container, dict):
            container[str(key)[:-1] if source.random() < 0.5 else f"{key}s"] = container.pop(key)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            container[key] = source.choice((value + 1, value - 1, value * 2, value // 2, value * 1000, -value))
        elif isinstance(value, list):
            source.shuffle(value)
        elif isinstance(value, str):
            container[key] = value[::-1] if source.random() < 0.5 else value + value
    return document


def check(result: hw.mapper.Record) -> None:
    """What every evaluation must be."""
    numbers = [
        result.energy_pj,
        result.edp,
        result.utilization,
        float(result.cycles),
        float(result.last_level_accesses),
    ]
    for level in result.levels:
        numbers.append(level["cycles"])
        for counts in level["data"].values():
            numbers += [value for value in counts.values() if isinstance(value, (int, float))]
    assert all(math.isfinite(value) and value >= 0 for value in numbers), result
    assert result.cycles >= 1
    assert 0 < result.utilization <= 1


def outcomes(count: int, attempt: Callable[[random.Random], None]) -> tuple[int, int]:
    """How many of `count` inputs went through, and how many were refused with our error."""
    source, refused = random.Random(SEED), 0
    for _ in range(count):
        try:
            attempt(source)
        except MixbitError as error:
            refused += 1
            assert str(error).strip()
    return count - refused, refused


Case = tuple[str, dict[str, Any], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    """Designs with a layer and a mapping that fits."""
    found = []
    for design, problem in [*((name, LAYER) for name in DESIGNS if name != "mini"), ("mini", GEMM), ("mini", ROWS)]:
        net = hw.Workload.from_shapes([problem])
        best = hw.map_network(DESIGNS[design], net, {"act": 8, "weight": 8}, "energy")
        found.append((design, problem, best.layers[0].mapping.to_dict()))
    return found


def test_architectures(cases: list[Case]) -> None:
    documents = {name: arch.to_dict() for name, arch in DESIGNS.items()}

    def attempt(source: random.Random) -> None:
        design, problem, mapping = source.choice(cases)
        arch = hw.Architecture.from_dict(mutated(source, documents[design]))
        assert hw.Architecture.from_dict(arch.to_dict()) == arch
        check(hw.evaluate(arch, problem, mapping, {"act": 8, "weight": 8}))

    good, refused = outcomes(2000, attempt)
    assert good > 200 and refused > 200


def test_layers_mappings_and_widths(cases: list[Case]) -> None:
    def attempt(source: random.Random) -> None:
        design, problem, mapping = source.choice(cases)
        bits: Any = BITS
        what = source.randrange(3)
        if what == 0:
            problem = mutated(source, problem)
        elif what == 1:
            mapping = mutated(source, mapping)
        else:
            bits = mutated(source, bits)
        semantics, reuse = source.choice(("v3", "v4")), source.choice(("sampled", "walked", "window"))
        check(hw.evaluate(DESIGNS[design], problem, mapping, bits, semantics, reuse=reuse))

    good, refused = outcomes(3000, attempt)
    assert good > 200 and refused > 200


def test_workloads() -> None:
    document = hw.Workload.from_shapes([LAYER, GEMM, ROWS]).to_dict()

    def attempt(source: random.Random) -> None:
        net = hw.Workload.from_dict(mutated(source, document))
        assert hw.Workload.from_dict(net.to_dict()) == net
        assert net.macs >= 1

    good, refused = outcomes(300, attempt)
    assert good > 30 and refused > 30


def test_files(tmp_path: Path) -> None:
    """Bytes of a YAML file deleted, doubled, swapped and replaced."""
    whole = (Path(hw.__file__).parent / "architectures" / "eyeriss.yaml").read_bytes()
    text = b"base: eyeriss\nname: mine\nmac: {energy: 1.5}\nlevels:\n  psum_spad: {size: 48, read_bw: 4}\n  DRAM: {Er: 9, Ew: 9}\n"
    path = tmp_path / "mine.yaml"

    def attempt(source: random.Random) -> None:
        content = bytearray(whole if source.random() < 0.1 else text)
        for _ in range(source.choice((1, 2, 4))):
            at, length = source.randrange(len(content)), source.choice((1, 1, 2, 8, 30))
            piece = content[at : at + length]
            kind = source.randrange(4)
            if kind == 0:
                del content[at : at + length]
            elif kind == 1:
                content[at:at] = piece
            elif kind == 2:
                content[at : at + length] = bytes(source.choice(b"\t\n:-{}[]&*!|>'\"%@`# 0e9.\xff") for _ in piece)
            else:
                content[at : at + length] = piece[::-1]
        path.write_bytes(content)
        arch = hw.Architecture.load(path)
        assert hw.Architecture.from_dict(arch.to_dict()) == arch

    good, refused = outcomes(400, attempt)
    assert good > 20 and refused > 100
