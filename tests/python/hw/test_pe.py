"""Processing elements: exact products, throughputs, energies of a network by hand, VGG-9, bad input."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest
import torch

import mixbit
from mixbit.hw import PE_KINDS, ProcessingElement, Workload, pe_energy

NET = Workload.from_shapes(
    [{"C": 3, "M": 8, "R": 3, "S": 3, "P": 4, "Q": 4, "name": "conv"}, {"M": 10, "N": 1, "K": 128, "name": "head"}]
)


@pytest.mark.parametrize("kind", PE_KINDS)
def test_products_and_dot_products_are_exact(kind: str) -> None:
    pe = ProcessingElement(kind)
    pairs = 0
    for bw, ba in itertools.product((2, 3, 4), repeat=2):
        for w in range(-(2 ** (bw - 1)), 2 ** (bw - 1)):
            for a in range(2**ba):
                assert pe.product(w, a, bw, ba) == w * a
                pairs += 1
    assert pairs == 784
    rng = np.random.default_rng(0)
    extra = rng.integers(0, 3, 200)
    limit = 2 ** (1 + extra)
    codes, acts = rng.integers(-limit, limit), rng.integers(0, 16, 200)
    assert pe.dot(codes, extra, acts, 2, 4) == ((codes << (2 - extra)) * acts).sum()
    flags = np.minimum(extra, 1)
    codes = codes >> (extra - flags)
    assert pe.dot(codes, flags, acts, 2, 4) == ((codes << (1 - flags)) * acts).sum()


def test_throughput() -> None:
    widths = [(2, 2), (2, 4), (3, 4), (4, 4), (8, 8)]
    table = {
        "slices": (4, 2, 1, 1, 1 / 4),
        "base_lsb": (1, 1, 1, 1 / 2, 1 / 6),
        "bit_serial": (1 / 2, 1 / 2, 1 / 3, 1 / 4, 1 / 8),
    }
    for kind, expected in table.items():
        assert [ProcessingElement(kind).throughput(*pair) for pair in widths] == pytest.approx(expected)


def test_energies_by_hand() -> None:
    found = pe_energy(NET, {"act": 4, "weight": 2}, extra={"head": 0.25}, index="bitmap")
    conv, head = found.layers
    macs, weights, inputs, outputs = 3 * 8 * 9 * 16, 3 * 8 * 9, 3 * 6 * 6, 8 * 16
    assert conv.energy["mac"] == pytest.approx(macs * 8 / 256)
    assert conv.energy["weights"] == pytest.approx(weights * 2 / 16 * 206)
    assert conv.energy["acts"] == pytest.approx((inputs + outputs) * 4 / 16 * 6)
    assert conv.energy["index"] == 0
    assert head.energy["mac"] == pytest.approx(1280 * 2.25 * 4 / 256)
    assert head.energy["weights"] == pytest.approx(1280 * 2.25 / 16 * 206)
    assert head.energy["index"] == pytest.approx(1280 / 16 * 200)
    for layer in found.layers:
        rest = sum(value for part, value in layer.energy.items() if part != "control")
        assert layer.energy["control"] == pytest.approx(0.1 * rest)
    assert found.total == pytest.approx(sum(found.energy.values()))
    assert found.cycles == macs + 1280
    assert found.bits_per_weight == pytest.approx((weights * 2 + 1280 * 3.25) / (weights + 1280))
    measured = pe_energy(NET, {"act": 4, "weight": 2}, extra={"head": 0.25}, index_bits={"head": 160})
    assert measured["head"].energy["index"] == pytest.approx(2000)
    odd = pe_energy(NET, {"act": 4, "weight": 2}, extra=(0.25, 0.125), index="oddlevel")
    # Two rounds: H(1/4) and, among the flagged, H(1/2) = 1; of the extra bits only those of the second ones are stored.
    stored = 2 + 0.125 + mixbit.retrain.storage.expected_bits(2, 0.25, "oddlevel") - 2 + 0.25
    assert odd.bits_per_weight == pytest.approx(stored)
    assert json.loads(json.dumps(found.to_dict()))["cycles"] == found.cycles
    assert "head" in str(found)


def test_bits_by_layer_by_recipe_and_for_all() -> None:
    same = pe_energy(NET, {"act": 4, "weight": 3})
    by_layer = {name: {"act": 4, "weight": 3} for name in NET.names}
    assert pe_energy(NET, by_layer).to_dict() == same.to_dict()
    assert pe_energy(NET, mixbit.Recipe.uniform(NET.names, weight=3, act=4)).to_dict() == same.to_dict()
    other = pe_energy(NET, by_layer | {"head": {"act": 2, "weight": 4}}, {"kind": "slices", "count": 4})
    assert (other["head"].act, other["head"].weight) == (2, 4)
    assert other["head"].cycles == 1280 / 2 / 4


def test_a_workload_from_a_model_counts_its_own_inputs() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(4, 4, 3)).eval()
    net = Workload.from_model(model, torch.randn(2, 3, 8, 8))
    assert [use.input_elements for use in net] == [192, 256]
    assert Workload.from_dict(json.loads(json.dumps(net.to_dict()))) == net
    act = {"act": 16, "weight": 8}
    assert pe_energy(net, act).layers[0].energy["acts"] == pytest.approx((192 + 256) * 6)


def test_vgg9_at_the_published_compression() -> None:
    net = Workload.from_model(mixbit.zoo.vgg9(), torch.zeros(1, 3, 32, 32))
    assert net.macs == 616_966_144
    uniform = pe_energy(net, {"act": 4, "weight": 4})
    mixed = pe_energy(net, {"act": 4, "weight": 2}, extra=0.19926)
    assert sum(layer.weights for layer in uniform.layers) == 14_022_016
    assert mixed.bits_per_weight == pytest.approx(4 / 1.37, rel=1e-5)
    assert uniform.cycles == 2 * mixed.cycles
    share = mixbit.hw.proportional_share(1.29, 1.37)
    assert share == pytest.approx(0.832, abs=5e-4)
    assert 1 / (1 - share + share / 1.37) == pytest.approx(1.29)
    # The comparators run every weight at the widest of its layer.
    fusion = pe_energy(net, {"act": 4, "weight": 2}, "bit_fusion_like", extra=0.19926)
    assert fusion.energy["weights"] == pytest.approx(uniform.energy["weights"])
    assert fusion.energy["index"] == 0
    assert pe_energy(net, {"act": 4, "weight": 4}, "stripes_like").energy["weights"] == pytest.approx(
        4 * uniform.energy["weights"]
    )


def test_bad_input_is_named() -> None:
    bits = {"act": 4, "weight": 2}
    cases: list[tuple[Any, str]] = [
        (lambda: pe_energy(NET, bits, "slice"), "kind='slice' is not known.*did you mean 'slices'"),
        (lambda: pe_energy(NET, bits, {"kynd": "slices"}), "pe: unknown key 'kynd'.*did you mean 'kind'"),
        (lambda: pe_energy(NET, bits, {"count": 0}), "count is 0; expected a whole number"),
        (lambda: pe_energy(NET, bits, {"dram": float("nan")}), "dram is nan; expected a finite number"),
        (lambda: pe_energy(NET, {"act": 4}), "bits has no 'weight'"),
        (lambda: pe_energy(NET, {"hed": bits}), "bits: the network has no layer 'hed'.*did you mean 'head'"),
        (lambda: pe_energy(NET, {"head": bits}), "bits has no layer 'conv'"),
        (lambda: pe_energy(NET, bits, extra=1.5), "extra is 1.5; expected a finite number of at least 0 and at most 1"),
        (
            lambda: pe_energy(NET, bits, extra={"head": (0.1, 0.2)}),
            "extra: head is .*; expected the second share within",
        ),
        (lambda: pe_energy(NET, bits, extra={"tail": 0.1}), "extra: the network has no layer 'tail'"),
        (lambda: pe_energy(NET, bits, extra="half"), "extra is 'half'; expected a share"),
        (lambda: pe_energy(NET, bits, index="huffman"), "index='huffman' is not known"),
        (lambda: pe_energy(NET, bits, index_bits={"x": 1}), "index_bits: the network has no layer 'x'"),
        (lambda: pe_energy(NET, {"act": 4, "weight": 16}, extra=0.1), "layer 'conv': weight bits: 17, expected"),
        (lambda: ProcessingElement().product(2, 0, 2, 4), "weight 2 does not fit 2 bits"),
        (lambda: ProcessingElement().throughput(0, 4), "weight_bits is 0; expected a whole number"),
        (lambda: ProcessingElement().product(0.5, 0, 2, 4), "weight is 0.5; expected a whole number"),  # type: ignore[arg-type]
        (lambda: ProcessingElement().dot([1], [3], [1], 2, 4), "extra_bits holds 3 to 3; expected 0 to 2"),
        (lambda: ProcessingElement().dot([1.5], [0], [1], 2, 4), r"codes is float64 \[1\]; expected integers"),
        (lambda: ProcessingElement().dot([1, 1], [0], [1], 2, 4), "codes, extra_bits and acts: expected one length"),
    ]
    for call, message in cases:
        with pytest.raises(mixbit.MixbitError, match=message):
            call()
