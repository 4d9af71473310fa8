"""Stored codes: round trips, sizes, the published compression of VGG-9, whole networks, bad input."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mixbit
from mixbit import ops
from mixbit.retrain import storage

VGG9 = {  # weights of the layers, specs of the published network
    "conv1": (128, 3, 3, 3),
    "conv2": (128, 128, 3, 3),
    "conv3": (256, 128, 3, 3),
    "conv4": (256, 256, 3, 3),
    "conv5": (512, 256, 3, 3),
    "conv6": (512, 512, 3, 3),
    "fc1": (1024, 8192),
    "fc2": (1024, 1024),
    "fc3": (10, 1024),
}


def drawn(
    shape: tuple[int, ...], base_bits: int, fraction: float, index: str, *, two: bool = False, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Codes and extra bits that every index can keep (groups of 16 along dimension 1)."""
    rng = np.random.default_rng(seed)
    extra = (rng.random(shape) < fraction).astype(np.int64)
    if two:
        extra *= 1 + (rng.random(shape) < 0.3)
    if index == "group":
        axis = min(1, len(shape) - 1)
        extra = np.take(extra, np.arange(shape[axis]) // 16 * 16, axis)
    limit = 2 ** (base_bits + extra - 1)
    codes = rng.integers(-limit, limit)
    if index == "oddlevel":
        codes = np.where(extra > 0, codes | 1, codes)
    return codes, extra.astype(np.uint8)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(storage.INDEX_MODES), st.integers(1, 8), st.floats(0, 1), st.booleans(),
    st.lists(st.integers(1, 20), min_size=1, max_size=4), st.integers(0, 10_000),
)  # fmt: skip
def test_every_index_comes_back(
    index: str, base_bits: int, fraction: float, two: bool, shape: list[int], seed: int
) -> None:
    codes, extra = drawn(tuple(shape), base_bits, fraction, index, two=two, seed=seed)
    data = storage.encode(codes, extra, base_bits, index)
    back, flags = storage.decode(data, extra if index == "none" else None)
    assert np.array_equal(back, codes)
    assert np.array_equal(flags, extra)
    assert flags.dtype == np.uint8
    assert back.dtype == (np.int8 if base_bits + extra.max(initial=0) <= 8 else np.int16)
    size = storage.inspect(data)
    assert size == storage.size(codes, extra, base_bits, index)
    assert size.total == len(data)
    assert (size.weights, size.flagged, size.flagged_twice) == (codes.size, (extra > 0).sum(), (extra > 1).sum())
    assert size.shape == codes.shape
    assert size.base == math.ceil(codes.size * base_bits / 8)
    stored = extra.sum() if index != "oddlevel" else np.maximum(extra.astype(int) - 1, 0).sum()
    assert size.extra == math.ceil(stored / 8)


def test_tensors_and_arrays_give_the_same_bytes() -> None:
    codes, extra = drawn((12, 9, 3, 3), 2, 0.3, "entropy")
    data = storage.encode(codes, extra, 2)
    assert storage.encode(torch.from_numpy(codes), torch.from_numpy(extra), 2) == data
    assert storage.encode(torch.from_numpy(codes).to(memory_format=torch.channels_last), extra, 2) == data
    assert storage.encode(codes.astype(np.int8), extra.astype(bool), 2) == data
    assert storage.decode(bytearray(data))[0].tolist() == codes.tolist()
    plain = np.clip(codes, -2, 1)
    assert storage.decode(storage.encode(plain, None, 2))[1].sum() == 0
    assert storage.bits_per_weight(plain, None, 2, "none") == 2.0
    scalar, empty = np.array(-3), np.zeros((3, 0), np.int8)
    back, flags = storage.decode(storage.encode(scalar, np.array(1), 2))
    assert (back.shape, int(back), int(flags)) == ((), -3, 1)
    for index in storage.INDEX_MODES:
        assert storage.decode(storage.encode(empty, None, 2, index), empty.astype(np.uint8))[0].shape == (3, 0)


