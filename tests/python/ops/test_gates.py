"""The ops of differentiable searches: golden values of gates, grids and penalties, gradients, layouts, errors."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from mixbit import ops
from mixbit.ops import _reference as twin

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


@pytest.mark.parametrize("form", list(ops.GATE_FORMS))
@pytest.mark.parametrize("shared_range", [True, False])
def test_channels_with_one_choice_have_the_bits_of_shared_gates(form: str, shared_range: bool) -> None:
    x = torch.randn(6, 4, 3, 3)
    x.view(-1)[: len(SPECIAL)] = torch.tensor(SPECIAL)
    limit = torch.rand(1 if shared_range else 6) + 0.5
    grad = torch.randn_like(x)
    for shares in ((0.3, 0.8), (1.0, 0.0)):
        found = []
        for gates in (torch.tensor(shares), torch.tensor(shares)[:, None].repeat(1, 6)):
            leaves = [t.clone().requires_grad_() for t in (x, limit, gates)]
            y = ops.gated_fake_quantize(*leaves, P, signed=True, axis=0, form=form)
            y.backward(grad)
            found.append((y.detach(), *(leaf.grad for leaf in leaves)))
        assert same(found[0][0], found[1][0])
        assert same(found[0][1], found[1][1])
        if form == "residual":
            torch.testing.assert_close(found[0][2], found[1][2], rtol=1e-5, atol=1e-5, equal_nan=True)


def test_channels_of_their_own_choices_are_those_alone() -> None:
    x, limit, grad = torch.randn(5, 30), torch.rand(5) + 0.5, torch.randn(5, 30)
    gates = torch.tensor([[0.0, 1.0, 1.0, 0.4, 0.9], [1.0, 0.0, 1.0, 0.6, 0.1]], requires_grad=True)
    leaf = x.clone().requires_grad_()
    y = ops.gated_fake_quantize(leaf, limit, gates, P, signed=True, axis=0)
    y.backward(grad)
    for c, bits in ((0, 2), (1, 4), (2, 8)):
        assert torch.equal(y.detach()[c], ops.fake_quantize(x[c], limit[c : c + 1] / 2 ** (bits - 1), 0, bits))
    for c in range(5):
        own = [t.clone().requires_grad_() for t in (x[c], gates.detach()[:, c])]
        ops.gated_fake_quantize(own[0], limit[c : c + 1], own[1], P, signed=True).backward(grad[c])
        assert torch.equal(leaf.grad[c], own[0].grad)
        assert torch.equal(gates.grad[:, c], own[1].grad)


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


def same(a: Tensor, b: Tensor) -> bool:
    """Equal, NaN equal to NaN."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


SPECIAL = [0.0, -0.0, 0.25, 0.75, -1.25, 1e30, -1e30, math.inf, -math.inf, math.nan, 1e-42]
GATES = [(0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.3, 0.8)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("signed", "form"), list(itertools.product([True, False], ops.GATE_FORMS)))
@pytest.mark.parametrize(
    ("precisions", "shape", "axis"),
    [
        (P, (37,), None),
        (P, (4, 5, 33), 1),
        (P, (3, 5, 7, 2), 1),
        ((4, 8), (6, 25), -1),
        (P, (6, 3, 5, 3), 0),
        ((2, 4, 8, 16), (5, 40), -2),
        ((1, 2, 4, 8, 16), (90,), None),
    ],
)
def test_gated_equals_the_twin(
    precisions: tuple[int, ...], shape: tuple[int, ...], axis: int | None, signed: bool, form: str, dtype: torch.dtype
) -> None:
    x = torch.randn(shape) * 2
    x.view(-1)[: len(SPECIAL)] = torch.tensor(SPECIAL)
    x = x.to(dtype)
    limit = torch.rand(1 if axis is None else shape[axis]) + 0.5
    count = len(precisions) - 1
    choices = [torch.tensor((g * 2)[:count]) for g in GATES] + [torch.rand(count, shape[0])]
    for gates in choices:
        y = ops.gated_fake_quantize(x, limit, gates, precisions, signed=signed, axis=axis, form=form)
        expected = twin.gated_fake_quantize(x, limit, gates, precisions, signed=signed, axis=axis, form=form)
        assert same(y, expected)
        assert y.isnan().equal(x.isnan())


