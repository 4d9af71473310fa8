"""SQNR of known sources: closed forms and tabulated optima of uniform quantization."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import norm

from mixbit import ops

N = 65536


def sqnr(x: torch.Tensor, bits: int, scale: float, *, signed: bool = True, narrow: bool = True) -> float:
    signal, noise = ops.quantization_noise(
        x, torch.tensor([scale]), torch.tensor([float(bits)]), signed=signed, narrow_range=narrow
    )
    return 10 * math.log10(float(signal) / float(noise))


def quantiles(kind: str, n: int = N) -> torch.Tensor:
    """x_i = F^-1((i + 1/2) / n): a sample without randomness."""
    p = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    if kind == "gauss":
        return torch.from_numpy(norm.ppf(p.numpy())).float()
    b = 1 / math.sqrt(2)
    return torch.where(p < 0.5, b * torch.log(2 * p), -b * torch.log(2 * (1 - p))).float()


# bits: (Gauss full step, dB), (Gauss symmetric step, dB), (Laplace full ...), (Laplace symmetric ...): Max (1960) and
# analytic integrals.
OPTIMA = {
    2: ((1.048385, 8.256), (1.224006, 7.208), (1.214126, 6.840), (1.414214, 5.780)),
    3: ((0.601824, 13.911), (0.650770, 13.292), (0.762452, 11.427), (0.821753, 10.805)),
    4: ((0.338608, 19.258), (0.353411, 18.898), (0.467647, 15.976), (0.486885, 15.623)),
    5: ((0.188792, 24.527), (0.193249, 24.326), (0.281276, 20.609), (0.287464, 20.417)),
    6: ((0.104179, 29.818), (0.105488, 29.709), (0.165915, 25.361), (0.167849, 25.259)),
    8: ((0.030766, 40.570), (0.030870, 40.540), (0.054851, 35.209), (0.055024, 35.181)),
}


@pytest.mark.parametrize("bits", OPTIMA)
def test_optimal_steps_of_gauss_and_laplace(bits: int) -> None:
    """The SQNR at the tabulated step, and no better step nearby."""
    for (step, db), (kind, narrow) in zip(
        OPTIMA[bits], [("gauss", False), ("gauss", True), ("laplace", False), ("laplace", True)], strict=True
    ):
        x = quantiles(kind, 1 << 22)  # many points: the tails carry the last hundredths of a dB
        tolerance = 0.01 if bits < 8 else 0.06  # a finite sample lacks the far tail, which matters at 8 bit
        assert sqnr(x, bits, step, narrow=narrow) == pytest.approx(db, abs=tolerance)
        if bits < 8:
            for other in (0.97, 1.03):
                assert sqnr(x, bits, step * other, narrow=narrow) < db + 0.002


def test_uniform_input_has_closed_forms() -> None:
    x = (-1 + (2 * torch.arange(N, dtype=torch.float64) + 1) / N).float()
    for bits, db in {2: 6.020599916, 4: 22.922560717, 8: 48.096674335}.items():
        assert sqnr(x, bits, 1 / (2 ** (bits - 1) - 1)) == pytest.approx(db, abs=2e-4)
    for bits in (3, 5, 6):
        levels = 2 ** (bits - 1) - 1
        assert sqnr(x, bits, 1 / levels) == pytest.approx(20 * math.log10(2 * levels), abs=2e-3)


def test_rectified_gauss_is_the_symmetric_grid_with_one_bit_more() -> None:
    x = quantiles("gauss", 1 << 20)
    golden = {2: (0.650770, 13.292), 3: (0.353411, 18.898), 4: (0.193249, 24.326), 5: (0.105488, 29.709)}
    for bits, (step, db) in golden.items():
        unsigned = sqnr(x.relu(), bits, step, signed=False, narrow=False)
        assert unsigned == pytest.approx(db, abs=0.01)
        assert unsigned == pytest.approx(sqnr(x, bits + 1, step), abs=1e-3)


@pytest.mark.parametrize(
    ("kind", "bits", "fraction", "db"),
    [
        ("gauss", 2, 0, 8.233), ("gauss", 3, 1, 13.221), ("gauss", 4, 1, 16.807), ("gauss", 6, 3, 28.826),
        ("gauss", 8, 5, 40.553), ("laplace", 2, 0, 6.617), ("laplace", 4, 1, 15.898), ("laplace", 5, 2, 20.268),
        ("laplace", 8, 4, 34.708),
    ],
)  # fmt: skip
def test_best_power_of_two_steps(kind: str, bits: int, fraction: int, db: float) -> None:
    x = quantiles(kind, 1 << 22)
    candidates = torch.tensor([2.0**-f for f in range(-2, 10)])
    signal, noise = ops.quantization_noise(
        x, candidates, torch.full((12,), float(bits)), signed=True, narrow_range=False
    )
    assert int(noise.argmin()) - 2 == fraction
    assert 10 * math.log10(float(signal) / float(noise.min())) == pytest.approx(db, abs=0.06)


# (optimal step, largest value) of vectors without randomness.
VECTORS = {
    "gauss": {2: (7.2087, 0.4287), 3: (13.2930, 7.6150), 4: (18.9008, 14.9742), 6: (29.7333, 27.8996), 8: (40.6962, 40.1483)},
    "laplace": {2: (5.7813, 0.1918), 3: (10.8091, 3.9466), 4: (15.6357, 10.1137), 6: (25.3392, 22.7459), 8: (35.6106, 34.9792)},
}  # fmt: skip


@pytest.mark.parametrize("kind", VECTORS)
def test_vectors_without_randomness(kind: str) -> None:
    x = quantiles(kind)
    for bits, (optimal, largest) in VECTORS[kind].items():
        step = OPTIMA[bits][1 if kind == "gauss" else 3][0]
        assert sqnr(x, bits, step) == pytest.approx(optimal, abs=0.002)
        assert sqnr(x, bits, float(x.abs().max()) / (2 ** (bits - 1) - 1)) == pytest.approx(largest, abs=0.002)


@pytest.mark.parametrize(
    ("weight_bits", "act_bits", "db"),
    [(8, 8, 37.52), (4, 8, 18.84), (8, 4, 18.83), (4, 4, 15.88), (3, 4, 12.23), (2, 4, 6.94)],
)
def test_noise_of_weight_and_input_adds(weight_bits: int, act_bits: int, db: float) -> None:
    w, x = torch.randn(512, 512), torch.randn(512, 512)

    def quantized(t: torch.Tensor, bits: int) -> tuple[torch.Tensor, float]:
        step = OPTIMA[bits][1][0]
        return ops.fake_quantize(t, torch.tensor([step]), 0, bits, narrow_range=True), sqnr(t, bits, step)

    (wq, w_db), (xq, x_db) = quantized(w, weight_bits), quantized(x, act_bits)
    signal, noise = ops.noise_power(wq @ xq, w @ x)
    measured = 10 * math.log10(float(signal) / float(noise))
    assert measured == pytest.approx(-10 * math.log10(10 ** (-w_db / 10) + 10 ** (-x_db / 10)), abs=0.05)
    assert measured == pytest.approx(db, abs=0.1)


def test_sums_are_taken_before_the_ratio() -> None:
    """Two images with signal sums {4, 1} and noise sums {0.01, 0.0001}: 26.9465 dB."""
    reference = torch.tensor([2.0, 1.0])
    noisy = reference + torch.tensor([0.1, 0.01])
    signal, noise = ops.noise_power(noisy, reference)
    assert 10 * math.log10(float(signal) / float(noise)) == pytest.approx(26.9465, abs=1e-3)
