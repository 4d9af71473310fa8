"""The ops of differentiable searches: golden values of gates, grids and penalties, gradients, layouts, errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mixbit import ops

P = (2, 4, 8)
X4 = torch.tensor([0, 0.3, 0.9, 1, 1.1, 2.7, 3, 4.99, 5.2, 6, 7.5])
UNSIGNED = {
    (0.0, 0.0): [0, 0, 0, 0, 2, 2, 4, 4, 6, 6, 6],
    (1.0, 0.0): [0, 0.4, 0.8, 0.8, 1.2, 2.8, 3.2, 4.8, 5.2, 6, 6],
    (1.0, 1.0): [0, 0.305882, 0.894118, 0.988235, 1.105882, 2.705882, 3.011765, 4.988235, 5.2, 6, 6],
    (0.0, 1.0): [0, 0, 0, 0, 2, 2, 4, 4, 6, 6, 6],
    (0.5, 0.25): [0, 0.188235, 0.411765, 0.423529, 1.588235, 2.388235, 3.57647, 4.42353, 5.6, 6, 6],
}
X5 = torch.tensor([-1.2, -1, -0.8, -0.3, -0.06, 0, 0.06, 0.24, 0.26, 0.49, 0.51, 0.9, 1])
SIGNED = {
    (0.0, 0.0): [-1, -1, -1, -0.5, 0, 0, 0, 0, 0.5, 0.5, 0.5, 0.5, 0.5],
    (1.0, 0.0): [-1, -1, -0.75, -0.25, 0, 0, 0, 0.25, 0.25, 0.5, 0.5, 0.875, 0.875],
    (1.0, 1.0): [
        *(-1, -1, -0.796875, -0.296875, -0.0625, 0, 0.0625),
        *(0.242188, 0.257812, 0.492188, 0.507812, 0.898438, 0.992188),
    ],
}


def gated(x: Tensor, gates: object, signed: bool, form: str = "difference", limit: float = 0.0) -> Tensor:
    z = gates if isinstance(gates, Tensor) else torch.tensor(gates)
    return ops.gated_fake_quantize(x, torch.tensor([limit or (1.0 if signed else 6.0)]), z, P, signed=signed, form=form)


@pytest.mark.parametrize(
    ("u", "phi", "z"),
    [
        (0.05, 2, 0.057647),
        (0.1, 2, 0.383176),
        (0.5, -1, 0.043044),
        (0.5, 0, 0.5),
        (0.5, 2, 1),
        (0.9, -1, 0.999684),
        (0.1, 0, 0),
        (0.3, 0.2, 0.158091),
        (0.4, -0.1, 0.220157),
    ],
)
def test_a_gate_of_given_noise(u: float, phi: float, z: float) -> None:
    logit = torch.tensor([float(phi)], requires_grad=True)
    gate = ops.sample_gates(logit, torch.tensor([u]), 0.5)
    assert float(gate.detach()) == pytest.approx(z, abs=1e-6)
    gate.sum().backward()
    s = (float(gate.detach()) + 0.1) / 1.2
    assert float(logit.grad) == pytest.approx(2.4 * s * (1 - s) if 0 < z < 1 else 0.0, abs=1e-5)


def test_gates_have_the_closed_forms_of_the_distribution() -> None:
    """P(z > 0), P(z = 1) and the mean at phi = 2; 4e5 draws, five standard errors."""
    noise = torch.rand(1, 400_000, generator=torch.Generator().manual_seed(0))
    z = ops.sample_gates(torch.tensor([2.0]), noise, 0.5)
    assert z.shape == (1, 400_000)
    assert float((z > 0).float().mean()) == pytest.approx(0.960795, abs=1.6e-3)
    assert float((z == 1).float().mean()) == pytest.approx(0.690200, abs=3.7e-3)
    assert float(z.double().mean()) == pytest.approx(0.867361, abs=2e-3)


@pytest.mark.parametrize("gates", list(UNSIGNED))
@pytest.mark.parametrize("form", list(ops.GATE_FORMS))
def test_unsigned_grids(gates: tuple[float, float], form: str) -> None:
    # Ties of the wider grids (1.0 / 0.4) may go the other way from the coarser level: the residual form leaves them out.
    keep = torch.ones(11, dtype=torch.bool) if form == "difference" else (X4 != 1) & (X4 != 3)
    got = gated(X4, gates, signed=False, form=form)
    torch.testing.assert_close(got[keep], torch.tensor(UNSIGNED[gates], dtype=torch.float32)[keep], rtol=0, atol=1e-6)


@pytest.mark.parametrize("gates", list(SIGNED))
def test_signed_grids_and_the_mask_of_the_widest(gates: tuple[float, float]) -> None:
    x = X5.clone().requires_grad_()
    y = gated(x, gates, signed=True)
    torch.testing.assert_close(y.detach(), torch.tensor(SIGNED[gates]), rtol=0, atol=1e-6)
    y.sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0]


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("open_gates", [0, 1, 2])
def test_hard_gates_are_one_grid_exactly(signed: bool, open_gates: int) -> None:
    x = torch.randn(5, 4, 30) * 2
    limit = torch.rand(4) + 0.5
    gates = (torch.arange(2) < open_gates).float()
    bits = P[open_gates]
    step = limit / (2 ** (bits - 1) if signed else 2**bits - 1)
    y = ops.gated_fake_quantize(x, limit, gates, P, signed=signed, axis=1)
    assert torch.equal(y, ops.fake_quantize(x, step, 0, bits, signed=signed, axis=1))


def test_the_gradient_of_the_gates() -> None:
    phi = torch.tensor([0.2, -0.1], requires_grad=True)
    x = X4.clone().requires_grad_()
    gated(x, ops.sample_gates(phi, torch.tensor([0.3, 0.4]), 0.5), signed=False).sum().backward()
    torch.testing.assert_close(phi.grad, torch.tensor([0.486197, 0.0]), rtol=0, atol=1e-5)
    assert x.grad.tolist() == [1.0] * 10 + [0.0]


def test_gates_of_each_sample() -> None:
    x = torch.randn(3, 5, 7)
    gates = torch.rand(2, 3, requires_grad=True)
    grad = torch.randn_like(x)
    gated(x, gates, signed=True).backward(grad)
    for n in range(3):
        alone = gates.detach()[:, n].clone().requires_grad_()
        gated(x[n], alone, signed=True).backward(grad[n])
        torch.testing.assert_close(gates.grad[:, n], alone.grad, rtol=1e-5, atol=1e-6)


def test_a_mixture_and_its_gradients() -> None:
    x = torch.randn(6, 4, 9, requires_grad=True)
    scales = (torch.rand(3, 4) * 0.4 + 0.05).requires_grad_()
    weights = torch.softmax(torch.randn(3), 0).requires_grad_()
    bits = torch.tensor([2.0, 4.0, 8.0])
    grad = torch.randn_like(x)
    y = ops.mixture_fake_quantize(x, scales, weights, bits, signed=True, axis=1)
    y.backward(grad)
    parts = []
    dx = torch.zeros_like(x)
    for k in range(3):
        leaf, s = x.detach().clone().requires_grad_(), scales.detach()[k].clone().requires_grad_()
        part = ops.fake_quantize(leaf, s, 0, float(bits[k]), axis=1)
        part.backward(grad * weights.detach()[k])
        parts.append(part.detach())
        dx += leaf.grad
        torch.testing.assert_close(scales.grad[k], s.grad, rtol=1e-4, atol=1e-5)
        assert float(weights.grad[k]) == pytest.approx(float((grad * part.detach()).double().sum()), abs=1e-3)
    torch.testing.assert_close(y.detach(), sum(w * p for w, p in zip(weights.detach(), parts, strict=True)))
    torch.testing.assert_close(x.grad, dx, rtol=1e-6, atol=1e-6)


def test_expected_cost_of_a_latency_table() -> None:
    table = torch.tensor([[100.0, 140, 220], [180, 150, 230], [400, 380, 300]]) / 1000
    table = (table - table.min()).unsqueeze(0)
    for phi, loss in ((2.0, 0.2001378), (-6.0, 0.0009938), (6.0, 0.2000220)):
        act, weight = (torch.full((1, 2), phi, requires_grad=True) for _ in range(2))
        found = ops.expected_cost(act, weight, table, "expected")
        assert float(found.detach()) == pytest.approx(loss, abs=1e-6)
        if phi == 2.0:
            found.backward()
            torch.testing.assert_close(weight.grad, torch.tensor([[-0.0031291, -0.0024502]]), rtol=0, atol=1e-6)
            torch.testing.assert_close(act.grad, torch.tensor([[0.0034444, 0.0029644]]), rtol=0, atol=1e-6)


def test_the_penalties_of_free_bits() -> None:
    share, precisions = torch.tensor([1.0, 0.25]), torch.tensor([0.0, 4.0, 8.0])
    logits = torch.full((2, 2), 2.0, requires_grad=True)
    separate = torch.zeros(2, 3, 3)
    separate[:, 0, :] = separate[:, :, 0] = share[:, None] * precisions
    found = ops.expected_cost(logits, logits, separate, "separate")
    assert float(found.detach()) == pytest.approx(2 * 1.25 * 11.2281896, abs=1e-5)
    found.backward()
    torch.testing.assert_close(logits.grad[0], torch.tensor([0.880410, 0.5790638]), rtol=0, atol=1e-5)
    joint = share[:, None, None] * precisions[:, None] * precisions
    assert float(ops.expected_cost(logits.detach(), logits.detach(), joint, "joint")) == pytest.approx(
        1.25 * 11.2281896**2, abs=1e-4
    )
    fixed = torch.full((2, 2), math.inf)
    expected = 1.25 * 11.2281896 * 12
    assert float(ops.expected_cost(fixed, logits.detach(), joint, "joint")) == pytest.approx(expected, abs=1e-4)


def test_unknown_forms_are_named() -> None:
    with pytest.raises(ValueError, match="form='residuals' is not known: expected one of 'difference', 'residual'"):
        gated(X4, (1.0, 1.0), signed=False, form="residuals")
    with pytest.raises(ValueError, match="form='join' is not known"):
        ops.expected_cost(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 2, 2), "join")