@pytest.mark.parametrize(("signed", "form"), list(itertools.product([True, False], ops.GATE_FORMS)))
@pytest.mark.parametrize("by_sample", [True, False])
@pytest.mark.parametrize(("precisions", "axis"), [(P, None), (P, 0), (P, 1), ((2, 4, 8, 16), 1), ((4, 8), 2)])
def test_gated_gradients_are_those_written_out(
    precisions: tuple[int, ...], axis: int | None, by_sample: bool, signed: bool, form: str
) -> None:
    x = torch.randn(3, 4, 50) * 1.5
    limit = torch.rand(1 if axis is None else x.shape[axis]) + 0.5
    x.view(-1)[:4] = torch.tensor([0.0, float(limit[0]), -float(limit[0]), 100.0])
    gates = torch.rand(len(precisions) - 1, 3) if by_sample else torch.rand(len(precisions) - 1)
    grad = torch.randn_like(x)
    leaves = [t.clone().requires_grad_() for t in (x, limit, gates)]
    ops.gated_fake_quantize(*leaves, precisions, signed=signed, axis=axis, form=form).backward(grad)

    levels = []
    for k in range(len(precisions)):
        opened = (torch.arange(len(precisions) - 1) < k).float()
        levels.append(twin.gated_fake_quantize(x, limit, opened, precisions, signed=signed, axis=axis, form=form))
    # sum g (Q_(j+1) - Q_j) of each sample, or of each channel where that is dimension 0, in double.
    steps = torch.stack([((b.double() - a) * grad).sum((1, 2)) for a, b in itertools.pairwise(levels)])
    z = (gates if by_sample else gates.unsqueeze(1).expand(-1, 3)).double()
    dgates = torch.zeros_like(z)
    for j in range(len(z)):
        for m in range(j, len(z)):
            others = torch.stack([z[i] for i in range(m + 1) if i != j] or [torch.ones(3, dtype=torch.float64)])
            dgates[j] += others.prod(0) * steps[m]
    torch.testing.assert_close(leaves[2].grad.double(), dgates if by_sample else dgates.sum(1), rtol=1e-4, atol=1e-4)
    bits = precisions[-1]
    low, high = (-(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1) if signed else (0.0, 2.0**bits - 1)
    v = x / twin.along(limit / (-low if signed else high), x, axis)
    inside = (v >= low) & (v <= high)
    assert torch.equal(leaves[0].grad, torch.where(inside, grad, 0.0))
    if form == "difference":
        assert leaves[1].grad is None
    else:
        code = torch.round(levels[-1] / twin.along(limit / (-low if signed else high), x, axis))
        terms = (grad * torch.where(inside, code - v, code)).double() / (-low if signed else high)
        dims = [0, 1, 2] if axis is None else [d for d in range(3) if d != axis]
        torch.testing.assert_close(leaves[1].grad.double(), terms.sum(dims).reshape(-1), rtol=1e-4, atol=1e-5)


def test_the_twins_have_the_gradients_of_the_ops() -> None:
    x, limit = torch.randn(5, 4, 20), torch.rand(4) + 0.5
    grad = torch.randn_like(x)
    for form, signed in itertools.product(ops.GATE_FORMS, (True, False)):
        found = []
        for function in (ops.gated_fake_quantize, twin.gated_fake_quantize):
            given = [t.clone().requires_grad_() for t in (x, limit, torch.tensor([[0.3] * 5, [0.8] * 5]))]
            function(*given, P, signed=signed, axis=1, form=form).backward(grad)
            found.append([torch.zeros(1) if t.grad is None else t.grad for t in given])
        for got, want in zip(*found, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    scales, weights, bits = torch.rand(3, 4) + 0.05, torch.rand(3), torch.tensor([2.0, 4.0, 8.0])
    found = []
    for function in (ops.mixture_fake_quantize, twin.mixture_fake_quantize):
        given = [t.clone().requires_grad_() for t in (x, scales, weights)]
        function(*given, bits, signed=True, axis=1).backward(grad)
        found.append([t.grad for t in given])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(("count", "axis"), [(1, None), (2, 1), (3, None), (3, 0), (9, -1)])
def test_mixtures_equal_the_twin(count: int, axis: int | None, signed: bool, dtype: torch.dtype) -> None:
    x = torch.randn(6, 5, 33) * 2
    x.view(-1)[: len(SPECIAL)] = torch.tensor(SPECIAL)
    x = x.to(dtype)
    bits = torch.arange(2, 2 + count).float()
    weights = torch.randn(count)
    weights[0] = 0.0 if count > 1 else 1.0
    for scales in [torch.rand(count) + 0.05] + ([torch.rand(count, x.shape[axis]) + 0.05] if axis is not None else []):
        y = ops.mixture_fake_quantize(x, scales, weights, bits, signed=signed, axis=axis)
        assert same(y, twin.mixture_fake_quantize(x, scales, weights, bits, signed=signed, axis=axis))


def layouts(x: Tensor) -> dict[str, Tensor]:
    return {
        "contiguous": x,
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "transposed": x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        "strided": torch.randn(4, 6, 8, 14)[:, :, ::2, ::2].copy_(x),
        "expanded": x[:1].expand(4, 6, 4, 7),
    }


LAYOUTS = ["contiguous", "channels_last", "transposed", "strided", "expanded"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("by_sample", "axis"), [(False, None), (False, 0), (False, 1), (True, None), (True, 0), (True, 1), (True, 3)]
)
def test_any_layout_gives_the_same_values_and_gradients(layout: str, by_sample: bool, axis: int | None) -> None:
    x = layouts(torch.randn(4, 6, 4, 7))[layout].detach()
    limit = torch.rand(1 if axis is None else x.shape[axis]) + 0.5
    gates = torch.rand(2, 4) if by_sample else torch.rand(2)
    grad = torch.randn_like(x)
    results = []
    for value in (x, x.contiguous()):
        leaf = value.clone(memory_format=torch.preserve_format).requires_grad_()
        r, z = limit.clone().requires_grad_(), gates.clone().requires_grad_()
        y = ops.gated_fake_quantize(leaf, r, z, P, signed=True, axis=axis, form="residual")
        y.backward(grad)
        results.append((y.detach(), leaf.grad, r.grad, z.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    torch.testing.assert_close(results[0][2], results[1][2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(results[0][3], results[1][3], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(0,), (3, 0, 2), (0, 4), ()])
def test_empty_and_scalar_tensors(shape: tuple[int, ...]) -> None:
    for by_sample in [False, *([True] if shape else [])]:
        x = torch.randn(shape).requires_grad_()
        gates = (torch.rand(2, shape[0]) if by_sample else torch.rand(2)).requires_grad_()
        limit = torch.ones(1, requires_grad=True)
        y = ops.gated_fake_quantize(x, limit, gates, P, signed=True, form="residual")
        assert y.shape == shape
        y.sum().backward()
        assert x.grad.shape == shape
        assert gates.grad.shape == gates.shape
        assert limit.grad.shape == (1,)
    x = torch.randn(shape).requires_grad_()
    weights = torch.ones(2, requires_grad=True)
    ops.mixture_fake_quantize(x, torch.ones(2), weights, torch.tensor([2.0, 4.0]), signed=True).sum().backward()
    assert weights.grad.shape == (2,)


def test_sums_have_the_same_bits_for_any_number_of_threads() -> None:
    x, grad = torch.randn(7, 20_001), torch.randn(7, 20_001)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        leaves = [torch.tensor([1.5], requires_grad=True), torch.rand(2, 7, generator=torch.Generator().manual_seed(1))]
        leaves[1].requires_grad_()
        ops.gated_fake_quantize(x, *leaves, P, signed=False, form="residual").backward(grad)
        found.append([t.grad for t in leaves])
    torch.set_num_threads(1)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_opcheck(requires_grad: bool, layout: str) -> None:
    def leaf(t: Tensor) -> Tensor:
        return t.detach().requires_grad_(requires_grad)

    x = leaf(layouts(torch.randn(4, 6, 4, 7))[layout])
    every, shares = torch.rand(2), torch.rand(2, 4)
    for form, gates, axis in ((0, every, 1), (1, shares, None), (1, shares, 1), (0, shares, 0), (1, shares, 0)):
        limit = leaf(torch.rand(1 if axis is None else x.shape[axis]) + 0.5)
        keywords = {"signed": True, "axis": axis, "form": form}
        opcheck(torch.ops.mixbit.gated_fake_quantize.default, (x, limit, leaf(gates), [2, 4, 8]), keywords)
    arguments = (x, leaf(torch.rand(2, 6) + 0.1), leaf(torch.rand(2)), torch.tensor([2.0, 4.0]))
    opcheck(torch.ops.mixbit.mixture_fake_quantize.default, arguments, {"signed": False, "axis": 1})
    for noise in (torch.rand(2), torch.rand(2, 5)):
        opcheck(torch.ops.mixbit.sample_gates.default, (leaf(torch.randn(2)), noise, 0.5), {})
    for form in (0, 1, 2):
        arguments = (leaf(torch.randn(3, 2)), leaf(torch.randn(3, 1)), torch.rand(3, 3, 2), form)
        opcheck(torch.ops.mixbit.expected_cost.default, arguments, {})


def test_opcheck_of_the_backwards() -> None:
    x = torch.randn(3, 4)
    for mask in ([True, True, True], [False, True, False], [True, False, False], [False, False, True]):
        arguments = (x, x, torch.rand(4) + 0.1, torch.rand(2, 3), [2, 4, 8])
        keywords = {"signed": True, "axis": 1, "form": 1, "output_mask": mask}
        opcheck(torch.ops.mixbit._gated_fake_quantize_backward.default, arguments, keywords)
        arguments = (x, x, torch.rand(2) + 0.1, torch.rand(2), torch.tensor([2.0, 4.0]))
        keywords = {"signed": True, "axis": None, "output_mask": mask}
        opcheck(torch.ops.mixbit._mixture_fake_quantize_backward.default, arguments, keywords)
    opcheck(torch.ops.mixbit._sample_gates_backward.default, (torch.rand(2, 5), torch.randn(2), torch.rand(2, 5), 0.5))
    arguments = (torch.tensor(1.0), torch.randn(3, 2), torch.randn(3, 1), torch.rand(3, 3, 2), 2, 0.5)
    opcheck(torch.ops.mixbit._expected_cost_backward.default, arguments)


def test_a_search_step_compiles_as_one_graph() -> None:
    x, noise = torch.randn(4, 3, 5), torch.rand(2, 4)
    values = torch.rand(1, 3, 3)

    def step(x: Tensor, logits: Tensor, limit: Tensor, scales: Tensor, weights: Tensor) -> Tensor:
        gates = ops.sample_gates(logits, noise, 0.5)
        y = ops.gated_fake_quantize(x, limit, gates, P, signed=True)
        y = y + ops.mixture_fake_quantize(x, scales, weights, torch.tensor([2.0, 4.0]), signed=True)
        penalty = ops.expected_cost(logits.unsqueeze(0), logits.unsqueeze(0), values, "expected")
        return y.square().sum() + penalty

    found = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        generator = torch.Generator().manual_seed(3)
        leaves = [
            x.clone(),
            torch.randn(2, generator=generator),
            torch.ones(1),
            torch.rand(2, generator=generator) + 0.1,
        ]
        leaves.append(torch.rand(2, generator=generator))
        for t in leaves:
            t.requires_grad_()
        loss = function(*leaves)
        loss.backward()
        found.append([loss.detach(), *(t.grad for t in leaves if t.grad is not None)])
    assert len(found[0]) == len(found[1]) == 5
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("form", list(ops.COST_FORMS))
def test_costs_and_their_gradients_equal_the_twin(form: str) -> None:
    act, weight, values = torch.randn(7, 2), torch.randn(7, 3), torch.rand(7, 3, 4, dtype=torch.float64)
    act[0] = math.inf
    found = []
    for function in (ops.expected_cost, twin.expected_cost):
        leaves = [act.clone().requires_grad_(), weight.clone().requires_grad_()]
        total = function(*leaves, values, form, 2 / 3)
        total.backward()
        found.append([total.detach(), *(t.grad for t in leaves)])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


def test_expected_cost_of_hard_gates_is_the_table() -> None:
    values = torch.rand(2, 3, 3)
    hard = torch.tensor([[-math.inf, -math.inf], [math.inf, -math.inf], [math.inf, math.inf]])
    for a, w in itertools.product(range(3), range(3)):
        total = ops.expected_cost(hard[a].expand(2, 2), hard[w].expand(2, 2), values, "expected")
        assert float(total) == pytest.approx(float(values[:, a, w].double().sum()), rel=1e-6)


def test_double_backward_and_forward_mode_are_refused() -> None:
    x, gates = torch.randn(5, requires_grad=True), torch.rand(2, requires_grad=True)
    grad = torch.ones(5, requires_grad=True)
    (dx,) = torch.autograd.grad(gated(x, gates, signed=True), x, grad, create_graph=True)
    with pytest.raises(RuntimeError, match="not implemented"):
        dx.sum().backward()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(torch.randn(5), torch.ones(5))
        with pytest.raises(RuntimeError, match="jvp is not implemented"):
            gated(dual, gates.detach(), signed=True)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"x": torch.ones(3, dtype=torch.int32)}, "x has dtype Int: expected float32, float16 or bfloat16"),
        ({"scale_range": torch.tensor([0.0])}, r"scale_range\[0\]=0: expected a positive finite number"),
        ({"scale_range": torch.tensor([math.nan])}, "expected a positive finite number"),
        ({"scale_range": torch.ones(2)}, r"scale_range has shape \[2\]: expected \[1\]"),
        ({"gates": torch.ones(3)}, r"gates has shape \[3\]: expected \[2\] or \[2, 4\]"),
        ({"gates": torch.ones(2, 3)}, r"gates has shape \[2, 3\]: expected \[2\] or \[2, 4\]"),
        ({"gates": torch.tensor([0.5, 1.5])}, r"gates\[1\]=1.5: expected a number from 0 to 1"),
        ({"gates": torch.tensor([math.nan, 1.0])}, "expected a number from 0 to 1"),
        ({"gates": torch.ones(2, dtype=torch.float64)}, "gates has dtype Double: expected float32"),
        ({"precisions": (4,)}, r"precisions=\[4\]: expected two bit-widths or more"),
        ({"precisions": (4, 2, 8)}, r"precisions=\[4, 2, 8\]: expected ascending"),
        ({"precisions": (2, 4, 17)}, r"precisions\[2\]=17: expected a whole number from 1 to 16"),
        ({"precisions": (2, 3, 8), "signed": False, "form": "residual"}, "to be a multiple of the one before"),
        ({"axis": 2}, "axis=2 is out of range"),
        ({"axis": 0, "gates": torch.ones(2, 3)}, r"gates has shape \[2, 3\]: expected \[2\] or \[2, 4\]"),
        ({"form": "residuals"}, "form='residuals' is not known: expected one of 'difference', 'residual'"),
        ({"gates": torch.ones(2, device="meta")}, "gates is on meta and x on cpu: expected one device"),
    ],
)
def test_bad_arguments_of_gated_are_named(change: dict, complaint: str) -> None:
    given = {"x": torch.randn(4, 4), "scale_range": torch.ones(1), "gates": torch.ones(2), "precisions": P, **change}
    with pytest.raises(ValueError, match=complaint):
        ops.gated_fake_quantize(**{"signed": True, **given})


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"scales": torch.ones(3)}, r"scales has shape \[3\]: expected \[2\]"),
        ({"scales": torch.tensor([1.0, -1.0])}, r"scales\[1\]=-1: expected a positive finite number"),
        ({"weights": torch.ones(3)}, r"weights is Float \[3\]: expected float32 \[2\]"),
        ({"weights": torch.ones(2, dtype=torch.float64)}, "weights is Double"),
        ({"bit_widths": torch.tensor([2.0, 3.5])}, r"bit_widths\[1\]=3.5: expected a whole number from 1 to 16"),
        ({"bit_widths": torch.ones(0), "scales": torch.ones(0), "weights": torch.ones(0)}, "expected 1 to 16"),
        ({"axis": 5}, "axis=5 is out of range"),
    ],
)
def test_bad_arguments_of_mixtures_are_named(change: dict, complaint: str) -> None:
    bits = torch.tensor([2.0, 4.0])
    given = {"x": torch.randn(4, 4), "scales": torch.ones(2), "weights": torch.ones(2), "bit_widths": bits, **change}
    with pytest.raises(ValueError, match=complaint):
        ops.mixture_fake_quantize(**given, signed=True)