def test_the_plane_of_base_codes_is_the_network_without_extra_levels() -> None:
    codes, extra = drawn((6, 50), 3, 0.4, "bitmap", two=True)
    data = storage.encode(codes, extra, 3, "bitmap")
    size = storage.inspect(data)
    plane = torch.frombuffer(bytearray(data[size.header : size.header + size.base]), dtype=torch.uint8)
    base = ops.unpack_bits(plane, 3, codes.size, True).reshape(codes.shape)
    assert np.array_equal(base.numpy(), codes >> extra)
    assert torch.equal(ops.pack_bits(base.reshape(-1), 3), plane)


def test_the_closed_forms_and_what_is_written() -> None:
    table = {
        "none": (2.1, 2.2, 2.3, 2.5),
        "bitmap": (3.1, 3.2, 3.3, 3.5),
        "entropy": (2.569, 2.922, 3.181, 3.5),
        "rle4": (2.604, 3.029, 3.506, 4.5),
        "group": (2.1625, 2.2625, 2.3625, 2.5625),
        "oddlevel": (2.469, 2.722, 2.881, 3.0),
    }
    ratios = {"none": 1.818, "bitmap": 1.250, "entropy": 1.369, "rle4": 1.320, "group": 1.768, "oddlevel": 1.470}
    for index, bits in table.items():
        for fraction, expected in zip((0.1, 0.2, 0.3, 0.5), bits, strict=True):
            assert storage.expected_bits(2, fraction, index) == pytest.approx(expected, abs=5e-4)
        assert 4 / storage.expected_bits(2, 0.2, index) == pytest.approx(ratios[index], abs=5e-4)
        codes, extra = drawn((64, 64, 3, 3), 2, 0.2, index, seed=3)
        expected = storage.expected_bits(2, float(extra.mean()), index)
        assert storage.bits_per_weight(codes, extra, 2, index) == pytest.approx(expected, rel=0.01)
    assert storage.expected_bits(2, 0.5, "none", extra=2) == 3.0
    assert storage.expected_bits(2, 0.2, "group", 8) == 2.325


def test_the_share_that_meets_the_published_compression() -> None:
    assert storage.flagged_fraction(1.37) == pytest.approx(0.19926, abs=5e-6)
    assert storage.flagged_fraction(1.37, index="none") == pytest.approx(0.91971, abs=5e-6)
    assert storage.flagged_fraction(1.37, index="none", extra=2) == pytest.approx(0.45985, abs=5e-6)
    with pytest.raises(mixbit.MixbitError, match="out of reach with index bitmap at base_bits=2"):
        storage.flagged_fraction(1.37, index="bitmap")
    with pytest.raises(mixbit.MixbitError, match="ratio=0: expected a positive number"):
        storage.flagged_fraction(0)


def test_vgg9_at_uniform_4_bits_and_at_the_published_compression() -> None:
    rng = np.random.default_rng(1)
    uniform: dict[str, storage.LayerCodes] = {}
    mixed: dict[str, storage.LayerCodes] = {}
    for name, shape in VGG9.items():
        uniform[name] = storage.LayerCodes(rng.integers(-8, 8, shape, dtype=np.int8), None, 4)
        extra = (rng.random(shape, dtype=np.float32) < 0.19926).astype(np.uint8)
        codes = rng.integers(-2, 2, shape, dtype=np.int8)
        mixed[name] = storage.LayerCodes(codes * (1 + extra.astype(np.int8)), extra, 2)
    plain = storage.report(uniform, modes=["none"])
    assert plain.weights == 14_022_016
    assert plain["none"].payload == plain.uniform_bytes == 7_011_008
    assert plain.float_bytes == 56_088_064
    assert plain.scale_bytes == 36
    assert plain["none"].ratio_uniform == 1.0
    assert plain["none"].ratio_float == 8.0
    found = storage.report(mixed, modes=["entropy", "oddlevel"])
    assert found["entropy"].ratio_uniform == pytest.approx(1.37, abs=0.002)
    assert found["entropy"].ratio_float == pytest.approx(10.96, abs=0.02)
    assert found["entropy"].payload == pytest.approx(5_118_000, rel=2e-3)
    assert found["entropy"].payload + found["entropy"].header == sum(
        len(storage.encode(layer.codes, layer.extra_bits, 2)) for layer in mixed.values()
    )
    assert "an even level" in str(found["oddlevel"].reason)
    assert "oddlevel" in str(found)
    assert json.loads(json.dumps(found.to_dict()))["modes"]["entropy"]["base"] == 14_022_016 // 4


