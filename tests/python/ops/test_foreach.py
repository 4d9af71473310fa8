"""List forms: bit for bit the single ops, in one call; every ISA, layout, dtype, and the backward."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from mixbit import ops

SHAPES = [(6, 3, 3, 3), (8, 40), (5,), (0, 4), (70, 1000), (4, 2, 1, 1)]


def weights(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
    tensors[0] = tensors[0].contiguous(memory_format=torch.channels_last)
    tensors[1] = tensors[1].t().contiguous().t()
    return tensors


def grids(xs: list[torch.Tensor], per_channel: bool) -> list[list[torch.Tensor]]:
    scales = [torch.linspace(0.1, 0.3, x.shape[0]) if per_channel and x.shape[0] else torch.tensor([0.2]) for x in xs]
    bits = [torch.tensor([float(2 + i % 4)]) for i in range(len(xs))]
    return [scales, [torch.zeros(1) for _ in xs], bits]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("gradient", ["learned_step", "clip"])
def test_fake_quantize_equals_the_single_op_forward_and_backward(
    dtype: torch.dtype, per_channel: bool, gradient: str
) -> None:
    options = {"narrow_range": True, "axis": 0 if per_channel else None, "gradient": gradient}
    results = []
    for listed in (True, False):
        xs = [x.requires_grad_() for x in weights(dtype)]
        scales, zeros, bits = grids(xs, per_channel)
        for s in scales:
            s.requires_grad_()
        if listed:
            ys = ops.fake_quantize_foreach(xs, scales, zeros, bits, **options)
        else:
            ys = [ops.fake_quantize(*given, **options) for given in zip(xs, scales, zeros, bits, strict=True)]
        generator = torch.Generator().manual_seed(1)
        gradients = [torch.randn(y.shape, generator=generator).to(dtype) for y in ys]
        torch.autograd.backward(ys, gradients)
        results.append((ys, [x.grad for x in xs], [s.grad for s in scales]))
    for got, expected in zip(*results, strict=True):
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b)
            assert a.stride() == b.stride()


def test_an_unused_output_gives_zeros_and_fixed_scales_get_no_gradient() -> None:
    xs = [x.requires_grad_() for x in weights()]
    ys = ops.fake_quantize_foreach(xs, *grids(xs, False))
    ys[4].sum().backward()
    assert torch.equal(xs[0].grad, torch.zeros_like(xs[0]))
    assert xs[4].grad.abs().sum() > 0


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noise_equals_the_single_op(per_channel: bool, dtype: torch.dtype) -> None:
    xs = weights(dtype)
    axis = 0 if per_channel else None
    widths = [torch.tensor([float(b) for b in range(2, 3 + i)]) for i in range(len(xs))]
    scales = [
        torch.rand((len(w), x.shape[0]) if per_channel else (len(w),), generator=torch.Generator().manual_seed(2))
        + 0.05
        for w, x in zip(widths, xs, strict=True)
    ]
    signals, noises = ops.quantization_noise_foreach(xs, scales, widths, signed=True, narrow_range=True, axis=axis)
    for x, s, w, signal, noise in zip(xs, scales, widths, signals, noises, strict=True):
        expected = ops.quantization_noise(x, s, w, signed=True, narrow_range=True, axis=axis)
        assert torch.equal(signal, expected[0])
        assert torch.equal(noise, expected[1])


def test_the_same_bits_for_any_number_of_threads() -> None:
    xs = weights()
    scales, zeros, bits = grids(xs, True)
    scales = [s.requires_grad_() for s in scales]
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            ys = ops.fake_quantize_foreach(xs, scales, zeros, bits, axis=0)
            results.append([*ys, *torch.autograd.grad([y.sum() for y in ys], scales)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("requires_grad", [True, False])
def test_opcheck(requires_grad: bool) -> None:
    xs = [x.requires_grad_(requires_grad) for x in weights()]
    scales, zeros, bits = grids(xs, True)
    scales = [s.requires_grad_(requires_grad) for s in scales]
    for gradient in (0, 1):
        keywords = {"signed": True, "axis": 0, "gradient": gradient}
        opcheck(torch.ops.mixbit.fake_quantize_foreach.default, (xs, scales, zeros, bits), keywords)
    if not requires_grad:
        keywords = {"signed": True, "narrow_range": False, "axis": 0, "rounding": 0, "group_size": None}
        for mask, gradient in (([True, True, True], 0), ([False, True, False], 1)):
            opcheck(
                torch.ops.mixbit._fake_quantize_backward_foreach.default,
                (xs, xs, scales, zeros, bits),
                {**keywords, "output_mask": mask, "gradient": gradient},
            )
        opcheck(
            torch.ops.mixbit.quantization_noise_foreach.default,
            (xs, [torch.rand(2) + 0.1 for _ in xs], [torch.tensor([2.0, 4.0]) for _ in xs]),
            {"signed": True, "narrow_range": False},
        )


def test_no_tensors_at_all() -> None:
    assert ops.fake_quantize_foreach([], [], [], []) == []
    assert ops.quantization_noise_foreach([], [], [], signed=True, narrow_range=True) == ([], [])


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda lists: lists[1].pop(), r"scales has 5 tensors and xs 6: expected one for each"),
        (lambda lists: lists[1].__setitem__(2, torch.tensor([-1.0])), r"scale\[0\]=-1.*tensor 2 of the list"),
        (lambda lists: lists[3].__setitem__(4, torch.tensor([17.0])), r"bit_width\[0\]=17.*tensor 4 of the list"),
        (lambda lists: lists[0].__setitem__(1, torch.zeros(2, dtype=torch.int64)), "x has dtype Long.*tensor 1"),
    ],
)
def test_bad_input_names_the_tensor(change, complaint: str) -> None:
    xs = weights()
    lists = [xs, *grids(xs, False)]
    change(lists)
    with pytest.raises(ValueError, match="(?s)" + complaint):
        torch.ops.mixbit.fake_quantize_foreach.default(*lists)
