"""Threshold-aware steps: golden multipliers, the bits of torch's optimizers, the twin, layouts, scaler, errors."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from mixbit import ops
from mixbit.ops import _reference

SHAPES = [(6, 3, 3, 3), (8, 40), (5,), (0, 4), (70, 300), (4, 2, 1, 1), ()]
TYPES = [torch.float32, torch.bfloat16, torch.float16]


def tensors(seed: int, dtype: torch.dtype = torch.float32, size: float = 0.3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = [(size * torch.randn(shape, generator=generator)).to(dtype) for shape in SHAPES]
    made[0] = made[0].contiguous(memory_format=torch.channels_last)
    return made


def grids(weights: list[Tensor], per_channel: bool, extra: bool) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)
    rows = [w.shape[0] if w.dim() else 1 for w in weights]
    return {
        "scales": [torch.linspace(0.1, 0.3, r) if per_channel and r else torch.tensor([0.2]) for r in rows],
        "bit_widths": [torch.tensor([2.0 + i % 3]) for i in range(len(weights))],
        "extra_bits": [
            torch.randint(0, 3, w.shape, generator=generator, dtype=torch.uint8) if extra and i != 1 else None
            for i, w in enumerate(weights)
        ],
        "narrow_range": [i % 2 == 0 for i in range(len(weights))],
    }


def multipliers(weights: list[Tensor], shape: str, grid: dict[str, Any]) -> list[Tensor]:
    return [
        _reference.step_multiplier(_reference.threshold_distance(w, s, b, e, narrow), shape, 0.1, 0.125)
        for w, s, b, e, narrow in zip(
            weights,
            grid["scales"],
            grid["bit_widths"],
            grid["extra_bits"],
            grid["narrow_range"],
            strict=True,
        )
    ]


def test_golden_distances_and_multipliers() -> None:
    weight = torch.tensor([0.25, 0.0, 0.3, -0.20, 0.25, 0.125])
    extra = torch.tensor([0, 0, 0, 0, 1, 1], dtype=torch.uint8)
    (twice,) = ops.threshold_multipliers(
        [weight], [torch.tensor([0.5])], [2], [extra], shape="linear", alpha=0.0, rho=0.5
    )
    assert torch.allclose(twice / 2, torch.tensor([0.0, 0.5, 0.1, 0.1, 0.5, 0.0]), atol=1e-6)
    at = 0.5 * (0.5 + torch.tensor([0.0, 0.05, 0.1, 0.125, 0.2, 0.5]))
    for shape, expected in {
        "step": [0.1, 0.1, 0.1, 1, 1, 1],
        "linear": [0.1, 0.46, 0.82, 1, 1, 1],
        "gauss": [0.1, 0.233071, 0.525437, 0.668909, 0.930426, 1.0],
        "off": [1.0] * 6,
    }.items():
        (got,) = ops.threshold_multipliers([at], [torch.tensor([0.5])], [4], shape=shape)
        assert torch.allclose(got, torch.tensor(expected, dtype=torch.float32), atol=2e-6), shape


@pytest.mark.parametrize("shape", ["off", "step", "linear", "gauss"])
@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("per_channel", [False, True])
def test_multipliers_equal_the_twin(shape: str, extra: bool, per_channel: bool) -> None:
    weights = tensors(0)
    weights[1][0, :4] = torch.tensor([torch.inf, -torch.inf, torch.nan, 1e30])
    grid = grids(weights, per_channel, extra)
    for w, got, expected in zip(
        weights, ops.threshold_multipliers(weights, **grid, shape=shape), multipliers(weights, shape, grid), strict=True
    ):
        assert got.stride() == w.stride()
        assert torch.allclose(got, expected, atol=2e-7) if shape == "gauss" else torch.equal(got, expected)


OPTIONS = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "weight_decay": 1e-2, "nesterov": True},
    {"momentum": 0.8, "dampening": 0.3, "weight_decay": 1e-2, "maximize": True},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_off_has_the_bits_of_torchs_sgd(options: dict[str, Any]) -> None:
    weights = [torch.nn.Parameter(w) for w in tensors(0)]
    own = [w.detach().clone() for w in weights]
    momenta = [torch.full_like(w, torch.nan) for w in own] if "momentum" in options else []
    optimizer = torch.optim.SGD(weights, lr=0.1, foreach=False, **options)
    for step in range(4):
        grads = tensors(step + 1)
        for w, g in zip(weights, grads, strict=True):
            w.grad = g.clone()
        optimizer.step()
        ops.threshold_aware_step_(
            own, grads, momenta, **grids(own, True, False), lr=0.1, shape="off", first_step=step == 0, **options
        )
    for w, o in zip(weights, own, strict=True):
        assert torch.equal(w, o)
    for w, m in zip(weights, momenta, strict=False):
        assert torch.equal(optimizer.state[w]["momentum_buffer"], m)


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("options", [{}, {"amsgrad": True, "maximize": True, "betas": (0.3, 0.9)}])
def test_off_is_torchs_adam_to_the_rounding_of_its_square_root(decoupled: bool, options: dict[str, Any]) -> None:
    weights = [torch.nn.Parameter(w) for w in tensors(0)]
    own = [w.detach().clone() for w in weights]
    moments = [[torch.zeros_like(w) for w in own] for _ in range(3)]
    make = torch.optim.AdamW if decoupled else torch.optim.Adam
    optimizer = make(weights, lr=0.1, weight_decay=0.1, foreach=False, **options)
    steps = [torch.tensor(0.0) for _ in own]
    for step in range(4):
        grads = tensors(step + 1)
        for w, g in zip(weights, grads, strict=True):
            w.grad = g.clone()
        optimizer.step()
        for s in steps:
            s += 1
        ops.threshold_aware_adam_step_(
            own,
            grads,
            *(moments if options else [*moments[:2], []]),
            steps,
            **grids(own, True, False),
            lr=0.1,
            weight_decay=0.1,
            decoupled=decoupled,
            shape="off",
            **options,
        )
    for w, o, first, second in zip(weights, own, *moments[:2], strict=True):
        for got, wanted in ((o, w), (first, optimizer.state[w]["exp_avg"]), (second, optimizer.state[w]["exp_avg_sq"])):
            assert torch.allclose(got, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", ["step", "linear", "gauss"])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("on_grad", [False, True])
def test_sgd_equals_the_twin(shape: str, dtype: torch.dtype, on_grad: bool) -> None:
    weights, grads, momenta = (tensors(s, dtype) for s in range(3))
    grid = grids(weights, True, True)
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2, "nesterov": True, "on_grad": on_grad}
    expected = [
        _reference.sgd_step(w, g, m, f, **options)
        for w, g, m, f in zip(weights, grads, momenta, multipliers(weights, shape, grid), strict=True)
    ]
    ops.threshold_aware_step_(weights, grads, momenta, **grid, **options, shape=shape)
    for w, m, (new, buffer) in zip(weights, momenta, expected, strict=True):
        close = {"atol": 1e-6, "rtol": 1e-2 if dtype != torch.float32 else 1e-5}
        for got, wanted in ((w, new), (m, buffer)):
            assert torch.allclose(got, wanted, **close) if shape == "gauss" else torch.equal(got, wanted)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("decoupled", [True, False])
def test_adam_equals_the_twin(dtype: torch.dtype, decoupled: bool) -> None:
    weights, grads, first = (tensors(s, dtype) for s in range(3))
    second, largest = ([t.abs() for t in tensors(s, dtype)] for s in (3, 4))
    grid = grids(weights, False, True)
    options = {"lr": 0.1, "weight_decay": 0.1, "decoupled": decoupled}
    expected = [
        _reference.adam_step(w, g, m, v, x, f, step=3, **options)
        for w, g, m, v, x, f in zip(
            weights, grads, first, second, largest, multipliers(weights, "step", grid), strict=True
        )
    ]
    steps = [torch.tensor(3.0)] * len(weights)
    ops.threshold_aware_adam_step_(weights, grads, first, second, largest, steps, **grid, **options, amsgrad=True)
    for got, wanted in zip(zip(weights, first, second, largest, strict=True), expected, strict=True):
        for a, b in zip(got, wanted, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", TYPES)
def test_scaled_updates_equal_the_twin(dtype: torch.dtype) -> None:
    before, after = tensors(0, dtype), tensors(1, dtype)
    grid = grids(before, True, True)
    expected = [
        _reference.scaled_update(b, a, f)
        for b, a, f in zip(before, after, multipliers(before, "linear", grid), strict=True)
    ]
    ops.scale_updates_(after, before, **grid, shape="linear")
    assert all(torch.equal(a, e) for a, e in zip(after, expected, strict=True))


def test_any_layout_gives_the_same_values() -> None:
    results = []
    for layout in ("contiguous", "channels_last", "transposed", "strided"):
        generator = torch.Generator().manual_seed(0)
        parts = []
        for _ in range(3):
            plain = torch.randn(6, 4, 5, 3, generator=generator)
            if layout == "channels_last":
                plain = plain.contiguous(memory_format=torch.channels_last)
            elif layout == "transposed":
                plain = plain.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0)
            elif layout == "strided":
                plain = torch.stack([plain, plain], -1)[..., 0]
            parts.append(plain)
        weight, grad, momentum = parts
        extra = (torch.arange(360).reshape(6, 4, 5, 3) % 3).to(torch.uint8)
        ops.threshold_aware_step_(
            [weight], [grad], [momentum], [torch.linspace(0.1, 0.3, 6)], [3.0], [extra], lr=0.1, momentum=0.9
        )
        results.append((weight, momentum))
    for weight, momentum in results[1:]:
        assert torch.equal(weight, results[0][0])
        assert torch.equal(momentum, results[0][1])


def test_scaled_gradients_are_divided_and_a_bad_step_is_left_out() -> None:
    def run(**options: Any) -> list[Tensor]:
        weights, grads, momenta = (tensors(s) for s in range(3))
        if options:
            for g in grads:
                g.mul_(8)
        ops.threshold_aware_step_(
            weights, grads, momenta, **grids(weights, True, True), lr=0.1, momentum=0.9, **options
        )
        return [*weights, *momenta, *grads]

    plain = run()
    scaled = run(grad_scale=torch.tensor(8.0), found_inf=torch.tensor(0.0))
    assert all(torch.equal(a, b) for a, b in zip(plain, scaled, strict=True))
    left = run(grad_scale=torch.tensor(8.0), found_inf=torch.tensor(1.0))
    untouched = [*tensors(0), *tensors(2), *(g * 8 for g in tensors(1))]
    assert all(torch.equal(a, b) for a, b in zip(left, untouched, strict=True))


def test_the_rate_may_be_a_tensor_and_writes_are_seen_by_autograd() -> None:
    weight = torch.randn(4, 4, requires_grad=True)
    output = (weight**2).sum()
    twin = weight.detach().clone()
    with torch.no_grad():
        for w, lr in ((weight, torch.tensor(0.1, dtype=torch.float64)), (twin, 0.1)):
            ops.threshold_aware_step_([w], [torch.ones(4, 4)], [], [torch.tensor([0.5])], [4], lr=lr)
    assert torch.equal(weight, twin)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()


def test_opcheck() -> None:
    weights, grads, momenta = ([t for t in tensors(s) if t.numel()] for s in range(3))
    grid = grids(weights, True, True)
    extra = [torch.empty(0, dtype=torch.uint8) if e is None else e for e in grid["extra_bits"]]
    lists = (grid["scales"], grid["bit_widths"], extra)
    shared = {"narrow_range": grid["narrow_range"], "shape": 1, "alpha": 0.1, "rho": 0.125}
    sgd = {"momentum": 0.9, "dampening": 0.0, "weight_decay": 1e-4, "nesterov": False, "maximize": False}
    adam = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "decoupled": True, "maximize": False}
    lr = torch.tensor(0.1)
    opcheck(
        torch.ops.mixbit.threshold_aware_step_,
        (weights, grads, momenta, *lists, lr),
        {**shared, **sgd, "on_grad": False, "first_step": False, "grad_scale": torch.tensor(2.0)},
    )
    moments = [[t.abs() for t in momenta] for _ in range(3)]
    opcheck(
        torch.ops.mixbit.threshold_aware_adam_step_,
        (weights, grads, *moments, [torch.tensor(2.0) for _ in weights], *lists, lr),
        {**shared, **adam, "on_grad": False, "amsgrad": True},
    )
    opcheck(torch.ops.mixbit.scale_updates_, (weights, grads, *lists), shared)
    opcheck(torch.ops.mixbit.threshold_multipliers, (weights, *lists), shared)


def test_a_compiled_step_follows_a_tensor_rate_without_a_recompile() -> None:
    weights, grads, momenta = (tensors(s)[:2] for s in range(3))
    eager = [w.clone() for w in weights], [m.clone() for m in momenta]
    grid = grids(weights, True, True)
    count = 0

    def backend(graph: Any, inputs: Any) -> Any:
        nonlocal count
        count += 1
        return graph.forward

    def step(ws: list[Tensor], ms: list[Tensor], lr: Tensor) -> None:
        ops.threshold_aware_step_(ws, grads, ms, **grid, lr=lr, momentum=0.9)

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    lr = torch.tensor(0.1)
    for value in (0.1, 0.05, 0.01):
        lr.fill_(value)
        compiled(weights, momenta, lr)
        step(*eager, lr)
    assert count == 1
    assert all(torch.equal(a, b) for a, b in zip(weights, eager[0], strict=True))


def digest() -> str:
    """Of what steps of all shapes leave."""
    found = hashlib.sha256()
    for shape in ops.STEP_SHAPES:
        weights, grads, momenta = (tensors(s) for s in range(3))
        grid = grids(weights, True, True)
        ops.threshold_aware_step_(weights, grads, momenta, **grid, lr=0.1, momentum=0.9, shape=shape)
        second = [m.abs() for m in momenta]
        steps = [torch.tensor(2.0)] * len(weights)
        ops.threshold_aware_adam_step_(weights, grads, momenta, second, [], steps, **grid, lr=0.1, shape=shape)
        for t in [*weights, *momenta, *second]:
            found.update(t.contiguous().numpy().tobytes())
    return found.hexdigest()


@pytest.mark.parametrize("isa", ["scalar", "avx2"])
def test_every_instruction_set_gives_the_same_bits(isa: str) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_steps; print(test_steps.digest())"
    )
    environment = os.environ | {"MIXBIT_CPU_ISA": isa}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert run.stdout.strip() == digest()


def test_errors_name_the_argument_and_the_tensor() -> None:
    w, g = torch.randn(4, 3), torch.randn(4, 3)
    scale = torch.tensor([0.1])

    def call(**changed: Any) -> None:
        arguments = {
            "weights": [w.clone()],
            "grads": [g],
            "momenta": [],
            "scales": [scale],
            "bit_widths": [4],
            "extra_bits": None,
            "lr": 0.1,
        } | changed
        ops.threshold_aware_step_(**arguments)

    for changed, message in (
        ({"shape": "stop"}, "shape='stop' is not known.*did you mean 'step'"),
        ({"alpha": 1.5}, "alpha=1.5: expected a number from 0 to 1"),
        ({"rho": 0.0}, "rho=0: expected a number above 0"),
        ({"grads": []}, "grads has 0 entries and weights 1"),
        ({"grads": [g[:2]]}, r"grad is Float \[2, 3\]: expected Float \[4, 3\]"),
        ({"momenta": [], "momentum": 0.9}, "momenta has 0 entries"),
        ({"momenta": [g.half()], "momentum": 0.9}, "momentum is Half"),
        ({"scales": [torch.ones(3)]}, r"scale has shape \[3\]: expected \[1\] or \[4\]"),
        ({"scales": [torch.zeros(1)]}, r"scale\[0\]=0"),
        ({"bit_widths": [2.5]}, r"bit_width\[0\]=2.5"),
        ({"bit_widths": [1], "narrow_range": True}, "narrow_range leaves only the level 0"),
        ({"narrow_range": [True, False]}, "narrow_range has 2 entries"),
        ({"extra_bits": [torch.zeros(4, 2, dtype=torch.uint8)]}, r"extra_bits is Byte \[4, 2\]"),
        ({"extra_bits": [torch.zeros(4, 3)]}, "extra_bits is Float"),
        ({"lr": torch.ones(2)}, r"lr is Float \[2\]"),
        ({"weights": [w.int()]}, "weight has dtype Int"),
    ):
        with pytest.raises(ValueError, match=message):
            call(**changed)
    with pytest.raises(ValueError, match="tensor 1 of the list"):
        ops.threshold_aware_step_([w, w], [g, g], [], [scale, torch.ones(9)], [4, 4], lr=0.1)
    ops.threshold_aware_step_([], [], [], [], [], lr=0.1)
    assert ops.threshold_multipliers([], [], []) == []