def prepared(bits: int) -> tuple[torch.nn.Module, torch.Tensor]:
    weights = mixbit.zoo.data_dir() / "weights/cifar10_resnet20_fp32.npz"
    model = mixbit.zoo.cifar_resnet(20, weights=weights).eval()
    images, _ = mixbit.zoo.cifar10("train", 32)
    precision: dict[str, Any] = {"weight": bits, "act": 8, "rounding": "half_up", "narrow_range": False}
    mixbit.fold_batchnorm_(model, images[:2])
    mixbit.prepare_(model, mixbit.Recipe.from_dict({"default": precision}), images[:2])
    mixbit.calibrate_(model, [images])
    return model, images


def test_a_report_of_a_model_has_the_codes_that_it_computes_with() -> None:
    model, _ = prepared(4)
    layers = storage.layer_codes(model)
    quantized = mixbit.quantizers.quantized_layers(model)
    assert set(layers) == set(quantized)
    for name, layer in layers.items():
        quantizer = quantized[name].weight_quantizer
        step = quantizer.effective_scale().detach().reshape(-1, *(1,) * (quantized[name].weight.dim() - 1))
        assert torch.equal(torch.from_numpy(layer.codes) * step, quantizer(quantized[name].weight).detach())
        assert layer.scales == quantized[name].weight.shape[0]
    found = storage.report(model)
    weights = sum(layer.weight.numel() for layer in quantized.values())
    assert found.weights == weights
    assert found["none"].bits_per_weight == pytest.approx(4, abs=1e-3)
    assert found["bitmap"].bits_per_weight == pytest.approx(5, abs=1e-3)
    assert found["entropy"].index == 0
    assert found.bias_bytes == 4 * sum(layer.bias.numel() for layer in quantized.values() if layer.bias is not None)


def test_a_model_with_extra_levels_is_stored_and_priced() -> None:
    model, images = prepared(2)
    quantized = mixbit.quantizers.quantized_layers(model)
    g = torch.Generator().manual_seed(0)
    for layer in quantized.values():
        flagged = torch.rand(layer.weight.shape, generator=g) < 0.2
        extra = flagged.to(torch.uint8) * (1 + (torch.rand(layer.weight.shape, generator=g) < 0.3).to(torch.uint8))
        layer.weight_quantizer.set_extra_bits_(extra)
    layers = storage.layer_codes(model)
    for name, layer in layers.items():
        weight, quantizer = quantized[name].weight.detach(), quantized[name].weight_quantizer
        step = quantizer.effective_scale().detach().reshape(-1, *(1,) * (weight.dim() - 1))
        level = torch.from_numpy(layer.codes) * (step / 2.0 ** torch.from_numpy(layer.extra_bits))
        assert torch.equal(level, quantizer(weight).detach())
        assert np.array_equal(layer.extra_bits, quantizer.extra_bits.numpy())
        data = storage.encode(layer.codes, layer.extra_bits, 2)
        assert np.array_equal(storage.decode(data)[0], layer.codes)
    found = storage.report(model)
    assert found.flagged == sum(int((layer.extra_bits > 0).sum()) for layer in layers.values())
    assert found.flagged_twice > 0
    # Priced by the closed forms from the recipe's maps, and by the bytes of the report: the same to padding.
    net = mixbit.hw.Workload.from_model(model, images[:1])
    recipe = mixbit.search.extract(model)
    closed = mixbit.hw.pe_energy(net, recipe)
    assert closed.bits_per_weight == pytest.approx(found["entropy"].bits_per_weight, rel=1e-3)
    written = {name: 8.0 * size.index for name, size in found["entropy"].layers.items()}
    measured = mixbit.hw.pe_energy(net, recipe, index_bits=written)
    assert measured.energy["index"] == pytest.approx(closed.energy["index"], rel=5e-3)
    with pytest.raises(mixbit.MixbitError, match="extra is given beside a recipe with extra levels"):
        mixbit.hw.pe_energy(net, recipe, extra=0.1)


