"""extra_level_fake_quantize: bitwise against its twin and against fake_quantize, gradients, layouts, dtypes, errors."""

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

GRIDS = [{"narrow_range": n, "rounding": r} for n, r in itertools.product([True, False], ["half_even", "half_up"])]
SPECIAL = [0.0, -0.0, 0.25, 0.75, -0.25, -1.25, 1e30, -1e30, math.inf, -math.inf, math.nan, 1e-42]


def tensors(shape: tuple[int, ...], axis: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """x, scale and extra bits."""
    channels = 1 if axis is None else shape[axis]
    return torch.randn(shape) * 2, torch.rand(channels) * 0.4 + 0.1, torch.randint(0, 3, shape, dtype=torch.uint8)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal, NaN equal to NaN."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("bits", [2, 4, 14])
@pytest.mark.parametrize(("shape", "axis"), [((37,), None), ((4, 5, 33), 0), ((3, 5, 7, 2), 1), ((6, 5), -1)])
def test_forward_equals_the_twin_bit_by_bit(grid: dict, bits: int, shape: tuple[int, ...], axis: int | None) -> None:
    x, scale, extra = tensors(shape, axis)
    x.view(-1)[: len(SPECIAL)] = torch.tensor(SPECIAL)
    y = ops.extra_level_fake_quantize(x, scale, bits, extra, axis=axis, **grid)
    expected = twin.extra_level_fake_quantize(x, scale, torch.tensor([float(bits)]), extra, axis=axis, **grid)
    assert same(y, expected)
    assert y.isnan().equal(x.isnan())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_without_extra_bits_it_is_fake_quantize_bit_by_bit(dtype: torch.dtype, grid: dict, axis: int | None) -> None:
    x, scale, _ = tensors((5, 6, 700), axis)
    x.view(-1)[: len(SPECIAL)] = torch.tensor(SPECIAL)
    x, grad = x.to(dtype), torch.randn(x.shape).to(dtype)
    found = []
    for with_map in (True, False):
        leaf, s = x.clone().requires_grad_(), scale.clone().requires_grad_()
        if with_map:
            none = torch.zeros(x.shape, dtype=torch.uint8)
            y = ops.extra_level_fake_quantize(leaf, s, 3, none, axis=axis, **grid)
        else:
            y = ops.fake_quantize(leaf, s, 0, 3, axis=axis, **grid)
        y.backward(grad)
        found.append((y.detach(), leaf.grad, s.grad))
    assert all(same(a, b) for a, b in zip(*found, strict=True))
    assert torch.equal(torch.signbit(found[0][0]), torch.signbit(found[1][0]))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("axis", [None, 1])
def test_gradients_are_those_written_out(grid: dict, axis: int | None) -> None:
    x, scale, extra = tensors((3, 4, 50), axis)
    x.view(-1)[:6] = torch.tensor([0.0, 0.7, -0.8, 3.5, -4.0, 100.0])
    leaf, leaf_scale = x.clone().requires_grad_(), scale.clone().requires_grad_()
    grad = torch.randn_like(x)
    ops.extra_level_fake_quantize(leaf, leaf_scale, 3, extra, axis=axis, **grid).backward(grad)

    parts = 2.0 ** extra.double()
    step = twin.along(scale, x, axis) / parts.float()
    v = (x / step).double()
    high, low = 4 * parts - 1, -4 * parts + int(grid["narrow_range"])
    q = torch.round(v) if grid["rounding"] == "half_even" else torch.floor((x / step + 0.5).double())
    q = q.clamp(low, high)
    inside = (v >= low) & (v <= high)
    dscale = grad * torch.where(inside, q - v, q) / parts
    assert torch.equal(leaf.grad, torch.where(inside, grad, 0.0))
    dims = [0, 1, 2] if axis is None else [0, 2]
    torch.testing.assert_close(leaf_scale.grad.double(), dscale.sum(dims).reshape(-1), rtol=1e-4, atol=1e-4)


def test_a_fixed_scale_gives_the_same_gradient_of_x() -> None:
    x, scale, extra = tensors((4, 5, 33), 0)
    grads = []
    for learned in (True, False):
        leaf = x.clone().requires_grad_()
        s = scale.clone().requires_grad_(learned)
        ops.extra_level_fake_quantize(leaf, s, 3, extra, axis=0).sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


def test_nothing_is_copied_for_the_backward() -> None:
    x, scale, extra = tensors((8, 100), 0)
    x.requires_grad_()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        ops.extra_level_fake_quantize(x, scale.requires_grad_(), 3, extra, axis=0)
    assert {x.data_ptr(), extra.data_ptr(), scale.data_ptr()} < set(kept)
    assert len(kept) == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_compute_in_float32(dtype: torch.dtype) -> None:
    x, scale, extra = tensors((1000,), None)
    y = ops.extra_level_fake_quantize(x.to(dtype), scale, 4, extra)
    wide = twin.extra_level_fake_quantize(x.to(dtype).float(), scale, torch.tensor([4.0]), extra)
    assert same(y, wide.to(dtype))


def layouts(x: Tensor) -> dict[str, Tensor]:
    return {
        "contiguous": x,
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "transposed": x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        "strided": torch.zeros(4, 6, 8, 14, dtype=x.dtype)[:, :, ::2, ::2].copy_(x),
        "expanded": x[:1].expand(4, 6, 4, 7),
    }


@pytest.mark.parametrize("axis", [None, 0, 1, 3])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "strided", "expanded"])
@pytest.mark.parametrize("extra_layout", ["contiguous", "channels_last", "strided"])
def test_any_layouts_give_the_same(layout: str, extra_layout: str, axis: int | None) -> None:
    given, scale, extra = tensors((4, 6, 4, 7), axis)
    x = layouts(given)[layout].detach()
    bits = layouts(extra)[extra_layout]
    grad = torch.randn(x.shape)
    results = []
    for value, map_ in ((x, bits), (x.contiguous(), extra)):
        leaf, s = value.clone(memory_format=torch.preserve_format).requires_grad_(), scale.clone().requires_grad_()
        y = ops.extra_level_fake_quantize(leaf, s, 3, map_, axis=axis)
        y.backward(grad)
        results.append((y.detach(), leaf.grad, s.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    torch.testing.assert_close(results[0][2], results[1][2], rtol=1e-5, atol=1e-5)


def test_large_tensors_and_any_number_of_threads() -> None:
    x, scale, extra = tensors((100_003,), None)
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        s = scale.clone().requires_grad_()
        y = ops.extra_level_fake_quantize(x, s, 4, extra)
        y.backward(torch.ones_like(y))
        found.append((y.detach(), s.grad))
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("shape", [(0,), (3, 0, 2), ()])
def test_empty_and_scalar_tensors(shape: tuple[int, ...]) -> None:
    x, scale = torch.randn(shape).requires_grad_(), torch.tensor([0.5], requires_grad=True)
    y = ops.extra_level_fake_quantize(x, scale, 4, torch.ones(shape, dtype=torch.uint8))
    assert y.shape == shape
    y.sum().backward()
    assert x.grad.shape == shape
    assert scale.grad.shape == (1,)


@given(
    st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=40),
    st.floats(2.0**-6, 4.0, width=32),
    st.integers(2, 6),
    st.booleans(),
    st.sampled_from(["half_up", "half_even"]),
)
def test_more_levels_never_move_a_value_away(
    values: list[float], scale: float, bits: int, narrow: bool, rounding: str
) -> None:
    x, s = torch.tensor(values), torch.tensor([scale])
    grid = {"narrow_range": narrow, "rounding": rounding}
    errors, levels = [], []
    for e in range(3):
        extra = torch.full(x.shape, e, dtype=torch.uint8)
        y = ops.extra_level_fake_quantize(x, s, bits, extra, **grid)
        errors.append((x - y).abs())
        levels.append(y)
        assert torch.equal(ops.extra_level_fake_quantize(y, s, bits, extra, **grid), y)  # idempotent
    for e in (1, 2):
        assert (errors[e] <= errors[e - 1]).all()
        # The levels of the coarser grid are levels of the finer one.
        fine = torch.full(x.shape, e, dtype=torch.uint8)
        assert torch.equal(ops.extra_level_fake_quantize(levels[e - 1], s, bits, fine, **grid), levels[e - 1])


def switching(r: float, extra: int, steps: int = 20_000, skip: int = 4000, lr: float = 0.01) -> tuple[float, float]:
    """A weight whose best value lies the share r into a cell of the grid of step 1, descending (q(w) - r)^2 / 2 with
    straight-through gradients: switches a step, and the mean squared distance of the level to r."""
    w, levels = torch.zeros(1), []
    bits = torch.tensor([extra], dtype=torch.uint8)
    one = torch.ones(1)
    for _ in range(steps):
        q = torch.ops.mixbit.extra_level_fake_quantize(w, one, one * 4, bits)
        levels.append(q)
        w = w - lr * (q - r)
    late = torch.cat(levels[skip:])
    return float((late.diff() != 0).float().mean()), float((late - r).square().mean())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("r", "plain", "finer"),
    [
        (0.05, (0.0999, 0.0475), (0.1999, 0.0225)),
        (0.25, (0.5, 0.1875), (0.9999, 0.0625)),
        (0.4, (0.8, 0.24), (0.3999, 0.04)),
        (0.5, (1.0, 0.25), (0.0, 0.0)),
    ],
)
def test_the_middle_level_silences_what_switched_most(r: float, plain: tuple, finer: tuple) -> None:
    """The rates of a straight-through descent, 2 min(r, 1 - r) a step: with the level in the middle a weight at r = 1/2
    comes to rest, and r = 1/4 is the new worst case."""
    assert switching(r, 0) == pytest.approx(plain, abs=2e-3)
    assert switching(r, 1) == pytest.approx(finer, abs=2e-3)


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("axis", [None, 1])
def test_opcheck(requires_grad: bool, layout: str, axis: int | None) -> None:
    given, scale, extra = tensors((4, 6, 4, 7), axis)
    x = layouts(given)[layout].detach().requires_grad_(requires_grad)
    arguments = (x, scale.requires_grad_(requires_grad), torch.tensor([4.0]), extra)
    opcheck(torch.ops.mixbit.extra_level_fake_quantize.default, arguments, {"axis": axis, "narrow_range": True})


