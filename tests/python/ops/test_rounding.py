"""optimize_rounding: against its twin, against all roundings of short rows, and what it must never do."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from mixbit import ops
from mixbit.ops import _reference as twin


def problem(seed: int, rows: int, inputs: int, groups: int = 1, bits: int = 3) -> dict[str, torch.Tensor]:
    """Weights, correlated inputs, and scales that clip some weights."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(groups, inputs, 4 * inputs, generator=g)
    x = torch.randn(groups, inputs, inputs, generator=g) @ x + 0.5
    weight = torch.randn(rows, inputs, generator=g)
    return {
        "weight": weight,
        "moments": x @ x.mT / x.shape[-1],
        "scale": weight.abs().amax(1) / 2 ** (bits - 1),
        "bit_width": torch.tensor([float(bits)]),
    }


def errors(weight: torch.Tensor, moments: torch.Tensor, rounded: torch.Tensor, damping: float = 0.0) -> torch.Tensor:
    """The objective of each row."""
    groups = moments.shape[0]
    m = moments.double() + damping * moments.double().diagonal(0, 1, 2).mean(1).reshape(-1, 1, 1) * torch.eye(
        moments.shape[1], dtype=torch.float64
    )
    e = (rounded.double() - weight.double()).reshape(groups, -1, weight.shape[1])
    return torch.einsum("grk,gkl,grl->gr", e, m, e).reshape(-1)


@pytest.mark.parametrize(("rows", "inputs", "groups", "bits"), [(3, 9, 1, 3), (4, 6, 2, 4), (6, 5, 6, 2), (2, 7, 1, 8)])
@pytest.mark.parametrize("narrow_range", [True, False])
def test_equals_the_twin(rows: int, inputs: int, groups: int, bits: int, narrow_range: bool) -> None:
    given = problem(rows, rows, inputs, groups, bits)
    assert torch.equal(
        ops.optimize_rounding(**given, narrow_range=narrow_range),
        twin.optimize_rounding(**given, narrow_range=narrow_range),
    )


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 7), st.integers(2, 5))
def test_is_a_local_optimum_between_nearest_and_the_best(seed: int, inputs: int, bits: int) -> None:
    given = problem(seed, 1, inputs, bits=bits)
    weight, scale = given["weight"], given["scale"]
    found = ops.optimize_rounding(**given, damping=0.0)
    nearest = ops.fake_quantize(weight, scale, 0, bits, narrow_range=True, axis=0)
    mine, plain = (float(errors(weight, given["moments"], t)) for t in (found, nearest))
    assert mine <= plain * (1 + 1e-9)
    low, high = 1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1
    v = weight / scale
    choices = [
        sorted({float(t.clamp(low, high)) for t in pair}) for pair in zip(v[0].floor(), v[0].ceil(), strict=True)
    ]
    every = torch.tensor(list(itertools.product(*choices))) * scale
    best = min(float(errors(weight, given["moments"], row[None])) for row in every)
    assert best <= mine * (1 + 1e-9)
    for i in range(inputs):
        for level in choices[i]:
            moved = found.clone()
            moved[0, i] = level * scale
            assert float(errors(weight, given["moments"], moved)) >= mine * (1 - 1e-6)


def test_uncorrelated_inputs_and_no_sweeps_round_to_nearest() -> None:
    given = problem(1, 5, 12)
    nearest = ops.fake_quantize(given["weight"], given["scale"], 0, 3, narrow_range=True, axis=0)
    assert torch.equal(ops.optimize_rounding(**given, sweeps=0), nearest)
    given["moments"] = torch.diag(torch.rand(12) + 0.1)[None]
    assert torch.equal(ops.optimize_rounding(**given), nearest)
    # Much damping makes plain distance count alone.
    assert torch.equal(ops.optimize_rounding(**problem(1, 5, 12), damping=1e9), nearest)


def test_halves_the_error_of_long_rows_whatever_the_threads() -> None:
    given = problem(7, 16, 200)
    nearest = ops.fake_quantize(given["weight"], given["scale"], 0, 3, narrow_range=True, axis=0)
    found = ops.optimize_rounding(**given)
    ratio = errors(given["weight"], given["moments"], found) / errors(given["weight"], given["moments"], nearest)
    assert float(ratio.mean()) < 0.5
    assert torch.equal(ops.fake_quantize(found, given["scale"], 0, 3, narrow_range=True, axis=0), found)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(ops.optimize_rounding(**given), found)
    finally:
        torch.set_num_threads(threads)


def test_layouts_widths_per_row_and_empty() -> None:
    given = problem(3, 4, 6)
    expected = ops.optimize_rounding(**given)
    strided = given | {"weight": given["weight"].t().contiguous().t(), "moments": given["moments"].mT}
    assert torch.equal(ops.optimize_rounding(**strided), expected)
    widths = torch.tensor([2.0, 3.0, 4.0, 5.0])
    mixed = ops.optimize_rounding(**given | {"bit_width": widths})
    for row, bits in enumerate(widths):
        one = {k: given[k][row : row + 1] for k in ("weight", "scale")}
        alone = ops.optimize_rounding(**given | one | {"bit_width": float(bits)})
        assert torch.equal(mixed[row : row + 1], alone)
    none = given | {"weight": torch.empty(0, 6), "scale": torch.ones(1)}
    assert ops.optimize_rounding(**none).shape == (0, 6)
    narrow = {"weight": torch.empty(4, 0), "moments": torch.empty(1, 0, 0), "scale": torch.ones(1)}
    assert ops.optimize_rounding(**given | narrow).shape == (4, 0)


def test_opcheck_and_no_gradient() -> None:
    given = problem(0, 4, 5, 2)
    opcheck(torch.ops.mixbit.optimize_rounding.default, tuple(given.values()), {"narrow_range": False, "sweeps": 3})
    given["weight"].requires_grad_()
    assert not ops.optimize_rounding(**given).requires_grad


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"weight": torch.ones(4, 6, dtype=torch.float64)}, "weight is Double"),
        ({"weight": torch.ones(24)}, r"expected float32 \[rows, inputs of a row\]"),
        ({"moments": torch.ones(1, 5, 5)}, r"moments is Float \[1, 5, 5\]: expected float32 \[groups, 6, 6\]"),
        ({"moments": torch.ones(3, 6, 6)}, "that divides 4 rows"),
        ({"scale": torch.ones(3)}, r"scale has shape \[3\]"),
        ({"scale": torch.zeros(1)}, "expected a positive finite number"),
        ({"bit_width": 17}, "whole number from 1 to 16"),
        ({"bit_width": 1}, "narrow_range"),
        ({"damping": -1.0}, "damping=-1"),
        ({"damping": math.nan}, "damping=nan"),
        ({"sweeps": -1}, "sweeps=-1"),
        ({"weight": torch.full((4, 6), math.nan)}, "weight holds NaN or infinity"),
        ({"moments": torch.full((1, 6, 6), math.inf)}, "moments holds NaN or infinity"),
    ],
)
def test_bad_arguments_are_named(change: dict, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        ops.optimize_rounding(**problem(0, 4, 6) | change)
