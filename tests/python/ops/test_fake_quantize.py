"""fake_quantize: forward bitwise against its twin, gradients against the written-out ones, layouts, dtypes, errors."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from mixbit import ops
from mixbit.ops import _reference as twin

GRIDS = [
    {"signed": s, "narrow_range": n, "rounding": r}
    for s, n, r in itertools.product([True, False], [True, False], ["half_even", "half_up"])
]
SPECIAL = [0.0, -0.0, 0.25, 0.75, -0.25, -1.25, 1e30, -1e30, math.inf, -math.inf, math.nan, 1e-42]


def tensors(shape: tuple[int, ...], axis: int | None) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(shape) * 2
    channels = 1 if axis is None else shape[axis]
    return x, torch.rand(channels) * 0.4 + 0.1, torch.randint(-3, 4, (channels,)).float()


def same(a: Tensor, b: Tensor) -> bool:
    """Equal, NaN equal to NaN."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize(("shape", "axis"), [((37,), None), ((4, 5, 33), 0), ((3, 5, 7, 2), 1), ((6, 5), -1)])
def test_forward_equals_the_twin_bit_by_bit(grid: dict, bits: int, shape: tuple[int, ...], axis: int | None) -> None:
    x, scale, zero_point = tensors(shape, axis)
    x.view(-1)[: len(SPECIAL)] = torch.tensor(SPECIAL)
    bit_width = torch.tensor([float(bits)])
    y = ops.fake_quantize(x, scale, zero_point, bit_width, axis=axis, **grid)
    expected = twin.fake_quantize(x, scale, zero_point, bit_width, axis=axis, **grid)
    assert same(y, expected)
    assert y.isnan().equal(x.isnan())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_compute_in_float32(dtype: torch.dtype) -> None:
    x = torch.randn(1000).to(dtype)
    y = ops.fake_quantize(x, torch.tensor([0.1]), 0, 6)
    assert same(y, twin.fake_quantize(x.float(), torch.tensor([0.1]), torch.zeros(1), torch.tensor([6.0])).to(dtype))


def layouts(x: Tensor) -> dict[str, Tensor]:
    return {
        "contiguous": x,
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "transposed": x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        "strided": torch.randn(4, 6, 8, 14)[:, :, ::2, ::2].copy_(x),
        "expanded": x[:1].expand(4, 6, 4, 7),
    }


