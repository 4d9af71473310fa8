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
def test_extra_levels_equal_the_cpu(shape: tuple[int, ...], axis: int | None, dtype: torch.dtype) -> None:
    x, scale, _, bits = arguments(shape, axis, dtype)
    extra = torch.randint(0, 3, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    for narrow_range, rounding in ((False, "half_up"), (True, "half_even")):
        grid = {"narrow_range": narrow_range, "axis": axis, "rounding": rounding}
        on_device = ops.extra_level_fake_quantize(*(t.cuda() for t in (x, scale, bits, extra)), **grid)
        assert same(on_device.cpu(), ops.extra_level_fake_quantize(x, scale, bits, extra, **grid))
    finite = x.nan_to_num(0.5, 3.0, -3.0).clamp(-5, 5)
    grads = []
    for device in ("cpu", "cuda"):
        leaves = [t.to(device).requires_grad_() for t in (finite, scale)]
        y = ops.extra_level_fake_quantize(*leaves, bits.to(device), extra.to(device), axis=axis)
        y.backward(torch.linspace(-1, 1, x.numel()).view(x.shape).to(y))
        grads.append([leaf.grad.cpu() for leaf in leaves])
    assert torch.equal(grads[0][0], grads[1][0])
    assert torch.allclose(grads[0][1], grads[1][1], rtol=1e-4, atol=1e-3)
    if x.numel() > 0:
        wrong = extra.cuda().fill_(3)
        assert ops.extra_level_fake_quantize(x.cuda(), scale.cuda(), bits.cuda(), wrong, axis=axis).isnan().all()


@needs_gpu
@pytest.mark.parametrize("gradient", ["learned_step", "clip"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_backward_equals_the_cpu(shape: tuple[int, ...], axis: int | None, dtype: torch.dtype, gradient: str) -> None:
    x, scale, zero_point, bits = arguments(shape, axis, dtype)
    x = x.nan_to_num(0.5, 3.0, -3.0).clamp(-5, 5)
    grads = []
    for device in ("cpu", "cuda"):
        leaves = [t.to(device).requires_grad_() for t in (x, scale, zero_point)]
        y = ops.fake_quantize(*leaves, bits.to(device), axis=axis, gradient=gradient)
        y.backward(torch.linspace(-1, 1, x.numel()).view(x.shape).to(y))
        grads.append([leaf.grad.cpu() for leaf in leaves])
    assert torch.equal(grads[0][0], grads[1][0])
    for cpu, cuda in zip(grads[0][1:], grads[1][1:], strict=True):
        assert torch.allclose(cpu, cuda, rtol=1e-4, atol=1e-3)


@needs_gpu
@pytest.mark.parametrize("gradient", ["learned_step", "clip"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_a_fixed_scale_saves_the_same_mask(
    shape: tuple[int, ...], axis: int | None, dtype: torch.dtype, gradient: str
) -> None:
    given = arguments(shape, axis, dtype)
    keywords = {"signed": True, "narrow_range": False, "axis": axis, "rounding": 0, "group_size": None}
    keywords["gradient"] = ops.GRADIENTS[gradient]
    y, mask = torch.ops.mixbit._fake_quantize_mask(*given, **keywords)
    on_device = torch.ops.mixbit._fake_quantize_mask(*(t.cuda() for t in given), **keywords)
    assert same(on_device[0].cpu(), y)
    assert torch.equal(on_device[1].cpu(), mask)
    x = given[0].cuda().requires_grad_()
    ops.fake_quantize(x, *(t.cuda() for t in given[1:]), axis=axis, gradient=gradient).sum().backward()
    other = given[0].clone().requires_grad_()
    ops.fake_quantize(other, *given[1:], axis=axis, gradient=gradient).sum().backward()
    assert torch.equal(x.grad.cpu(), other.grad)


@needs_gpu
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_statistics_equal_those_of_the_cpu(axis: int | None) -> None:
    x = torch.randn(6, 10, 50, 20)
    widths = torch.tensor([2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 12.0, 16.0])
    scales = ops.mse_scales(x, widths, signed=True, narrow_range=True, axis=axis)
    found = ops.mse_scales(x.cuda(), widths.cuda(), signed=True, narrow_range=True, axis=axis).cpu()
    # Sums are made in another order: of two candidates that are equally good to rounding either may be taken.
    assert (found != scales).float().mean() < 0.02
    torch.testing.assert_close(found, scales, rtol=0.05, atol=0)
    grid = {"signed": True, "narrow_range": True, "axis": axis}
    expected = ops.quantization_noise(x, scales, widths, **grid)
    for got, wanted in zip(
        ops.quantization_noise(x.cuda(), scales.cuda(), widths.cuda(), **grid), expected, strict=True
    ):
        torch.testing.assert_close(got.cpu(), wanted, rtol=1e-5, atol=0)
    for got, wanted in zip(ops.noise_power((x + 0.1).cuda(), x.cuda()), ops.noise_power(x + 0.1, x), strict=True):
        torch.testing.assert_close(got.cpu(), wanted, rtol=1e-5, atol=0)
    seen, wanted_seen = ops.observe(x.cuda(), axis=axis, bins=64), ops.observe(x, axis=axis, bins=64)
    for got, wanted in zip(seen, wanted_seen, strict=True):
        torch.testing.assert_close(got.cpu(), wanted, rtol=1e-5, atol=1e-3)
    assert torch.equal(seen[0].cpu(), wanted_seen[0])
    assert torch.equal(seen[1].cpu(), wanted_seen[1])
    assert torch.equal(seen[4].cpu()[..., 0, :], wanted_seen[4][..., 0, :])
    if axis is None:
        histogram, low, high = seen[4], seen[0], seen[1]
        grid = {"signed": True, "narrow_range": True}
        on_device = ops.mse_scales_from_histogram(histogram, low, high, widths.cuda(), **grid)
        on_cpu = ops.mse_scales_from_histogram(wanted_seen[4], *wanted_seen[:2], widths, **grid)
        torch.testing.assert_close(on_device.cpu(), on_cpu, rtol=0.05, atol=0)
        on_device = ops.quantization_noise_from_histogram(histogram, low, high, scales.cuda(), widths.cuda(), **grid)
        on_cpu = ops.quantization_noise_from_histogram(wanted_seen[4], *wanted_seen[:2], scales, widths, **grid)
        torch.testing.assert_close(on_device.cpu(), on_cpu, rtol=1e-4, atol=1e-6)


@needs_gpu
def test_observe_sees_nan_infinity_and_nothing() -> None:
    x = torch.randn(3, 1000)
    x[0, 5], x[1, 7] = float("nan"), float("inf")
    low, high, _, _, histogram = (t.cpu() for t in ops.observe(x.cuda(), axis=0, bins=16))
    assert low[0].isnan()
    assert high[0].isnan()
    assert high[1] == float("inf")
    assert torch.equal(histogram[:2], torch.zeros(2, 3, 16, dtype=torch.float64))
    assert histogram[2, 0].sum() == 1000
    empty = ops.observe(torch.zeros(0, device="cuda"), bins=4)
    assert [float(t) for t in empty[:4]] == [float("inf"), float("-inf"), 0.0, 0.0]
    scales = ops.mse_scales(x.cuda(), torch.tensor([4.0, 17.0]).cuda(), signed=True, narrow_range=True, axis=0).cpu()
    assert scales.isnan().tolist() == [[True, True, False], [True, True, True]]


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lists_equal_the_single_ops(dtype: torch.dtype) -> None:
    shapes = [(6, 3, 3, 3), (8, 40), (5,), (0, 4), (70, 1000), (3, 50000)]
    xs = [torch.randn(shape, device="cuda").to(dtype).requires_grad_() for shape in shapes]
    xs[0] = xs[0].detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    xs.append(torch.randn(7, 9, device="cuda", requires_grad=True))  # another type in the list
    scales = [torch.full((max(x.shape[0], 1),), 0.2, device="cuda", requires_grad=True) for x in xs]
    scales[3] = torch.full((1,), 0.2, device="cuda", requires_grad=True)
    zeros, bits = ([torch.full((1,), v, device="cuda") for _ in xs] for v in (0.0, 3.0))
    results = []
    for listed in (True, False):
        for leaf in (*xs, *scales):
            leaf.grad = None
        if listed:
            ys = ops.fake_quantize_foreach(xs, scales, zeros, bits, axis=0)
        else:
            ys = [ops.fake_quantize(*one, axis=0) for one in zip(xs, scales, zeros, bits, strict=True)]
        torch.autograd.backward([y.float().square().sum() for y in ys])
        results.append([*ys, *(x.grad for x in xs), *(s.grad for s in scales)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    widths = [torch.tensor([2.0, 4.0], device="cuda") for _ in xs]
    grids = [torch.tensor([0.5, 0.2], device="cuda") for _ in xs]
    data = [x.detach() for x in xs]
    listed = ops.quantization_noise_foreach(data, grids, widths, signed=True, narrow_range=True, axis=0)
    for x, g, w, signal, noise in zip(data, grids, widths, *listed, strict=True):
        single = ops.quantization_noise(x, g, w, signed=True, narrow_range=True, axis=0)
        assert torch.equal(signal, single[0])
        assert torch.equal(noise, single[1])


@needs_gpu
def test_a_prepared_model_trains_under_autocast_like_on_the_cpu() -> None:
    import mixbit

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3)).eval()
    x = torch.randn(4, 3, 12, 12)
    mixbit.prepare_(model, mixbit.Recipe.uniform(["0", "2"], weight=4, act=4))
    mixbit.calibrate_(model, [x])
    expected = model(x).detach()
    model.cuda()
    with torch.backends.cudnn.flags(allow_tf32=False):
        assert torch.allclose(model(x.cuda()).cpu(), expected, atol=1e-3)
    with torch.autocast("cuda", torch.bfloat16):
        y = model(x.cuda())
    assert y.dtype == torch.bfloat16
    y.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


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


def search_arguments(axis: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, range, gates of each sample and the gradient of the output."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(5, 6, 33, 20, generator=generator)
    limit = torch.rand(1 if axis is None else x.shape[axis], generator=generator) + 0.5
    return x, limit, torch.rand(2, 5, generator=generator), torch.randn(x.shape, generator=generator)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("axis", [None, 1, 3])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("form", ["difference", "residual"])
def test_gated_equals_the_cpu(form: str, signed: bool, axis: int | None, dtype: torch.dtype) -> None:
    x, limit, gates, grad = search_arguments(axis)
    found = []
    for device in ("cpu", "cuda"):
        leaves = [t.to(device).requires_grad_() for t in (x.to(dtype), limit, gates)]
        y = ops.gated_fake_quantize(*leaves, (2, 4, 8), signed=signed, axis=axis, form=form)
        y.backward(grad.to(y))
        found.append([y.detach().cpu(), *(torch.zeros(1) if t.grad is None else t.grad.cpu() for t in leaves)])
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    for cpu, cuda in zip(found[0][2:], found[1][2:], strict=True):
        torch.testing.assert_close(cpu, cuda, rtol=1e-4, atol=1e-3)


@needs_gpu
@pytest.mark.parametrize("axis", [None, 1])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_mixtures_equal_the_cpu(count: int, axis: int | None) -> None:
    x, _, _, grad = search_arguments(axis)
    scales = torch.rand(count, 6) + 0.05 if axis is not None else torch.rand(count) + 0.05
    weights, bits = torch.rand(count), torch.arange(2, 2 + count).float()
    found = []
    for device in ("cpu", "cuda"):
        leaves = [t.to(device).requires_grad_() for t in (x, scales, weights)]
        y = ops.mixture_fake_quantize(*leaves, bits.to(device), signed=True, axis=axis)
        y.backward(grad.to(y))
        found.append([y.detach().cpu(), *(t.grad.cpu() for t in leaves)])
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    for cpu, cuda in zip(found[0][2:], found[1][2:], strict=True):
        torch.testing.assert_close(cpu, cuda, rtol=1e-4, atol=1e-3)
    if count == 2:
        y = ops.mixture_fake_quantize(
            x.cuda(), scales.cuda(), weights.cuda(), torch.tensor([2.0, 99.0]).cuda(), signed=True, axis=axis
        )
        assert y.isnan().all()


@needs_gpu
def test_gates_and_costs_equal_the_cpu() -> None:
    logits, noise, values = torch.randn(4, 2), torch.rand(2, 7), torch.rand(4, 3, 3)
    found = []
    for device in ("cpu", "cuda"):
        leaf = logits.to(device).requires_grad_()
        total = ops.expected_cost(leaf, leaf, values.to(device), "joint")
        (total + ops.sample_gates(leaf[0], noise.to(device), 0.5).sum()).backward()
        found.append((total.detach().cpu(), leaf.grad.cpu()))
    for cpu, cuda in zip(*found, strict=True):
        torch.testing.assert_close(cpu, cuda, rtol=1e-5, atol=1e-5)


@needs_gpu
@pytest.mark.parametrize("bits", [1, 3, 4, 8, 11, 16])
@pytest.mark.parametrize("signed", [True, False])
def test_packed_codes_are_those_of_the_cpu(bits: int, signed: bool) -> None:
    low = -(2 ** (bits - 1)) if signed else 0
    for shape in ((37,), (5, 1000), (0, 3), (3, 0)):
        codes = torch.randint(low, low + 2**bits, shape, generator=torch.Generator().manual_seed(bits))
        packed = ops.pack_bits(codes.cuda(), bits)
        assert torch.equal(packed.cpu(), ops.pack_bits(codes, bits))
        back = ops.unpack_bits(packed, bits, shape[-1], signed)
        assert torch.equal(back.cpu(), ops.unpack_bits(packed.cpu(), bits, shape[-1], signed))
        assert torch.equal(back.cpu().long(), codes)
    opcheck(torch.ops.mixbit.pack_bits.default, (codes.cuda(), bits))