def test_opcheck_of_the_backward() -> None:
    x, scale, extra = tensors((3, 4), 0)
    arguments = (torch.randn(3, 4), x, scale, torch.tensor([4.0]), extra)
    keywords = {"axis": 0, "narrow_range": False, "rounding": 1}
    for mask in ([True, True], [False, True], [True, False]):
        opcheck(
            torch.ops.mixbit._extra_level_fake_quantize_backward.default, arguments, {**keywords, "output_mask": mask}
        )


def test_it_compiles_whole() -> None:
    x, scale, extra = tensors((6, 30), 0)

    def f(a: Tensor, s: Tensor) -> Tensor:
        return ops.extra_level_fake_quantize(a, s, 3, extra, axis=0).square().sum()

    results = []
    for call in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in (x, scale)]
        call(*leaves).backward()
        results.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_double_backward_is_refused() -> None:
    x, scale, extra = tensors((5,), None)
    grad = torch.ones(5, requires_grad=True)
    y = ops.extra_level_fake_quantize(x.requires_grad_(), scale, 4, extra)
    (dx,) = torch.autograd.grad(y, x, grad, create_graph=True)
    with pytest.raises(RuntimeError, match="not implemented"):
        dx.sum().backward()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"scale": torch.tensor([0.0])}, r"scale\[0\]=0: expected a positive finite number"),
        ({"scale": torch.ones(2)}, r"scale has shape \[2\]: expected \[1\]"),
        ({"bit_width": 17}, "expected a whole number from 1 to 16"),
        ({"bit_width": 1, "narrow_range": True}, "leaves only the level 0"),
        ({"bit_width": 15}, r"bit_width \+ extra_bits is 17: expected at most 16"),
        ({"extra_bits": torch.tensor([3, 0, 0], dtype=torch.uint8)}, "extra_bits holds 3: expected whole numbers"),
        ({"extra_bits": torch.zeros(3)}, r"extra_bits is Float \[3\]: expected uint8 \[3\] like x"),
        ({"extra_bits": torch.zeros(2, dtype=torch.uint8)}, r"extra_bits is Byte \[2\]: expected uint8 \[3\] like x"),
        ({"x": torch.ones(3, dtype=torch.int32)}, "x has dtype Int: expected float32, float16 or bfloat16"),
        ({"axis": 2}, "axis=2 is out of range"),
        ({"rounding": "up"}, "rounding='up' is not known"),
    ],
)
def test_bad_arguments_are_named(change: dict, complaint: str) -> None:
    arguments = {
        "x": torch.randn(3),
        "scale": torch.tensor([0.5]),
        "bit_width": 4,
        "extra_bits": torch.tensor([0, 1, 2], dtype=torch.uint8),
    }
    with pytest.raises(ValueError, match=complaint):
        ops.extra_level_fake_quantize(**{**arguments, **change})


def test_the_widest_channels_may_have_no_extra_bits() -> None:
    x, scale, extra = tensors((2, 8), 0)
    extra[1] = 0
    bits = torch.tensor([4.0, 16.0])
    y = ops.extra_level_fake_quantize(x, scale, bits, extra, axis=0)
    assert torch.equal(y[1], ops.fake_quantize(x[1], scale[1:], 0, 16, rounding="half_up"))
    extra[1, 3] = 1
    with pytest.raises(ValueError, match=r"bit_width \+ extra_bits is 17"):
        ops.extra_level_fake_quantize(x, scale, bits, extra, axis=0)
