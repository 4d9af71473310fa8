"""int_conv2d, int_linear and requantize: golden codes, the twin, every width and layout, opcheck, bad input."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from mixbit import ops
from mixbit.ops import _reference as twin

ISAS = ("scalar", "avx2", "avx512", "vnni", "amx")


def codes(shape: tuple[int, ...], low: int, high: int, seed: int) -> Tensor:
    dtype = torch.int8 if low < 0 else torch.uint8
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def layer(
    out: int, taps: tuple[int, ...], bits: int, signed: bool, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
    """Weight, bias, multiplier, and the codes of x."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (out, *taps), generator=generator).to(torch.int8)
    bias = torch.randint(-5000, 5000, (out,), generator=generator).to(torch.int32)
    size = weight[0].numel() ** 0.5 * 2 ** (bits - 1)
    multiplier = torch.rand(out, generator=generator) / size
    return weight, bias, multiplier, (-128, 127) if signed else (0, 255)


def test_golden_codes() -> None:
    total = torch.tensor([-7, -3, -1, 0, 1, 3, 5, 2**31 - 1, -(2**31)], dtype=torch.int32)
    half = torch.tensor([0.5])
    assert ops.requantize(total, half, low=-128, high=127).tolist() == [-4, -2, 0, 0, 0, 2, 2, 127, -128]
    assert ops.requantize(total, half, zero_point=3, high=15).tolist() == [0, 1, 3, 3, 3, 5, 5, 15, 0]
    x = torch.tensor([[10, 3]], dtype=torch.uint8)
    weight = torch.tensor([[1, -2], [3, 4]], dtype=torch.int8)
    bias = torch.tensor([1, -1], dtype=torch.int32)
    # (10 - 2) - 2 (3 - 2) + 1 = 7; 3 (10 - 2) + 4 (3 - 2) - 1 = 27
    got = ops.int_linear(x, weight, bias, torch.tensor([0.5, 1.0]), x_zero_point=2, y_zero_point=1, y_high=200)
    assert got.tolist() == [[5, 28]]
    image = ops.int_conv2d(
        x.view(1, 2, 1, 1), weight.view(2, 2, 1, 1), bias, torch.tensor([0.5, 1.0]), padding=1, x_zero_point=2
    )
    assert image.shape == (1, 2, 3, 3)
    assert image[0, :, 1, 1].tolist() == [4, 27]
    assert image[0, :, 0, 0].tolist() == [0, 0]  # the bias alone: 1 and -1


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([(1, 1), (3, 3), (2, 5)]),
    st.integers(1, 2),
    st.integers(0, 2),
    st.integers(1, 2),
    st.sampled_from([(1, 5, 7), (4, 8, 8), (8, 8, 8), (1, 33, 40)]),
    st.integers(1, 8),
    st.booleans(),
    st.integers(0, 1000),
)
def test_convolutions_equal_the_twin(kernel, stride, padding, dilation, channels, bits, signed, seed) -> None:
    groups, cin, cout = channels
    weight, bias, multiplier, (low, high) = layer(cout, (cin // groups, *kernel), bits, signed, seed)
    x = codes((2, cin, 9, 10), low, high, seed)
    zero = (low + seed) % 256 + low if not signed else seed % 256 - 128
    zero = min(max(zero, low), high)
    y_low, y_high, y_zero = ((-128, 127, -5), (0, 15, 3))[seed % 2]
    options = {"x_zero_point": zero, "y_zero_point": y_zero, "y_low": y_low, "y_high": y_high}
    some = bias if seed % 3 else None
    got = ops.int_conv2d(
        x,
        weight,
        some,
        multiplier,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        weight_bits=bits,
        **options,
    )
    pairs = [[value] * 2 for value in (stride, padding, dilation)]
    expected = twin.int_conv2d(x, weight, some, multiplier, *pairs, groups, **options)
    assert got.dtype == expected.dtype
    assert torch.equal(got, expected)
    assert got.is_contiguous(memory_format=torch.channels_last)
    # Any layout of x, any number of threads.
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        shuffled = x.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)
        again = ops.int_conv2d(
            shuffled,
            weight,
            some,
            multiplier,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            **options,
        )
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(again, expected)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("signed", [True, False])
def test_linear_layers_equal_the_twin(bits: int, signed: bool) -> None:
    weight, bias, multiplier, (low, high) = layer(40, (70,), bits, signed)
    options = {"x_zero_point": low + 5, "y_zero_point": 7, "y_low": 0, "y_high": 255}
    for shape in ((70,), (1, 70), (37, 70), (2, 3, 70)):
        x = codes(shape, low, high, bits)
        got = ops.int_linear(x, weight, bias, multiplier, weight_bits=bits, **options)
        assert torch.equal(got, twin.int_linear(x, weight, bias, multiplier, **options))


def test_requantize_along_an_axis_and_in_any_layout() -> None:
    generator = torch.Generator().manual_seed(0)
    total = torch.randint(-(2**31), 2**31, (3, 5, 4, 6), generator=generator).to(torch.int32)
    options = {"zero_point": -3, "low": -8, "high": 7}
    for axis in (None, 0, 1, -1):
        n = 1 if axis is None else total.shape[axis]
        multiplier = torch.randn(n, generator=generator) * 2.0**-28
        expected = twin.requantize(total, multiplier, axis=axis, **options)
        for x in (
            total,
            total.to(memory_format=torch.channels_last),
            total.transpose(0, 3).contiguous().transpose(0, 3),
        ):
            assert torch.equal(ops.requantize(x, multiplier, axis=axis, **options), expected)
    sliced = total[:, ::2, :, 1:5]
    multiplier = torch.rand(3) * 2.0**-24
    assert torch.equal(
        ops.requantize(sliced, multiplier, axis=1, **options), twin.requantize(sliced, multiplier, axis=1, **options)
    )
    assert ops.requantize(total[:0], torch.ones(1)).shape == (0, 5, 4, 6)
    assert ops.requantize(torch.tensor(9, dtype=torch.int32), torch.ones(1)).tolist() == 9


def test_empty_batches() -> None:
    weight, bias, multiplier, _ = layer(4, (3, 3, 3), 8, False)
    assert ops.int_conv2d(torch.zeros(0, 3, 5, 5, dtype=torch.uint8), weight, bias, multiplier).shape == (0, 4, 3, 3)
    flat = torch.ones(4, 6, dtype=torch.int8)
    assert ops.int_linear(torch.zeros(0, 6, dtype=torch.int8), flat, None, multiplier).shape == (0, 4)


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_gives_the_same_codes(isa: str) -> None:
    script = (
        "import torch, hashlib\nfrom mixbit import ops\n"
        "g = torch.Generator().manual_seed(0)\n"
        "x = torch.randint(0, 256, (2, 33, 9, 9), generator=g).to(torch.uint8)\n"
        "w = torch.randint(-8, 8, (50, 33, 3, 3), generator=g).to(torch.int8)\n"
        "m = torch.rand(50, generator=g) / 100\n"
        "y = ops.int_conv2d(x, w, None, m, padding=1, x_zero_point=100, y_zero_point=9, weight_bits=4)\n"
        "print(hashlib.sha256(y.contiguous().numpy().tobytes()).hexdigest())\n"
    )
    environment = os.environ | {"MIXBIT_CPU_ISA": isa}
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (2, 33, 9, 9), generator=generator).to(torch.uint8)
    weight = torch.randint(-8, 8, (50, 33, 3, 3), generator=generator).to(torch.int8)
    multiplier = torch.rand(50, generator=generator) / 100
    expected = twin.int_conv2d(x, weight, None, multiplier, [1, 1], [1, 1], [1, 1], 1, 100, 9, 0, 255)
    import hashlib

    assert shown.stdout.strip() == hashlib.sha256(expected.contiguous().numpy().tobytes()).hexdigest()