@pytest.mark.parametrize(
    ("logits", "noise", "temperature", "complaint"),
    [
        (torch.ones(2, 1), torch.ones(2), 0.5, r"gate_logits is Float \[2, 1\]: expected float32 \[gates\]"),
        (torch.ones(2), torch.ones(3), 0.5, r"noise is Float \[3\]: expected float32 \[2\] or \[2, samples\]"),
        (torch.ones(2), torch.ones(2).double(), 0.5, "noise is Double"),
        (torch.ones(2), torch.ones(2), 0.0, "temperature=0: expected a positive finite number"),
    ],
)
def test_bad_arguments_of_gates_are_named(logits: Tensor, noise: Tensor, temperature: float, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        ops.sample_gates(logits, noise, temperature)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"values": torch.ones(2, 3)}, r"values is Float \[2, 3\]: expected float32 or float64 \[layers"),
        ({"act_logits": torch.ones(2, 3)}, r"act_logits is Float \[2, 3\]: expected float32 \[2, 2\]"),
        ({"weight_logits": torch.ones(1, 2)}, r"weight_logits is Float \[1, 2\]: expected float32 \[2, 2\]"),
        ({"form": "join"}, "form='join' is not known: expected one of 'expected', 'separate', 'joint'; did you mean"),
        ({"temperature": -1.0}, "temperature=-1: expected a positive finite number"),
    ],
)
def test_bad_arguments_of_costs_are_named(change: dict, complaint: str) -> None:
    logits = torch.zeros(2, 2)
    given = {"act_logits": logits, "weight_logits": logits, "values": torch.ones(2, 3, 3), "form": "joint", **change}
    with pytest.raises(ValueError, match=complaint):
        ops.expected_cost(**given)
