"""The CUDA kernels against the CPU ones: values bitwise, sums to rounding. Skips without a GPU."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from mixbit import _build_info, ops

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or _build_info.CUDA is None, reason="needs a GPU and a build with CUDA"
)


def test_the_build_says_what_it_has() -> None:
    registered = torch._C._dispatch_has_kernel_for_dispatch_key("mixbit::fake_quantize", "CUDA")
    assert registered == (_build_info.CUDA is not None)
    if os.environ.get("MIXBIT_CUDA", "AUTO") != "OFF" and shutil.which("nvcc") and torch.version.cuda is not None:
        assert _build_info.CUDA is not None


def arguments(shape: tuple[int, ...], axis: int | None, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator) * 2
    if x.numel() > 8:
        x.view(-1)[:5] = torch.tensor([float("inf"), float("-inf"), float("nan"), 1e30, 0.0])
    channels = 1 if axis is None else shape[axis]
    scale = torch.rand(channels, generator=generator) * 0.4 + 0.1
    zero_point = torch.randint(-3, 4, (channels,), generator=generator).float()
    bits = torch.randint(2, 9, (channels,), generator=generator).float()
    return x.to(dtype), scale, zero_point, bits


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


SHAPES = [((37,), None), ((4, 5, 33), 0), ((3, 5, 7, 2), 1), ((6, 5), -1), ((2, 3, 150, 151), 1), ((0, 3), 1)]


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rounding", ["half_even", "half_up"])
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_forward_equals_the_cpu_bit_by_bit(
    shape: tuple[int, ...], axis: int | None, rounding: str, dtype: torch.dtype
) -> None:
    given = arguments(shape, axis, dtype)
    for signed, narrow_range in ((True, False), (True, True), (False, False)):
        grid = {"signed": signed, "narrow_range": narrow_range, "axis": axis, "rounding": rounding}
        assert same(ops.fake_quantize(*(t.cuda() for t in given), **grid).cpu(), ops.fake_quantize(*given, **grid))


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_backward_equals_the_cpu(shape: tuple[int, ...], axis: int | None, dtype: torch.dtype) -> None:
    x, scale, zero_point, bits = arguments(shape, axis, dtype)
    x = x.nan_to_num(0.5, 3.0, -3.0).clamp(-5, 5)
    grads = []
    for device in ("cpu", "cuda"):
        leaves = [t.to(device).requires_grad_() for t in (x, scale, zero_point)]
        y = ops.fake_quantize(*leaves, bits.to(device), axis=axis)
        y.backward(torch.linspace(-1, 1, x.numel()).view(x.shape).to(y))
        grads.append([leaf.grad.cpu() for leaf in leaves])
    assert torch.equal(grads[0][0], grads[1][0])
    for cpu, cuda in zip(grads[0][1:], grads[1][1:], strict=True):
        assert torch.allclose(cpu, cuda, rtol=1e-4, atol=1e-3)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_a_fixed_scale_saves_the_same_mask(shape: tuple[int, ...], axis: int | None, dtype: torch.dtype) -> None:
    given = arguments(shape, axis, dtype)
    keywords = {"signed": True, "narrow_range": False, "axis": axis, "rounding": 0, "group_size": None}
    y, mask = torch.ops.mixbit._fake_quantize_mask(*given, **keywords)
    on_device = torch.ops.mixbit._fake_quantize_mask(*(t.cuda() for t in given), **keywords)
    assert same(on_device[0].cpu(), y)
    assert torch.equal(on_device[1].cpu(), mask)
    x = given[0].cuda().requires_grad_()
    ops.fake_quantize(x, *(t.cuda() for t in given[1:]), axis=axis).sum().backward()
    other = given[0].clone().requires_grad_()
    ops.fake_quantize(other, *given[1:], axis=axis).sum().backward()
    assert torch.equal(x.grad.cpu(), other.grad)


@needs_gpu
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_statistics_equal_those_of_the_cpu(axis: int | None) -> None:
    x = torch.randn(6, 10, 50, 20)
    widths = torch.tensor([2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 12.0, 16.0])
    scales = ops.mse_scales(x, widths, signed=True, narrow_range=True, axis=axis)
    assert torch.equal(ops.mse_scales(x.cuda(), widths.cuda(), signed=True, narrow_range=True, axis=axis).cpu(), scales)
    grid = {"signed": True, "narrow_range": True, "axis": axis}
    expected = ops.quantization_noise(x, scales, widths, **grid)
    for got, wanted in zip(
        ops.quantization_noise(x.cuda(), scales.cuda(), widths.cuda(), **grid), expected, strict=True
    ):
        torch.testing.assert_close(got.cpu(), wanted, rtol=1e-5, atol=0)
    for got, wanted in zip(ops.noise_power((x + 0.1).cuda(), x.cuda()), ops.noise_power(x + 0.1, x), strict=True):
        torch.testing.assert_close(got.cpu(), wanted, rtol=1e-5, atol=0)
    for got, wanted in zip(ops.observe(x.cuda(), axis=axis, bins=64), ops.observe(x, axis=axis, bins=64), strict=True):
        assert torch.equal(got.cpu(), wanted)


@needs_gpu
def test_sums_are_the_same_bits_every_time() -> None:
    x = torch.randn(8, 16, 100, 100, device="cuda")
    found = []
    for _ in range(5):
        scale = torch.full((16,), 0.1, device="cuda", requires_grad=True)
        bits = torch.full((1,), 4.0, device="cuda")
        ops.fake_quantize(x, scale, torch.zeros(1, device="cuda"), bits, axis=1).square().sum().backward()
        found.append(scale.grad)
    assert all(torch.equal(found[0], other) for other in found[1:])


@needs_gpu
def test_layouts_and_streams() -> None:
    x = torch.randn(4, 8, 20, 20, device="cuda")
    scale, zero, bits = (
        torch.full((8,), 0.2, device="cuda"),
        torch.zeros(1, device="cuda"),
        torch.full((1,), 3.0, device="cuda"),
    )
    expected = ops.fake_quantize(x, scale, zero, bits, axis=1)
    for other in (x.contiguous(memory_format=torch.channels_last), x[:, :, ::2], x.transpose(0, 3)):
        axis = 1
        got = ops.fake_quantize(other, scale, zero, bits, axis=axis)
        assert torch.equal(got, ops.fake_quantize(other.contiguous(), scale, zero, bits, axis=axis))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = ops.fake_quantize(x, scale, zero, bits, axis=1)
    stream.synchronize()
    assert torch.equal(got, expected)


@needs_gpu
def test_a_bad_bit_width_yields_nan_without_synchronizing() -> None:
    x = torch.randn(100, device="cuda")
    one = torch.ones(1, device="cuda")
    for bits, narrow_range in ((0.0, False), (17.0, False), (2.5, False), (1.0, True)):
        y = ops.fake_quantize(x, one, 0 * one, torch.full((1,), bits, device="cuda"), narrow_range=narrow_range)
        assert y.isnan().all()
    assert not ops.fake_quantize(x, one, 0 * one, one).isnan().any()


@needs_gpu
def test_parameters_must_be_on_the_device_of_x() -> None:
    x = torch.randn(4, device="cuda")
    one = torch.ones(1, device="cuda")
    with pytest.raises(ValueError, match="scale is on cpu and x on cuda"):
        ops.fake_quantize(x, torch.ones(1), 0 * one, 4 * one)


@needs_gpu
def test_opcheck_and_quantized_conv2d() -> None:
    x = torch.randn(2, 3, 8, 8, device="cuda", requires_grad=True)
    one = torch.ones(1, device="cuda")
    scale = torch.full((1,), 0.1, device="cuda", requires_grad=True)
    opcheck(torch.ops.mixbit.fake_quantize.default, (x, scale, 0 * one, 4 * one))
    weight = torch.randn(4, 3, 3, 3, device="cuda") * 0.2
    given = (x.detach(), weight, None, scale.detach(), 0 * one, 4 * one, 0.05 * one, 4 * one)
    with torch.backends.cudnn.flags(allow_tf32=False):
        y = ops.quantized_conv2d(*given, signed_x=True)
    expected = ops.quantized_conv2d(*(None if t is None else t.cpu() for t in given), signed_x=True)
    assert torch.allclose(y.cpu(), expected, atol=1e-4)
