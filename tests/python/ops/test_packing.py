"""pack_bits and unpack_bits: golden bytes, the twin, every width and dtype, any layout, bad input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from mixbit import ops
from mixbit.ops import _reference as twin

DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def drawn(shape: tuple[int, ...], bits: int, signed: bool, seed: int = 0) -> torch.Tensor:
    low = -(2 ** (bits - 1)) if signed else 0
    return torch.randint(low, low + 2**bits, shape, generator=torch.Generator().manual_seed(seed))


def test_golden_bytes() -> None:
    assert ops.pack_bits(torch.tensor([1, 2, 3, -1, -4]), 3).tolist() == [0b11010001, 0b01001110]
    assert ops.pack_bits(torch.tensor([[-8, 7, 3], [1, 0, 0]]), 4).tolist() == [[0x78, 0x03], [0x01, 0x00]]
    assert ops.unpack_bits(torch.tensor([0x78, 0x03], dtype=torch.uint8), 4, 3, True).tolist() == [-8, 7, 3]
    assert ops.unpack_bits(torch.tensor([0x78, 0x03], dtype=torch.uint8), 4, 3, False).tolist() == [8, 7, 3]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 16), st.booleans(), st.integers(0, 20), st.integers(0, 3), st.integers(0, 1000))
def test_equals_the_twin_and_comes_back(bits: int, signed: bool, n: int, rows: int, seed: int) -> None:
    codes = drawn((rows, 2, n), bits, signed, seed)
    packed = ops.pack_bits(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, 2, (n * bits + 7) // 8)
    assert torch.equal(packed, twin.pack_bits(codes, bits))
    back = ops.unpack_bits(packed, bits, n, signed)
    assert torch.equal(back.long(), codes)
    assert torch.equal(back.long(), twin.unpack_bits(packed, bits, n, signed))


@pytest.mark.parametrize("bits", range(1, 17))
@pytest.mark.parametrize("signed", [True, False])
def test_dtypes(bits: int, signed: bool) -> None:
    codes = drawn((3, 70), bits, signed)
    expected = (torch.int8 if signed else torch.uint8) if bits <= 8 else torch.int16
    if bits == 16 and not signed:
        expected = torch.int32
    packed = ops.pack_bits(codes, bits)
    assert ops.unpack_bits(packed, bits, 70, signed).dtype == expected
    for dtype in DTYPES:
        if torch.equal(codes.to(dtype).long(), codes):
            assert torch.equal(ops.pack_bits(codes.to(dtype), bits), packed)


def test_layouts_and_many_threads() -> None:
    codes = drawn((70, 2000), 3, True, seed=4)
    packed = ops.pack_bits(codes, 3)
    assert torch.equal(ops.pack_bits(codes.t().contiguous().t(), 3), packed)
    image = drawn((2, 4, 5, 6), 2, False).to(memory_format=torch.channels_last)
    assert torch.equal(ops.pack_bits(image, 2), ops.pack_bits(image.contiguous(), 2))
    assert torch.equal(ops.unpack_bits(packed.t().contiguous().t(), 3, 2000, True).long(), codes)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(ops.pack_bits(codes, 3), packed)
        assert torch.equal(ops.unpack_bits(packed, 3, 2000, True).long(), codes)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("bits", [1, 3, 8, 12, 16])
@pytest.mark.parametrize("signed", [True, False])
def test_opcheck_and_compiled(bits: int, signed: bool) -> None:
    codes = drawn((3, 11), bits, signed)
    packed = ops.pack_bits(codes, bits)
    opcheck(torch.ops.mixbit.pack_bits.default, (codes, bits))
    opcheck(torch.ops.mixbit.unpack_bits.default, (packed, bits, 11, signed))
    torch._dynamo.reset()
    both = torch.compile(
        lambda c: ops.unpack_bits(ops.pack_bits(c, bits), bits, 11, signed), backend="eager", fullgraph=True
    )
    assert torch.equal(both(codes).long(), codes)


def test_bad_input_is_named() -> None:
    codes = torch.tensor([0, 1, 5])
    with pytest.raises(ValueError, match="codes lie between 0 and 5: expected -2 to 1 .signed. or 0 to 3 at bits=2"):
        ops.pack_bits(codes, 2)
    with pytest.raises(ValueError, match="codes lie between -1 and 5: expected -4 to 3"):
        ops.pack_bits(torch.tensor([-1, 5]), 3)  # fits neither signed nor unsigned
    with pytest.raises(ValueError, match="codes has dtype Float: expected uint8"):
        ops.pack_bits(codes.float(), 4)
    with pytest.raises(ValueError, match="codes has no dimension"):
        ops.pack_bits(torch.tensor(3), 4)
    for bits in (0, 17):
        with pytest.raises(ValueError, match=f"bits={bits}: expected a whole number from 1 to 16"):
            ops.pack_bits(codes, bits)
    packed = ops.pack_bits(codes, 4)
    with pytest.raises(ValueError, match="packed has 2 bytes a row: expected 3 for n=5 codes of 4 bits"):
        ops.unpack_bits(packed, 4, 5, True)
    with pytest.raises(ValueError, match="packed has dtype Int: expected uint8"):
        ops.unpack_bits(packed.int(), 4, 3, True)
    for n in (-1, 2**60):
        with pytest.raises(ValueError, match=f"n={n}: expected a number of codes"):
            ops.unpack_bits(packed, 4, n, True)
