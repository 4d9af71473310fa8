"""quantization_noise, noise_power, observe and the scale searches."""

from __future__ import annotations

import math

import pytest
import torch
from torch.library import opcheck

from mixbit import ops
from mixbit.ops import _reference as twin

BITS = torch.tensor([2.0, 3, 4, 5, 6, 7, 8, 16])


@pytest.mark.parametrize("axis", [None, 0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("signed", [True, False])
def test_noise_equals_the_twin(axis: int | None, dtype: torch.dtype, signed: bool) -> None:
    x = torch.randn(5, 6, 40).to(dtype)
    scales = torch.rand(8) * 0.5 + 0.01 if axis is None else torch.rand(8, x.shape[axis]) * 0.5 + 0.01
    found = ops.quantization_noise(x, scales, BITS, signed=signed, narrow_range=True, axis=axis)
    expected = twin.quantization_noise(x, scales, BITS, signed=signed, narrow_range=True, axis=axis)
    for got, want in zip(found, expected, strict=True):
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-9)


def test_noise_of_nothing_and_of_nan() -> None:
    signal, noise = ops.quantization_noise(torch.empty(0), torch.ones(8), BITS, signed=True, narrow_range=True)
    assert float(signal) == 0.0
    assert noise.tolist() == [0.0] * 8
    signal, noise = ops.quantization_noise(
        torch.tensor([1.0, math.nan]), torch.ones(8), BITS, signed=True, narrow_range=True
    )
    assert signal.isnan()
    assert noise.isnan().all()


def test_noise_scales_exactly_with_powers_of_two() -> None:
    x, scales = torch.randn(1000), torch.rand(8)
    signal, noise = ops.quantization_noise(x, scales, BITS, signed=True, narrow_range=True)
    bigger = ops.quantization_noise(x * 8, scales * 8, BITS, signed=True, narrow_range=True)
    assert torch.equal(bigger[0], signal * 64)
    assert torch.equal(bigger[1], noise * 64)


def test_noise_power_equals_the_twin() -> None:
    x, reference = torch.randn(3, 1000, 11), torch.randn(3, 1000, 11)
    for got, want in zip(ops.noise_power(x, reference), twin.noise_power(x, reference), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    strided = torch.empty(3, 1000, 22)[:, :, ::2].copy_(reference)
    assert torch.equal(ops.noise_power(x, strided)[1], ops.noise_power(x, reference)[1])
    with pytest.raises(ValueError, match="reference is Float"):
        ops.noise_power(x, reference[0])


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_observe(axis: int | None) -> None:
    x = torch.randn(4, 7, 300) * 3
    low, high, total, squares, histogram = ops.observe(x, axis=axis, bins=128)
    dims = [d for d in range(3) if d != axis]
    torch.testing.assert_close(low, x.double().amin(dims))
    torch.testing.assert_close(high, x.double().amax(dims))
    torch.testing.assert_close(total, x.double().sum(dims), rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(squares, x.double().square().sum(dims), rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(histogram.sum(-1)[..., 0], torch.full_like(total, x.numel() / max(total.numel(), 1)))
    torch.testing.assert_close(histogram.sum(-1)[..., 1], x.double().sum(dims))
    torch.testing.assert_close(histogram.sum(-1)[..., 2], x.double().square().sum(dims))


def test_histogram_bins_are_where_they_should_be() -> None:
    x = torch.tensor([-3.9, -0.1, 0.0, 0.9, 1.0, 3.99])
    histogram = ops.observe(x, bins=8)[4]  # over [-4, 4): bins of width 1
    assert histogram[0].tolist() == [1, 0, 0, 1, 2, 1, 0, 1]
    assert ops.observe(torch.tensor([4.0]), bins=8)[4][0].tolist() == [0, 0, 0, 0, 0, 0, 1, 0]  # over [-8, 8)


def test_observe_sees_nan_infinity_and_nothing() -> None:
    low, high, *_ = ops.observe(torch.tensor([1.0, math.nan, 2.0]))
    assert low.isnan()
    assert high.isnan()
    low, high, _, _, histogram = ops.observe(torch.tensor([1.0, math.inf]), bins=4)
    assert high == math.inf
    assert histogram.sum() == 0
    low, high, *_ = ops.observe(torch.empty(0))
    assert (float(low), float(high)) == (math.inf, -math.inf)
    with pytest.raises(ValueError, match="bins=3"):
        ops.observe(torch.ones(2), bins=3)


def data(kind: str) -> torch.Tensor:
    n = torch.randn(200_000)
    return {
        "gauss": n,
        "laplace": torch.distributions.Laplace(0.0, 1.0).sample((200_000,)),
        "relu": n.relu(),
        "exponential": torch.empty(200_000).exponential_(),
        "relu6": (n * 3).clamp(0, 6),
    }[kind]


@pytest.mark.parametrize("kind", ["gauss", "laplace", "relu", "exponential", "relu6"])
def test_scale_searches(kind: str) -> None:
    x = data(kind)
    signed = bool((x < 0).any())
    bits = BITS[:7]
    exact = ops.mse_scales(x, bits, signed=signed, narrow_range=False)
    low, high, _, _, histogram = ops.observe(x, bins=8192)
    quick = ops.mse_scales_from_histogram(histogram, low, high, bits, signed=signed, narrow_range=False)
    power = float(x.double().square().sum())

    def db(scales: torch.Tensor) -> torch.Tensor:
        noise = ops.quantization_noise(x, scales, bits, signed=signed, narrow_range=False)[1]
        return 10 * torch.log10(power / noise)

    for b, scale in zip(bits.tolist(), exact.tolist(), strict=True):
        if b <= 5:
            best, _ = twin.mse_scales(x, int(b), signed=signed, narrow_range=False)
            assert scale == pytest.approx(best, rel=1e-6)
    assert (db(exact) - db(quick)).abs().max() < 0.01  # within 0.01 dB of the exact search
    estimated = ops.quantization_noise_from_histogram(
        histogram, low, high, exact, bits, signed=signed, narrow_range=False
    )
    assert (10 * torch.log10(power / estimated) - db(exact)).abs().max() < 0.1


def test_scales_per_channel_zeros_and_nan() -> None:
    x = torch.randn(4, 100)
    x[1] = 0
    x[2, 5] = math.nan
    scales = ops.mse_scales(x, BITS[:3], signed=True, narrow_range=True, axis=0)
    assert scales.shape == (3, 4)
    assert scales[:, 1].tolist() == [1.0, 1.0, 1.0]
    assert scales[:, 2].isnan().all()
    alone = ops.mse_scales(x[0], BITS[:3], signed=True, narrow_range=True)
    assert torch.equal(scales[:, 0], alone)
    assert torch.equal(ops.mse_scales(x.t(), BITS[:3], signed=True, narrow_range=True, axis=1)[:, 0], alone)
    with pytest.raises(ValueError, match="no positive level"):
        ops.mse_scales(x, torch.tensor([1.0]), signed=True, narrow_range=False)


def test_opcheck() -> None:
    x, bits = torch.randn(4, 50), torch.tensor([2.0, 4.0])
    grid = {"signed": True, "narrow_range": True}
    opcheck(torch.ops.mixbit.quantization_noise.default, (x, torch.rand(2, 4) + 0.1, bits), {**grid, "axis": 0})
    opcheck(torch.ops.mixbit.quantization_noise.default, (x, torch.rand(2) + 0.1, bits), grid)
    opcheck(torch.ops.mixbit.noise_power.default, (x, x * 2), {})
    opcheck(torch.ops.mixbit.observe.default, (x,), {"bins": 16})
    opcheck(torch.ops.mixbit.observe.default, (x,), {"axis": 1, "bins": 0})
    opcheck(torch.ops.mixbit.mse_scales.default, (x, bits), {**grid, "axis": 0})
    low, high, _, _, histogram = ops.observe(x, bins=64)
    opcheck(torch.ops.mixbit.mse_scales_from_histogram.default, (histogram, low, high, bits), grid)
    noise = torch.ops.mixbit.quantization_noise_from_histogram.default
    opcheck(noise, (histogram, low, high, torch.rand(2) + 0.1, bits), grid)


def test_statistics_carry_no_gradient() -> None:
    x = torch.randn(20, requires_grad=True)
    signal, noise = ops.quantization_noise(x, torch.tensor([0.1]), torch.tensor([4.0]), signed=True, narrow_range=True)
    assert not signal.requires_grad
    assert not noise.requires_grad


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"scales": torch.ones(3)}, r"scales has shape \[3\]: expected \[8\]"),
        ({"scales": torch.zeros(8)}, "expected a positive finite number"),
        ({"bit_widths": torch.ones(8) * 17}, "whole number from 1 to 16"),
        ({"bit_widths": torch.ones(8, dtype=torch.int64)}, "expected float32"),
        ({"axis": 5}, "axis=5 is out of range"),
    ],
)
def test_bad_arguments_are_named(change: dict, complaint: str) -> None:
    given = {"x": torch.randn(4, 4), "scales": torch.ones(8), "bit_widths": BITS, **change}
    with pytest.raises(ValueError, match=complaint):
        ops.quantization_noise(**given, signed=True, narrow_range=False)
