"""Runs a case: all contenders in turn in one process, their ratios to the limit, their distance from the reference."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from mixbit.bench.cases import CASES, DTYPES, SEARCH_BITS, TENSORS, Case, Inputs, make_inputs
from mixbit.bench.contenders import (
    CONTENDERS,
    NoSuchCase,
    Run,
    Unavailable,
    noise_grids,
    search_gates,
    search_scales,
    search_weights,
    weight_lists,
)
from mixbit.bench.timing import side_by_side
from mixbit.errors import MixbitError, check_choice
from mixbit.ops import _reference


@dataclass(frozen=True)
class Row:
    """One contender in one case.

    Attributes:
        microseconds: Least time of a call.
        median_microseconds: Median time of a call.
        ratio: Least time over the limit's least time.
        median_ratio: The same of medians.
        page_faults: Of a call: pages of fresh memory.
        difference: With a reference check: for each result (y, dx, dscale, noise, ...) the share of elements that are
            further from the reference than rounding explains; None without a check.
    """

    case: str
    tensor: str
    dtype: str
    bits: int
    threads: int
    contender: str
    microseconds: float
    median_microseconds: float
    ratio: float
    median_ratio: float
    page_faults: float
    difference: dict[str, float] | None = None


@dataclass
class Outcome:
    """Rows, and why contenders are missing."""

    rows: list[Row] = field(default_factory=list)
    skipped: list[tuple[str, str, str]] = field(default_factory=list)  # case and tensor, contender, reason


def race(
    case: str,
    tensor: str = "activations",
    *,
    dtype: str = "float32",
    bits: int = 4,
    threads: int = 1,
    contenders: Sequence[str] | None = None,
    repeats: int = 20,
    compiled: bool = True,
    refcheck: bool = False,
    say: Callable[[str], None] | None = None,
) -> Outcome:
    """Measures one case on one tensor.

    Args:
        case: Key of CASES.
        tensor: Key of TENSORS (without effect for "weights").
        dtype: Key of DTYPES.
        bits: Bit-width of the grid.
        threads: For all contenders.
        contenders: Keys of CONTENDERS; None takes all. The limit always takes part.
        repeats: Rounds.
        compiled: Whether contenders that go through torch.compile take part.
        refcheck: Compare results with the reference instead of trusting them.
        say: Is told what is skipped.

    Raises:
        MixbitError: An unknown name, bits outside 2 ... 16, or another dtype than float32 for "weights".
    """
    chosen = CASES[check_choice("case", case, CASES)]
    shape, axis = TENSORS[check_choice("tensor", tensor, TENSORS)]
    kind = DTYPES[check_choice("dtype", dtype, DTYPES)]
    if not 2 <= bits <= 16:
        raise MixbitError(f"bits={bits}: expected 2 to 16")
    if threads < 1 or repeats < 1:
        raise MixbitError(f"threads={threads}, repeats={repeats}: expected at least 1")
    names = list(CONTENDERS) if contenders is None else [check_choice("contender", c, CONTENDERS) for c in contenders]
    outcome = Outcome()
    if chosen.name == "weights":
        if dtype != "float32":
            raise MixbitError(f"dtype={dtype!r}: the case 'weights' is measured in float32 only")
        tensor, shape, axis = "ResNet-18", (64,), None
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    if compiled:
        torch.compiler.reset()  # after a few recompiles torch.compile would run eagerly without a word
    try:
        runs: dict[str, Run] = {}
        for name in dict.fromkeys([chosen.limit, *names]):
            # Inputs of its own: no contender sees the gradients of another.
            inputs = make_inputs(shape, axis, kind, bits, gradient=chosen.gradient)
            contender = CONTENDERS[name]
            try:
                if contender.compiled and not compiled:
                    raise Unavailable("torch.compile is left out")
                runs[name] = contender.prepare(chosen, inputs)
            except NoSuchCase:
                continue
            except Unavailable as reason:
                outcome.skipped.append((f"{case} {tensor}", name, str(reason)))
                if say is not None:
                    say(f"{case} {tensor}: {name} skipped: {reason}")
        differences = _differences(chosen, inputs, runs) if refcheck else {}
        times = side_by_side({name: run.call for name, run in runs.items()}, repeats=repeats)
    finally:
        torch.set_num_threads(before)
    limit = times[chosen.limit]
    for name, t in times.items():
        outcome.rows.append(
            Row(
                case=case,
                tensor=tensor,
                dtype=dtype,
                bits=bits,
                threads=threads,
                contender=name,
                microseconds=round(t.least * 1e6, 3),
                median_microseconds=round(t.median * 1e6, 3),
                ratio=round(t.least / limit.least, 3),
                median_ratio=round(t.median / limit.median, 3),
                page_faults=round(t.page_faults, 1),
                difference=differences.get(name),
            )
        )
    return outcome


def _differences(case: Case, inputs: Inputs, runs: dict[str, Run]) -> dict[str, dict[str, float]]:
    expected = _expected(case, inputs)
    found = {}
    for name, run in runs.items():
        if run.results is None:
            continue
        got = run.results()
        found[name] = {key: _share_away(value, expected[key]) for key, value in got.items() if key in expected}
    return found


def _expected(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """Results of the readable twins."""
    bits = torch.tensor([float(inputs.bits)])
    options: dict[str, Any] = {"signed": True, "narrow_range": False}
    if case.name == "weights":
        ys = [_reference.fake_quantize(*one, axis=0, **options) for one in zip(*weight_lists(inputs), strict=True)]
        return {"y": torch.cat([y.flatten() for y in ys])}
    x = inputs.x.detach()
    if case.name == "noise":
        widths, scales = noise_grids(inputs)
        return {
            "noise": _reference.quantization_noise(x, scales, widths, signed=True, narrow_range=True, axis=inputs.axis)[
                1
            ]
        }
    if case.name in ("gated", "mixture"):
        return _expected_search(case, inputs)
    if not case.gradient:
        return {"y": _reference.fake_quantize(x, inputs.scale, torch.zeros(1), bits, axis=inputs.axis, **options)}
    return _learned_step(inputs, inputs.scale, inputs.bits)


def _learned_step(inputs: Inputs, scale: Tensor, bits: int) -> dict[str, Tensor]:
    """y of one grid, dx and, summed in double, dscale."""
    x, g = inputs.x.detach(), inputs.gradient
    width = torch.tensor([float(bits)])
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    v = x.float() / _reference.along(scale, x, inputs.axis)
    q = torch.clamp(torch.round(v), low, high)
    inside = (v >= low) & (v <= high)
    dscale = (g.double() * torch.where(inside, q - v, q).double()).reshape(1 if inputs.axis is None else x.shape[0], -1)
    y = _reference.fake_quantize(x, scale, torch.zeros(1), width, axis=inputs.axis)
    return {"y": y, "dx": torch.where(inside, g, 0), "dscale": dscale.sum(1).float()}


def _expected_search(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """From the grids one by one, sums in double."""
    scales = search_scales(inputs)
    wide = replace(inputs, x=inputs.x.detach().float())
    grids = [_learned_step(wide, s.reshape(-1), b) for s, b in zip(scales, SEARCH_BITS, strict=True)]
    g = inputs.gradient.double()
    if case.name == "gated":
        z = search_gates()
        weights = _reference.shares(z)
        first, second = (float((g * (b["y"] - a["y"]).double()).sum()) for a, b in pairwise(grids))
        learned = {"dgates": torch.tensor([first + float(z[1]) * second, float(z[0]) * second])}
        dx = grids[-1]["dx"]
    else:
        weights = search_weights()
        dx = sum((w * grid["dx"].float() for w, grid in zip(weights, grids, strict=True)), torch.zeros(1))
        learned = {
            "dscales": torch.cat([w * grid["dscale"] for w, grid in zip(weights, grids, strict=True)]),
            "dweights": torch.stack([(g * grid["y"].double()).sum() for grid in grids]).float(),
        }
    y = sum((w * grid["y"] for w, grid in zip(weights, grids, strict=True)), torch.zeros(1))
    return {"y": y.to(inputs.x.dtype), "dx": dx.to(inputs.x.dtype), **learned}


def _share_away(got: Tensor, expected: Tensor) -> float:
    """Share of elements further from the reference than rounding explains: 1e-3 relative, 1e-2 in sixteen bits.

    A value near zero is held against a hundredth of the mean magnitude: a sum of many terms may cancel.
    """
    tolerance = 1e-3 if expected.dtype in (torch.float32, torch.float64) else 1e-2
    size = expected.double().abs()
    far = (got.double() - expected.double()).abs() > tolerance * (size + 1e-2 * max(1.0, float(size.mean())))
    return round(float(far.double().mean()), 6)


def rows_as_json(outcome: Outcome) -> str:
    """Rows and what was skipped, as a JSON document."""
    return json.dumps(
        {
            "format": "mixbit-bench",
            "version": 1,
            "torch": torch.__version__,
            "rows": [asdict(row) for row in outcome.rows],
            "skipped": [list(entry) for entry in outcome.skipped],
        },
        indent=1,
    )


def rows_as_csv(outcome: Outcome) -> str:
    """Rows as CSV; the differences as `name=share` with semicolons."""
    text = io.StringIO()
    names = [f for f in Row.__dataclass_fields__ if f != "difference"]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*names, "difference"])
    for row in outcome.rows:
        shares = "" if row.difference is None else ";".join(f"{k}={v}" for k, v in row.difference.items())
        writer.writerow([*(getattr(row, name) for name in names), shares])
    return text.getvalue()
