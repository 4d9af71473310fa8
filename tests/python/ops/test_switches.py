"""update_level_switches_ and freeze_oscillating_: golden trajectories, twins, every instruction set, layouts, errors."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from mixbit import ops
from mixbit.ops import _reference as twin

SCORES = ("adj", "pair", "osc", "ema")
KEPT = {"adj": ("counts",), "pair": ("marks", "counts", "runs"), "osc": ("marks", "counts"), "ema": ("marks", "counts")}


def new_state(weight: Tensor, score: str) -> dict[str, Tensor]:
    dtypes = {"marks": torch.int8, "counts": torch.float32 if score == "ema" else torch.int16, "runs": torch.int16}
    return {
        name: torch.zeros_like(weight, dtype=dtype) if name in KEPT[score] else torch.empty(0, dtype=dtype)
        for name, dtype in dtypes.items()
    }


class Watched:
    """One weight under `update_level_switches_`."""

    def __init__(self, weight: Tensor, score: str, extra: Tensor | None = None, **grid: Any) -> None:
        self.score = score
        self.codes = torch.zeros_like(weight, dtype=torch.int8)
        self.state = new_state(weight, score)
        self.extra = torch.empty(0, dtype=torch.uint8) if extra is None else extra
        self.grid = {"scale": torch.ones(1), "bit_width": 4.0, **grid}
        self.see(weight)
        for value in self.state.values():
            value.zero_()

    def see(self, weight: Tensor, momentum: float = 0.1) -> int:
        grid = dict(self.grid)
        scale, bits = grid.pop("scale"), grid.pop("bit_width")
        lists = [
            [weight],
            [scale],
            [bits],
            [self.extra],
            [self.codes],
            *([self.state[k]] for k in new_state(weight, "adj")),
        ]
        return int(ops.update_level_switches_(*lists, score=self.score, momentum=momentum, **grid))


# Codes, first one the start: switches, between contiguous levels, longest run on one pair, oscillations, and the
# averages of oscillations with momentum 0.1 and 0.01.
TRAJECTORIES = [
    ([0, 0, 0, 0, 0, 0, 0, 0], 0, 0, 0, 0, 0.0, 0.0),
    ([0, 1, 0, 1, 0, 1, 0, 1], 7, 7, 7, 6, 0.468559, 0.0585198506),
    ([0, 1, 2, 3, 4, 5, 6, 7], 7, 7, 1, 0, 0.0, 0.0),
    ([0, 1, 1, 0, 0, 1, 1, 0], 4, 4, 4, 3, 0.246610, 0.0294069601),
    ([0, 1, 0, -1, 0, 1, 0, -1], 7, 7, 2, 3, 0.221949, 0.0291128905),
    ([0, 2, 0, 2, 0, 2, 0, 2], 7, 0, 0, 6, 0.468559, 0.0585198506),
    ([3, 3, 2, 3, 3, 3, 2, 3], 4, 4, 4, 3, 0.255610, 0.0295059601),
    ([0, 0, 0, 1, 1, 1, 1, 1], 1, 1, 1, 0, 0.0, 0.0),
    ([1, 0, 1, 2, 1, 2, 1, 0], 7, 7, 4, 4, 0.302949, 0.0389138905),
]


@pytest.mark.parametrize(("codes", "raw", "adj", "pair", "osc", "fast", "slow"), TRAJECTORIES)
def test_golden_trajectories(codes, raw, adj, pair, osc, fast, slow) -> None:
    expected = {"adj": adj, "pair": pair, "osc": osc}
    for score, momentum in (("adj", 0.1), ("pair", 0.1), ("osc", 0.1), ("ema", 0.1), ("ema", 0.01)):
        watched = Watched(torch.tensor([float(codes[0])]), score)
        switches = sum(watched.see(torch.tensor([float(c)]), momentum) for c in codes[1:])
        assert switches == raw
        found = float(watched.state["counts"])
        if score == "ema":
            assert found == pytest.approx(fast if momentum == 0.1 else slow, rel=1e-6, abs=1e-9)
        else:
            assert found == expected[score]


@pytest.mark.parametrize(
    ("latents", "codes", "adj", "osc"),
    [
        ([0.10, 0.24, 0.26, 0.24, 0.26, 0.24], [0, 0, 1, 0, 1, 0], 4, 3),
        ([0.70, 0.74, 0.76, 0.80, 0.76, 0.74], [1, 1, 2, 2, 2, 1], 2, 1),
        (
            [-0.25, -0.26, -0.24, -0.25, -0.2, -0.3],
            [0, -1, 0, 0, 0, -1],
            3,
            2,
        ),  # a threshold belongs to the upper level
    ],
)
def test_latent_trajectories(latents: list[float], codes: list[int], adj: int, osc: int) -> None:
    for score, expected in (("adj", adj), ("osc", osc)):
        watched = Watched(torch.tensor([latents[0]]), score, scale=torch.tensor([0.5]))
        seen = [int(watched.codes)]
        for w in latents[1:]:
            watched.see(torch.tensor([w]))
            seen.append(int(watched.codes))
        assert seen == codes
        assert int(watched.state["counts"]) == expected


def ste(r: Tensor, eta: float, steps: int, burn_in: int, extra: int) -> tuple[Tensor, Tensor]:
    """Straight-through descent of (q(w) - r)^2 / 2 from 0: switches a step, mean squared residual."""
    w = torch.zeros_like(r)
    bits = torch.full_like(w, extra, dtype=torch.uint8)
    watched = Watched(w, "adj", bits)
    residual = torch.zeros_like(r)
    for step in range(steps):
        if step == burn_in:
            watched.state["counts"].zero_()
        q = twin.level_codes(w, torch.ones(1), torch.tensor([4.0]), bits) / 2**extra
        w = w - eta * (q - r)
        watched.see(w)
        residual += (q - r).square() * (step >= burn_in)
    return watched.state["counts"] / (steps - burn_in), residual / (steps - burn_in)


@pytest.mark.parametrize("eta", [0.01, 0.002])
def test_switching_rates_of_one_weight_do_not_depend_on_the_learning_rate(eta: float) -> None:
    r = torch.tensor([0.05, 0.125, 0.25, 0.4, 0.5], dtype=torch.float32)
    rates, residual = ste(r, eta, 9000, 5100, 0)
    assert torch.allclose(rates, 2 * torch.minimum(r, 1 - r), atol=2e-3)
    assert torch.allclose(residual, r * (1 - r), atol=2e-3)


def test_the_level_between_silences_the_weights_that_switched_most() -> None:
    r = torch.tensor([0.05, 0.25, 0.4, 0.5])
    rates, residual = ste(r, 0.01, 6000, 3000, 1)
    assert torch.allclose(rates, torch.tensor([0.2, 1.0, 0.4, 0.0]), atol=2e-3)
    assert torch.allclose(residual, torch.tensor([0.0225, 0.0625, 0.04, 0.0]), atol=2e-3)


SHAPES = [(6, 3, 3, 3), (8, 40), (5,), (0, 4), (70, 300), (4, 2, 1, 1)]


def walks(dtype: torch.dtype, steps: int) -> list[list[Tensor]]:
    """Weights that walk about; all kinds of numbers, NaN and infinities among them, and all kinds of layouts."""
    generator = torch.Generator().manual_seed(0)
    walk = []
    for step in range(steps):
        tensors = []
        for shape in SHAPES:
            w = torch.randn(shape, generator=generator) * (0.1 if step % 2 else 0.4)
            if w.numel() > 20:
                w.view(-1)[step : step + 5] = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e38, -0.0])
            tensors.append(w.to(dtype))
        tensors[0] = tensors[0].contiguous(memory_format=torch.channels_last)
        tensors[1] = tensors[1].t().contiguous().t()
        tensors[4] = tensors[4][:, ::3]
        walk.append(tensors)
    return walk


def grids(weights: list[Tensor], per_channel: bool) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    scales = [torch.linspace(0.1, 0.3, max(1, w.shape[0])) if per_channel else torch.tensor([0.2]) for w in weights]
    bits = [torch.tensor([float(2 + i % 3)]) for i in range(len(weights))]
    extra = [
        torch.empty(0, dtype=torch.uint8) if i % 3 == 2 else (torch.arange(w.numel()) % 3).to(torch.uint8).view(w.shape)
        for i, w in enumerate(weights)
    ]
    return scales, bits, extra


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(
    ("per_channel", "narrow_range", "rounding"), [(True, True, "half_even"), (False, False, "half_up")]
)
def test_counting_equals_the_twin(
    dtype: torch.dtype, score: str, per_channel: bool, narrow_range: bool, rounding: str
) -> None:
    walk = walks(dtype, 4)
    scales, bits, extra = grids(walk[0], per_channel)
    grid = {"narrow_range": narrow_range, "rounding": rounding, "axis": 0 if per_channel else None}
    # States of any layout: those of the weights, and plain ones.
    codes = [torch.zeros_like(w, dtype=torch.int8) for w in walk[0]]
    codes[0] = torch.zeros(SHAPES[0], dtype=torch.int8)
    states = [new_state(w, score) for w in walk[0]]
    expected_codes, expected = ([{k: v.clone() for k, v in s.items()} for s in states] for _ in range(2))
    expected_codes = [c.clone() for c in codes]
    for weights in walk:
        before = [w.clone() for w in weights]
        found = ops.update_level_switches_(
            weights, scales, bits, extra, codes, *([s[k] for s in states] for k in states[0]), score=score, **grid
        )
        wanted = [
            twin.update_level_switches_(w, c, s, score=score, scale=sc, bit_width=b, extra_bits=e, **grid)
            for w, c, s, sc, b, e in zip(weights, expected_codes, expected, scales, bits, extra, strict=True)
        ]
        assert found.tolist() == wanted
        for i in range(len(weights)):
            assert torch.equal(codes[i], expected_codes[i])
            for name in KEPT[score]:
                assert torch.equal(states[i][name], expected[i][name]), name
            assert torch.equal(weights[i].nan_to_num(7), before[i].nan_to_num(7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("per_channel", "narrow_range", "rounding"), [(True, True, "half_even"), (False, False, "half_up")]
)
def test_freezing_equals_the_twin(dtype: torch.dtype, per_channel: bool, narrow_range: bool, rounding: str) -> None:
    walk = walks(dtype, 8)
    scales, bits, extra = grids(walk[0], per_channel)
    grid = {"narrow_range": narrow_range, "rounding": rounding, "axis": 0 if per_channel else None}
    names = {"codes": torch.int8, "marks": torch.int8, "frequencies": torch.float32, "averages": torch.float32}
    states = [{k: torch.zeros_like(w, dtype=d) for k, d in names.items()} for w in walk[0]]
    expected = [{k: v.clone() for k, v in s.items()} for s in states]
    for step, weights in enumerate(walk):
        copies = [w.clone() for w in weights]
        threshold = 0.15 if step > 2 else 0.0
        found = ops.freeze_oscillating_(
            weights,
            scales,
            bits,
            extra,
            *([s[k] for s in states] for k in names),
            threshold=threshold,
            momentum=0.1,
            **grid,
        )
        wanted = [
            twin.freeze_oscillating_(
                w, **s, scale=sc, bit_width=b, extra_bits=e, threshold=threshold, momentum=0.1, **grid
            )
            for w, s, sc, b, e in zip(copies, expected, scales, bits, extra, strict=True)
        ]
        assert found.tolist() == wanted
        for i in range(len(weights)):
            for name in names:
                assert torch.equal(states[i][name], expected[i][name]), name
            assert torch.equal(weights[i].nan_to_num(7), copies[i].nan_to_num(7))
            assert weights[i].stride() == walk[step][i].stride()
    assert found[4] > 0


def test_a_frozen_weight_follows_its_scale_and_keeps_its_code() -> None:
    names = {"codes": torch.int8, "marks": torch.int8, "frequencies": torch.float32, "averages": torch.float32}
    state = [[torch.zeros(1, dtype=d)] for d in names.values()]
    none = [torch.empty(0, dtype=torch.uint8)]
    for w in (0.3, 0.2, 0.3, 0.2):
        ops.freeze_oscillating_(
            [torch.tensor([w])], [torch.tensor([0.5])], [2], none, *state, threshold=0.0, momentum=0.5
        )
    weight = torch.tensor([0.3])
    version = weight._version
    assert ops.freeze_oscillating_([weight], [torch.tensor([0.5])], [2], none, *state, threshold=0.4).tolist() == [1]
    level = float(weight)
    assert level in (0.0, 0.5)
    assert weight._version > version
    for scale, moved in ((0.5, 0.9), (0.7, -3.0)):
        weight = torch.tensor([moved])
        ops.freeze_oscillating_([weight], [torch.tensor([scale])], [2], none, *state, threshold=0.0)
        assert float(weight) == pytest.approx(level / 0.5 * scale)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.floats(-2, 2, width=32), min_size=9, max_size=9), min_size=2, max_size=12),
    st.sampled_from(SCORES),
    st.integers(2, 6),
    st.integers(0, 2),
)
def test_properties(walk: list[list[float]], score: str, bits: int, extra: int) -> None:
    weights = [torch.tensor(w).view(3, 3) for w in walk]
    levels = torch.full((3, 3), extra, dtype=torch.uint8)
    watched = Watched(weights[0], score, levels, scale=torch.tensor([0.3]), bit_width=float(bits))
    raw = torch.zeros(3, 3)
    before = watched.codes.clone()
    for w in weights[1:]:
        count = watched.see(w)
        raw += watched.codes != before
        assert count == int((watched.codes != before).sum())
        assert watched.see(w) == 0 or score == "ema"  # the same weights again switch nothing
        before = watched.codes.clone()
        low, high = -(2 ** (bits + extra - 1)), 2 ** (bits + extra - 1) - 1
        assert int(before.min()) >= low
        assert int(before.max()) <= high
    counts = watched.state["counts"]
    assert bool((counts >= 0).all())
    assert bool((counts <= (1 if score == "ema" else raw)).all())
    assert bool((counts[raw == 0] == 0).all())


def test_counts_saturate() -> None:
    watched = Watched(torch.zeros(20), "adj")
    watched.state["counts"].fill_(32766)
    for w in (1.0, 0.0, 1.0):
        watched.see(torch.full((20,), w))
    assert watched.state["counts"].tolist() == [32767] * 20


def test_the_same_whatever_the_threads() -> None:
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            generator = torch.Generator().manual_seed(3)
            watched = Watched(torch.zeros(300, 400), "ema", scale=torch.rand(300, generator=generator) + 0.1, axis=0)
            counts = [watched.see(torch.randn(300, 400, generator=generator)) for _ in range(3)]
            results.append((counts, watched.codes, watched.state["counts"]))
    finally:
        torch.set_num_threads(before)
    assert results[0][0] == results[1][0]
    assert all(torch.equal(a, b) for a, b in zip(results[0][1:], results[1][1:], strict=True))


_DIGEST = """
import hashlib, sys, torch
sys.path.insert(0, {folder!r})
from test_switches import SCORES, grids, new_state, walks
from mixbit import ops
digest = hashlib.sha256()
for dtype in (torch.float32, torch.bfloat16):
    walk = walks(dtype, 5)
    scales, bits, extra = grids(walk[0], True)
    for score in SCORES:
        codes = [torch.zeros_like(w, dtype=torch.int8) for w in walk[0]]
        states = [new_state(w, score) for w in walk[0]]
        for weights in walk:
            ops.update_level_switches_(weights, scales, bits, extra, codes, *([s[k] for s in states] for k in states[0]),
                                       score=score, axis=0)
        for t in [*codes, *(v for s in states for v in s.values())]:
            digest.update(t.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    names = [torch.int8, torch.int8, torch.float32, torch.float32]
    states = [[torch.zeros_like(w, dtype=d) for w in walk[0]] for d in names]
    for weights in walk:
        ops.freeze_oscillating_(weights, scales, bits, extra, *states, threshold=0.05, momentum=0.1, axis=0)
        for t in [*weights, *(v for s in states for v in s)]:
            digest.update(t.nan_to_num(7).contiguous().flatten().view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


def test_every_instruction_set_gives_the_same_bits() -> None:
    from pathlib import Path

    digests = set()
    for isa in ("scalar", "avx2", "avx512"):
        environment = {**os.environ, "MIXBIT_CPU_ISA": isa}
        script = _DIGEST.format(folder=str(Path(__file__).parent))
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
        )
        digests.add(done.stdout)
    assert len(digests) == 1


@pytest.mark.parametrize("score", SCORES)
def test_opcheck(score: str) -> None:
    weights = [torch.randn(4, 3), torch.randn(2, 5, 1, 1)]
    scales, bits, extra = grids(weights, True)
    states = [new_state(w, score) for w in weights]
    lists = [[torch.zeros_like(w, dtype=torch.int8) for w in weights], *([s[k] for s in states] for k in states[0])]
    opcheck(
        torch.ops.mixbit.update_level_switches_.default,
        (weights, scales, bits, extra, *lists),
        {"score": ops.SWITCH_SCORES[score], "axis": 0},
    )


def test_opcheck_of_freezing_and_no_gradient() -> None:
    weights = [torch.randn(4, 3), torch.randn(2, 5, 1, 1)]
    scales, bits, extra = grids(weights, True)
    dtypes = (torch.int8, torch.int8, torch.float32, torch.float32)
    states = [[torch.zeros_like(w, dtype=d) for w in weights] for d in dtypes]
    opcheck(
        torch.ops.mixbit.freeze_oscillating_.default,
        (weights, scales, bits, extra, *states),
        {"threshold": 0.2, "axis": 0},
    )
    leaves = [w.requires_grad_() for w in weights]  # Parameters of a model
    assert not ops.freeze_oscillating_(leaves, scales, bits, extra, *states, threshold=0.2, axis=0).requires_grad
    assert all(w.requires_grad and w.is_leaf for w in leaves)


def test_no_weights_at_all() -> None:
    assert ops.update_level_switches_([], [], [], [], [], [], [], []).tolist() == []
    assert ops.freeze_oscillating_([], [], [], [], [], [], [], [], threshold=0.1).tolist() == []


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"scales": []}, "scales has 0 tensors and weights 1"),
        ({"weights": [torch.zeros(3, dtype=torch.int64)]}, "weight has dtype Long.*tensor 0 of the list"),
        ({"scales": [torch.zeros(1)]}, "expected a positive finite number"),
        ({"scales": [torch.ones(2)]}, r"scale has shape \[2\]"),
        ({"bit_widths": [torch.tensor([9.0])]}, r"bit_width\[0\]=9: expected at most 8"),
        ({"bit_widths": [torch.tensor([2.5])]}, "whole number from 1 to 16"),
        ({"extra_bits": [torch.zeros(3)]}, "extra_bits is Float"),
        ({"extra_bits": [torch.zeros(2, dtype=torch.uint8)]}, r"extra_bits is Byte \[2\]: expected Byte \[3\]"),
        ({"extra_bits": [torch.full((3,), 3, dtype=torch.uint8)]}, "extra_bits holds 3 with bit_width 4"),
        (
            {"extra_bits": [torch.tensor([0, 2, 0], dtype=torch.uint8)], "bit_widths": [torch.tensor([7.0])]},
            "extra_bits holds 2 with bit_width 7: expected at most 2, and together at most 8",
        ),
        ({"codes": [torch.zeros(3)]}, r"codes is Float \[3\]: expected Char \[3\]"),
        ({"counts": [torch.zeros(4, dtype=torch.int16)]}, r"counts is Short \[4\]: expected Short \[3\]"),
        ({"marks": [torch.zeros(3, dtype=torch.int8)]}, "marks has shape .*the score keeps none"),
        ({"score": "swaps"}, "score='swaps'"),
        ({"momentum": 0.0}, "momentum=0"),
        ({"rounding": "up"}, "rounding='up'"),
        ({"axis": 1}, "axis=1 is out of range"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], complaint: str) -> None:
    arguments: dict[str, Any] = {
        "weights": [torch.zeros(3)],
        "scales": [torch.ones(1)],
        "bit_widths": [torch.tensor([4.0])],
        "extra_bits": [torch.empty(0, dtype=torch.uint8)],
        "codes": [torch.zeros(3, dtype=torch.int8)],
        "marks": [torch.empty(0, dtype=torch.int8)],
        "counts": [torch.zeros(3, dtype=torch.int16)],
        "runs": [torch.empty(0, dtype=torch.int16)],
    }
    with pytest.raises(ValueError, match="(?s)" + complaint):
        ops.update_level_switches_(**arguments | change)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"threshold": 1.5}, "threshold=1.5"),
        ({"threshold": float("nan")}, "threshold=nan"),
        ({"bit_widths": [torch.tensor([7.0])]}, r"bit_width\[0\]=7: expected at most 6"),
        ({"averages": [torch.zeros(3, dtype=torch.float64)]}, "averages is Double"),
        ({"marks": [torch.zeros(2, dtype=torch.int8)]}, r"marks is Char \[2\]"),
    ],
)
def test_bad_arguments_of_freezing_are_named(change: dict[str, Any], complaint: str) -> None:
    arguments: dict[str, Any] = {
        "weights": [torch.zeros(3)],
        "scales": [torch.ones(1)],
        "bit_widths": [torch.tensor([4.0])],
        "extra_bits": [torch.empty(0, dtype=torch.uint8)],
        "codes": [torch.zeros(3, dtype=torch.int8)],
        "marks": [torch.zeros(3, dtype=torch.int8)],
        "frequencies": [torch.zeros(3)],
        "averages": [torch.zeros(3)],
        "threshold": 0.1,
    }
    with pytest.raises(ValueError, match="(?s)" + complaint):
        ops.freeze_oscillating_(**arguments | change)