@pytest.mark.parametrize("axis", [None, 0, 1, 3])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "strided", "expanded"])
def test_any_layout_gives_the_same_values_and_gradients(layout: str, axis: int | None) -> None:
    x = layouts(torch.randn(4, 6, 4, 7))[layout].detach()
    _, scale, zero_point = tensors(tuple(x.shape), axis)
    grad = torch.randn_like(x)
    results = []
    for value in (x, x.contiguous()):
        leaf, s = value.clone(memory_format=torch.preserve_format).requires_grad_(), scale.clone().requires_grad_()
        y = ops.fake_quantize(leaf, s, zero_point, 4, axis=axis)
        y.backward(grad)
        results.append((y.detach(), leaf.grad, s.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    torch.testing.assert_close(results[0][2], results[1][2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("axis", [None, 1])
def test_gradients_are_those_written_out(grid: dict, axis: int | None) -> None:
    x, scale, zero_point = tensors((3, 4, 50), axis)
    # Some values on and next to the ends of the grid.
    x.view(-1)[:6] = torch.tensor([0.0, 0.7, -0.8, 3.5, -4.0, 100.0])
    leaves = [t.clone().requires_grad_() for t in (x, scale, zero_point)]
    bit_width = torch.tensor([4.0])
    grad = torch.randn_like(x)
    ops.fake_quantize(*leaves, bit_width, axis=axis, **grid).backward(grad)

    s, z = (twin.along(t, x, axis).double() for t in (scale, zero_point))
    low, high = (float(r) for r in twin.quant_range(bit_width, grid["signed"], grid["narrow_range"]))
    ratio = (x / s.float()).double()
    v = ratio + z
    code = (torch.round(ratio) if grid["rounding"] == "half_even" else torch.floor(ratio + 0.5)) + z
    q = code.clamp(low, high)
    inside = (v >= low) & (v <= high)
    dx = torch.where(inside, grad, 0.0)
    dscale = grad * torch.where(inside, q - v, q - z)
    dzero = torch.where(inside, 0.0, -grad * s)
    dims = [0, 1, 2] if axis is None else [0, 2]
    assert torch.equal(leaves[0].grad, dx)
    torch.testing.assert_close(leaves[1].grad.double(), dscale.sum(dims).reshape(-1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(leaves[2].grad.double(), dzero.sum(dims).reshape(-1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("axis", [None, 1])
def test_gradients_of_clipping_are_those_written_out(grid: dict, axis: int | None, dtype: torch.dtype) -> None:
    x, scale, zero_point = tensors((3, 4, 50), axis)
    bit_width = torch.tensor([4.0])
    low, high = (float(r) for r in twin.quant_range(bit_width, grid["signed"], grid["narrow_range"]))
    lower, upper = ((end - twin.along(zero_point, x, axis)) * twin.along(scale, x, axis) for end in (low, high))
    # Some values at the ends and next to them.
    x[:, :, 0], x[:, :, 1], x[:, :, 2:4] = lower[0, :, 0], upper[0, :, 0], torch.tensor([1e4, -1e4])
    x[:, :, 4] = torch.nextafter(upper, torch.tensor(-math.inf))[0, :, 0]
    x[:, :, 5] = torch.nextafter(lower, torch.tensor(-math.inf))[0, :, 0]
    x = x.to(dtype)
    leaves = [t.clone().requires_grad_() for t in (x, scale, zero_point)]
    others = [t.clone().requires_grad_() for t in (x, scale, zero_point)]
    grad = torch.randn_like(x)
    y = ops.fake_quantize(*leaves, bit_width, axis=axis, gradient="clip", **grid)
    y.backward(grad)
    assert torch.equal(y, ops.fake_quantize(x, scale, zero_point, bit_width, axis=axis, **grid))
    twin.fake_quantize(*others, bit_width, axis=axis, gradient="clip", **grid).backward(grad)

    x, g = x.float(), grad.double()
    above, below = x >= upper, x < lower
    if dtype == torch.float32:
        assert above[:, :, 1].all()
        assert not below[:, :, 0].any()
        assert not above[:, :, 4].any()
        assert below[:, :, 5].all()
    z = twin.along(zero_point, x, axis).double()
    dscale = g * torch.where(above, high - z, torch.where(below, low - z, 0.0))
    dzero = torch.where(above | below, -g * twin.along(scale, x, axis), 0.0)
    dims = [0, 1, 2] if axis is None else [0, 2]
    assert torch.equal(leaves[0].grad, torch.where(above | below, 0.0, grad))
    assert torch.equal(leaves[0].grad, others[0].grad)
    for i, expected in ((1, dscale), (2, dzero)):
        torch.testing.assert_close(leaves[i].grad.double(), expected.sum(dims).reshape(-1), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(leaves[i].grad, others[i].grad, rtol=1e-2, atol=1e-2)


def test_gradients_of_clipping_at_infinities_and_nan() -> None:
    for value, dscale in ((math.inf, 15.0), (-math.inf, 0.0), (math.nan, math.nan)):
        x, scale = torch.tensor([value], requires_grad=True), torch.tensor([0.5], requires_grad=True)
        ops.fake_quantize(x, scale, 0, 4, signed=False, gradient="clip").sum().backward()
        assert x.grad.tolist() == [0.0]
        assert same(scale.grad, torch.tensor([dscale]))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "strided", "expanded"])
@pytest.mark.parametrize("axis", [None, 0, 1, -1])
def test_clipping_with_a_fixed_scale_and_over_its_gradient(layout: str, axis: int | None) -> None:
    x = layouts(torch.randn(4, 6, 4, 7))[layout].detach()
    _, scale, zero_point = tensors(tuple(x.shape), axis)
    grad = torch.randn_like(x)
    options = {"axis": axis, "gradient": "clip"}
    leaves = [x.clone(memory_format=torch.preserve_format).requires_grad_() for _ in range(2)]
    ops.fake_quantize(leaves[0], scale, zero_point, 3, **options).backward(grad)
    ops.fake_quantize(leaves[1], scale.clone().requires_grad_(), zero_point, 3, **options).backward(grad)
    assert torch.equal(leaves[0].grad, leaves[1].grad)
    keywords = {"signed": True, "narrow_range": False, "axis": axis, "rounding": 0, "group_size": None, "gradient": 1}
    given = (x, scale, zero_point, torch.tensor([3.0]))
    expected = torch.ops.mixbit._fake_quantize_backward(grad, *given, **keywords, output_mask=[True, True, True])
    over = grad.clone()
    sums = torch.ops.mixbit._fake_quantize_backward_(over, *given, **keywords, output_mask=[True, True])
    assert torch.equal(expected[0], leaves[0].grad)
    assert torch.equal(over, expected[0])
    assert torch.equal(sums[0], expected[1])
    assert torch.equal(sums[1], expected[2])


def test_opcheck_of_clipping() -> None:
    x, scale, zero, bits = torch.randn(3, 4), torch.rand(3) + 0.1, torch.zeros(3), torch.tensor([4.0])
    keywords = {"signed": True, "narrow_range": False, "axis": 0, "rounding": 0, "group_size": None, "gradient": 1}
    learned = [t.clone().requires_grad_() for t in (x, scale, zero)]
    opcheck(torch.ops.mixbit.fake_quantize.default, (*learned, bits), {"axis": 0, "gradient": 1})
    opcheck(torch.ops.mixbit.fake_quantize.default, (learned[0], scale, zero, bits), {"axis": 0, "gradient": 1})
    given = (torch.randn(3, 4), x, scale, zero, bits)
    backward = torch.ops.mixbit._fake_quantize_backward
    opcheck(backward.default, given, {**keywords, "output_mask": [True, True, False]})
    over = torch.ops.mixbit._fake_quantize_backward_.default
    opcheck(over, (given[0].clone(), *given[1:]), {**keywords, "output_mask": [True, False]})
    opcheck(torch.ops.mixbit._fake_quantize_mask.default, (x, scale, zero, bits), keywords)


def test_one_scale_broadcasts_against_channels() -> None:
    x, _, _ = tensors((4, 5), 0)
    scale = torch.tensor([0.2], requires_grad=True)
    bits = torch.tensor([2.0, 3.0, 4.0, 8.0])
    y = ops.fake_quantize(x, scale, 0, bits, axis=0)
    for row, b in enumerate(bits):
        assert torch.equal(y[row], ops.fake_quantize(x[row], scale, 0, float(b)))
    y.sum().backward()
    assert scale.grad.shape == (1,)


def test_reductions_have_the_same_bits_for_any_number_of_threads() -> None:
    x, grad = torch.randn(100_003), torch.randn(100_003)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        scale = torch.tensor([0.1], requires_grad=True)
        ops.fake_quantize(x, scale, 0, 4).backward(grad)
        noise = ops.quantization_noise(x, torch.tensor([0.1]), torch.tensor([4.0]), signed=True, narrow_range=False)[1]
        histogram = ops.observe(x, bins=64)[4]
        found.append((scale.grad.clone(), noise, histogram))
    torch.set_num_threads(1)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@given(
    st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=40),
    st.floats(2.0**-6, 4.0, width=32),
    st.integers(2, 8),
    st.booleans(),
)
def test_properties(values: list[float], scale: float, bits: int, signed: bool) -> None:
    x, s = torch.tensor(values), torch.tensor([scale])
    y = ops.fake_quantize(x, s, 0, bits, signed=signed)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    assert torch.equal(ops.fake_quantize(y, s, 0, bits, signed=signed), y)  # idempotent
    codes = y / s
    assert ((codes - codes.round()).abs() < 1e-4).all()  # on the grid, up to the rounding of y / s
    assert codes.round().min() >= low
    assert codes.round().max() <= high
    inside = (x / s >= low) & (x / s <= high)
    assert ((y - x).abs()[inside] <= scale / 2 * (1 + 1e-5)).all()
    order = x.argsort()
    assert (y[order].diff() >= 0).all()  # monotone


@pytest.mark.parametrize("shape", [(0,), (3, 0, 2), ()])
def test_empty_and_scalar_tensors(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape).requires_grad_()
    scale = torch.tensor([0.5], requires_grad=True)
    y = ops.fake_quantize(x, scale, 0, 4)
    assert y.shape == shape
    y.sum().backward()
    assert x.grad.shape == shape
    assert scale.grad.shape == (1,)


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("axis", [None, 1])
def test_opcheck(requires_grad: bool, layout: str, axis: int | None) -> None:
    x = layouts(torch.randn(4, 6, 4, 7))[layout].detach().requires_grad_(requires_grad)
    channels = 1 if axis is None else 6
    scale = torch.full((channels,), 0.3).requires_grad_(requires_grad)
    zero = torch.zeros(1).requires_grad_(requires_grad)
    keywords = {"signed": True, "narrow_range": True, "axis": axis}
    opcheck(torch.ops.mixbit.fake_quantize.default, (x, scale, zero, torch.tensor([4.0])), keywords)


def test_opcheck_of_the_backward() -> None:
    arguments = (torch.randn(3, 4), torch.randn(3, 4), torch.rand(3) + 0.1, torch.zeros(3), torch.tensor([4.0]))
    keywords = {"signed": True, "narrow_range": False, "axis": 0, "rounding": 0, "group_size": None}
    for mask in ([True, True, True], [False, True, False], [True, False, False]):
        opcheck(torch.ops.mixbit._fake_quantize_backward.default, arguments, {**keywords, "output_mask": mask})


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "strided", "expanded"])
@pytest.mark.parametrize("axis", [None, 0, 1, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fixed_scale_saves_one_bit_an_element(layout: str, axis: int | None, dtype: torch.dtype) -> None:
    x = layouts(torch.randn(4, 6, 4, 7).to(dtype))[layout].detach()
    _, scale, zero_point = tensors(tuple(x.shape), axis)
    grad = torch.randn_like(x)
    saved: list[int] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t.numel() * t.element_size())
        return t

    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = ops.fake_quantize(leaf, scale, zero_point, 3, axis=axis)
    y.backward(grad)
    other = x.clone(memory_format=torch.preserve_format).requires_grad_()
    z = ops.fake_quantize(other, scale.clone().requires_grad_(), zero_point, 3, axis=axis)
    z.backward(grad)
    assert torch.equal(y, z)
    assert torch.equal(leaf.grad, other.grad)
    assert leaf.grad.stride() == other.grad.stride()
    # A row of the walk starts at a byte of its own: at most 7 bits are lost a row.
    assert sum(saved) <= x.numel() / 8 + x.numel() / 16
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(ops.fake_quantize(leaf, scale, zero_point, 3, axis=axis), z)


def test_opcheck_of_the_mask() -> None:
    for axis, layout in ((None, "contiguous"), (1, "channels_last"), (0, "transposed"), (-1, "contiguous")):
        x = layouts(torch.randn(4, 6, 4, 7))[layout].detach()
        channels = 1 if axis is None else x.shape[axis]
        arguments = (x, torch.rand(channels) + 0.1, torch.zeros(1), torch.tensor([4.0]))
        keywords = {"signed": True, "narrow_range": False, "axis": axis, "rounding": 0, "group_size": None}
        opcheck(torch.ops.mixbit._fake_quantize_mask.default, arguments, keywords)
        y, mask = torch.ops.mixbit._fake_quantize_mask(*arguments, **keywords)
        opcheck(torch.ops.mixbit._fake_quantize_mask_backward.default, (x, mask, y.stride()), {"axis": axis})
        leaf = x.clone().requires_grad_()
        opcheck(torch.ops.mixbit.fake_quantize.default, (leaf, *arguments[1:]), {"axis": axis})
    with pytest.raises(ValueError, match=r"mask is Byte \[1\]: expected what _fake_quantize_mask returned"):
        torch.ops.mixbit._fake_quantize_mask_backward(x, mask[:1], y.stride(), axis=None)


def test_the_backward_over_its_gradient() -> None:
    for axis in (None, 0, 1):
        x, scale, zero_point = tensors((4, 6, 5, 7), axis)
        grad = torch.randn_like(x)
        keywords = {"signed": True, "narrow_range": False, "axis": axis, "rounding": 0, "group_size": None}
        given = (x, scale, zero_point, torch.tensor([3.0]))
        expected = torch.ops.mixbit._fake_quantize_backward(grad, *given, **keywords, output_mask=[True, True, True])
        over = grad.clone(memory_format=torch.channels_last)  # another layout than x: still the same values
        for g in (grad.clone(), over):
            sums = torch.ops.mixbit._fake_quantize_backward_(g, *given, **keywords, output_mask=[True, True])
            assert torch.equal(g, expected[0])
            assert torch.equal(sums[0], expected[1])
            assert torch.equal(sums[1], expected[2])
        checked = (grad.clone(), *given)
        opcheck(torch.ops.mixbit._fake_quantize_backward_.default, checked, {**keywords, "output_mask": [True, False]})


def test_large_outputs_take_the_way_past_the_cache() -> None:
    x = torch.randn(8 * 1024 * 1024 - 5)  # just below 32 MiB, where it is used on every machine whose cache is smaller
    scale = torch.tensor([0.3], requires_grad=True)
    leaf = x.clone().requires_grad_()
    y = ops.fake_quantize(leaf, scale, 0, 4)
    y.backward(torch.ones_like(y))
    assert torch.equal(y, twin.fake_quantize(x, scale, torch.zeros(1), torch.tensor([4.0])))
    assert torch.equal(leaf.grad, ((x / scale >= -8) & (x / scale <= 7)).float())


def test_devices_that_differ_are_named() -> None:
    meta = torch.empty(1, device="meta")
    with pytest.raises(ValueError, match="scale is on meta and x on cpu: expected one device"):
        ops.fake_quantize(torch.randn(3), meta, 0, 4)
    with pytest.raises(ValueError, match="bit_width is on cpu and x on meta"):
        ops.fake_quantize(torch.empty(3, device="meta"), meta, 0, torch.ones(1))


@pytest.mark.parametrize("grad_mode", [True, False])
def test_forward_mode_is_refused_and_not_dropped(grad_mode: bool) -> None:
    x, tangent = torch.randn(4), torch.ones(4)
    with torch.autograd.forward_ad.dual_level(), torch.set_grad_enabled(grad_mode):
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        with pytest.raises(RuntimeError, match="jvp is not implemented"):
            ops.fake_quantize(dual, torch.tensor([0.5]), 0, 4)


def test_double_backward_is_refused() -> None:
    x = torch.randn(5, requires_grad=True)
    for requires_grad in (True, False):
        scale = torch.tensor([0.3], requires_grad=requires_grad)
        grad = torch.ones(5, requires_grad=True)
        (dx,) = torch.autograd.grad(ops.fake_quantize(x, scale, 0, 4), x, grad, create_graph=True)
        with pytest.raises(RuntimeError, match="not implemented"):
            dx.sum().backward()


def test_numbers_of_gradients_are_checked() -> None:
    x, one, bits = torch.randn(3), torch.ones(1), torch.full((1,), 4.0)
    with pytest.raises(ValueError, match=r"gradient=2 is not known: expected 0 \(learned_step\) or 1 \(clip\)"):
        torch.ops.mixbit.fake_quantize(x, one, 0 * one, bits, gradient=2)
    with pytest.raises(ValueError, match="w_gradient=-1 is not known"):
        torch.ops.mixbit.quantized_linear(
            x.reshape(1, 3), x.reshape(1, 3), None, one, 0 * one, bits, one, bits, signed_x=True, w_gradient=-1
        )


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"scale": torch.tensor([0.0])}, r"scale\[0\]=0: expected a positive finite number"),
        ({"scale": torch.tensor([-1.0])}, "expected a positive finite number"),
        ({"scale": torch.tensor([math.nan])}, "expected a positive finite number"),
        ({"scale": torch.tensor(0.1)}, r"scale has shape \[\]: expected \[1\]"),
        ({"scale": torch.ones(2)}, r"scale has shape \[2\]: expected \[1\]"),
        ({"scale": torch.ones(1, dtype=torch.float64)}, "scale has dtype Double: expected float32"),
        ({"bit_width": 0}, r"bit_width\[0\]=0: expected a whole number from 1 to 16"),
        ({"bit_width": 17}, "expected a whole number from 1 to 16"),
        ({"bit_width": 3.5}, "expected a whole number"),
        ({"bit_width": torch.ones(3) * 4}, r"bit_width has shape \[3\]"),
        ({"bit_width": 1, "narrow_range": True}, "leaves only the level 0"),
        ({"x": torch.ones(3, dtype=torch.int32)}, "x has dtype Int: expected float32, float16 or bfloat16"),
        ({"axis": 2}, "axis=2 is out of range"),
        ({"rounding": "up"}, "rounding='up' is not known"),
        ({"gradient": "clips"}, "gradient='clips' is not known.*clip"),
        ({"group_size": 32}, "group_size=32 is reserved"),
    ],
)
def test_bad_arguments_are_named(change: dict, complaint: str) -> None:
    arguments = {"x": torch.randn(4, 4), "scale": torch.tensor([0.1]), "zero_point": 0, "bit_width": 4, **change}
    with pytest.raises(ValueError, match=complaint):
        ops.fake_quantize(**arguments)


@pytest.mark.slow
def test_more_than_two_to_the_31_elements() -> None:
    x = torch.empty(2**31 + 10, dtype=torch.bfloat16).fill_(0.3)
    y = ops.fake_quantize(x, torch.tensor([0.25]), 0, 4)
    assert float(y[-1]) == 0.25
    assert float(y[0]) == 0.25