def test_opcheck_and_compiled() -> None:
    weight, bias, multiplier, _ = layer(4, (3, 3, 3), 4, False)
    x = codes((2, 3, 6, 7), 0, 255, 0)
    options = {"x_zero_point": 3, "y_low": -8, "y_high": 7, "weight_bits": 4}
    opcheck(torch.ops.mixbit.int_conv2d.default, (x, weight, bias, multiplier, [2, 1], [1, 0], [1, 2], 1), options)
    flat = weight.reshape(4, 27)
    opcheck(torch.ops.mixbit.int_linear.default, (codes((2, 3, 27), -128, 127, 1), flat, None, multiplier), {})
    total = torch.arange(-12, 12, dtype=torch.int32).view(2, 3, 4)
    opcheck(torch.ops.mixbit.requantize.default, (total, torch.rand(3)), {"axis": 1, "low": -8, "high": 7})
    torch._dynamo.reset()

    def network(x: Tensor) -> Tensor:
        y = ops.int_conv2d(x, weight, bias, multiplier, padding=1, y_high=15, weight_bits=4)
        return ops.requantize(y.int().sum((2, 3), dtype=torch.int32), torch.tensor([0.01]))

    compiled = torch.compile(network, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), network(x))


def test_bad_input_is_named() -> None:
    weight, bias, multiplier, _ = layer(4, (3, 3, 3), 4, False)
    x = codes((2, 3, 6, 7), 0, 255, 0)
    conv, linear = ops.int_conv2d, ops.int_linear
    for call, complaint in (
        (lambda: conv(x.float(), weight, bias, multiplier), "x has dtype Float: expected codes, int8 or uint8"),
        (lambda: conv(x[0], weight, bias, multiplier), r"x has shape \[3, 6, 7\]: expected \[N, C, H, W\]"),
        (lambda: conv(x, weight.int(), bias, multiplier), "weight is Int .*: expected int8 codes with 4 dimensions"),
        (lambda: conv(x, weight[:0], bias, multiplier), "expected no size of 0"),
        (lambda: conv(x, weight, bias.long(), multiplier), r"bias is Long \[4\]: expected int32 \[4\]"),
        (lambda: conv(x, weight, bias, multiplier[:3]), r"multiplier is Float \[3\]: expected float32 \[4\]"),
        (lambda: conv(x, weight, bias, multiplier / 0), "multiplier has elements that are not finite"),
        (lambda: conv(x, weight, bias, multiplier, groups=2), "do not fit at groups=2"),
        (lambda: conv(x, weight, bias, multiplier, stride=0), r"stride=\[0, 0\].*: expected strides"),
        (lambda: conv(x, weight, bias, multiplier, dilation=4), "is smaller than a kernel"),
        (lambda: conv(x, weight, bias, multiplier, x_zero_point=-1), "x_zero_point=-1: expected 0 to 255"),
        (lambda: conv(x, weight, bias, multiplier, y_zero_point=16, y_high=15), "zero_point=16: expected low=0 to"),
        (lambda: conv(x, weight, bias, multiplier, y_low=-1, y_high=200), "codes from low=-1 to high=200"),
        (lambda: conv(x, weight, bias, multiplier, weight_bits=2), "weight holds codes from -8 to 7: expected -2 to 1"),
        (
            lambda: conv(x, weight, bias, multiplier, weight_bits=9),
            "weight_bits=9: expected a whole number from 1 to 8",
        ),
        (lambda: conv(x, weight, bias * 0 - 2**31 + 5, multiplier), "a total can reach 2147.*: expected at most"),
        (lambda: linear(x, weight.reshape(4, 27), bias, multiplier), r"expected \[\.\.\., 27\] for a weight"),
        (lambda: ops.requantize(x, multiplier), "total has dtype Byte: expected int32"),
        (lambda: ops.requantize(x.int(), multiplier, axis=1), r"multiplier is .* expected float32 \[3\] or \[1\]"),
        (lambda: ops.requantize(x.int(), multiplier, axis=7), "axis"),
    ):
        with pytest.raises((ValueError, IndexError), match=complaint):
            call()