def test_bad_input_is_named() -> None:
    codes, extra = drawn((4, 8), 2, 0.5, "bitmap")
    cases: list[tuple[Any, str]] = [
        (lambda: storage.encode(codes, extra, 2, "entropie"), "index='entropie' is not known.*did you mean 'entropy'"),
        (lambda: storage.encode(codes, extra, 9), "base_bits=9: expected a whole number from 1 to 8"),
        (lambda: storage.encode(codes, extra, 2.5), "base_bits=2.5: expected a whole number"),
        (lambda: storage.encode(codes.astype(float), extra, 2), "codes has dtype float64: expected integers"),
        (lambda: storage.encode(codes * 100_000, extra, 2), "codes holds .*: expected -32768 to 32767"),
        (lambda: storage.encode(codes, extra[:2], 2), r"extra_bits has shape \(2, 8\): expected \(4, 8\)"),
        (lambda: storage.encode(codes, extra.astype(int) - 1, 2), "extra_bits holds -1 to 0: expected 0 to 255"),
        (lambda: storage.encode(codes, extra * 3, 2), "extra_bits of weight .* is 3: expected 0 to 2"),
        (lambda: storage.encode(codes * 9, extra, 2), "code of weight .*: expected .*base_bits=2"),
        (lambda: storage.encode(codes, extra, 2, "group"), "index 'group' expects one number a group"),
        (lambda: storage.encode(codes, extra, 2, "group", group_size=0), "group_size=0: expected"),
        (lambda: storage.encode(codes, extra, 2, "group", group_axis=2), "group_axis=2: expected a dimension"),
        (lambda: storage.encode(codes * 0, extra, 2, "oddlevel"), "expects flagged weights on odd levels"),
        (lambda: storage.expected_bits(2, 1.5), "fraction=1.5.*: expected a share from 0 to 1"),
        (lambda: storage.expected_bits(9, 0.5), "base_bits=9: expected a whole number from 1 to 8"),
        (lambda: storage.expected_bits(2, 0.5, extra=3), "extra=3: expected a whole number from 1 to 2"),
        (lambda: storage.flagged_fraction("1.37"), "ratio='1.37': expected a positive number"),  # type: ignore[arg-type]
        (lambda: storage.report({}), "layers is empty"),
        (lambda: storage.report(torch.nn.Linear(2, 2)), "model has no quantized weights"),
        (lambda: storage.report({"a": storage.LayerCodes(codes * 9, extra, 2)}), "layer 'a': code of weight"),
        (lambda: storage.decode("text"), "data is a str: expected bytes"),  # type: ignore[arg-type]
        (lambda: storage.inspect(b"nothing"), "no stored codes"),
    ]
    for call, message in cases:
        with pytest.raises(mixbit.MixbitError, match=message):
            call()


def test_damaged_bytes_are_refused() -> None:
    codes, extra = drawn((4, 30), 2, 0.3, "rle4")
    data = storage.encode(codes, extra, 2, "rle4")
    for size in range(len(data)):
        with pytest.raises(mixbit.MixbitError):
            storage.decode(data[:size])
    for at in range(len(data)):
        with pytest.raises(mixbit.MixbitError):
            storage.decode(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])
    bare = storage.encode(codes, extra, 2, "none")
    with pytest.raises(mixbit.MixbitError, match="extra_bits is missing"):
        storage.decode(bare)
    with pytest.raises(mixbit.MixbitError, match="not those that the codes were stored with"):
        storage.decode(bare, np.roll(extra, 1))
    with pytest.raises(mixbit.MixbitError, match=r"extra_bits has shape \(120,\): expected \(4, 30\)"):
        storage.decode(bare, extra.reshape(-1))
