"""The report: one self-contained HTML file, static, no scripts, the same bytes for the same results."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import jinja2

from mixbit.recipe import Recipe
from mixbit.report.svg import bits_chart, front_chart, heat_map, stacked_bars, standalone
from mixbit.tables import CostTable, SensitivityTable

__all__ = ["bits_figure", "front_chart", "render", "stacked_bars", "standalone"]

BASELINES = (32, 16, 8)


def render(
    *,
    title: str,
    layers: Sequence[Mapping[str, Any]],
    float_modules: Sequence[Mapping[str, Any]],
    table: SensitivityTable,
    costs: Mapping[str, CostTable],
    recipe: Recipe,
    evaluation: Mapping[str, Any] | None,
    assignment: Mapping[str, Any],
    options: Mapping[str, Any],
) -> str:
    """Builds the report.

    Args:
        title: Heading.
        layers: One mapping per layer with name, kind, macs, weights, input_group.
        float_modules: What stays float: name, kind, macs, reason.
        table: Sensitivity.
        costs: Cost tables by name.
        recipe: The bits.
        evaluation: Metrics of float, quantized and integer network, predicted and measured SQNR; None if not run.
        assignment: The report of `assign`.
        options: Options of every stage, and versions.

    Returns:
        HTML.
    """
    noise = {name: _noise(table, name, recipe) for name in table.layers}
    total = sum(noise.values())
    rows = []
    for layer in layers:
        name = str(layer["name"])
        precision = recipe[name]
        rows.append(
            {
                **layer,
                "act": precision.act,
                "weight": precision.weight,
                "sqnr": _db(noise.get(name)),
                "share": None if not total or name not in noise else 100.0 * noise[name] / total,
            }
        )
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    source = resources.files("mixbit.report").joinpath("report.html.j2").read_text(encoding="utf-8")
    diagonal = table.diagonal()
    return environment.from_string(source).render(
        title=title,
        rows=rows,
        float_modules=float_modules,
        evaluation=evaluation,
        assignment=assignment,
        costs=[_cost_row(name, cost, recipe) for name, cost in costs.items()],
        baselines=BASELINES,
        heat=jinja2.filters.Markup(heat_map(diagonal.layers, diagonal.act_bits, diagonal.sqnr_db.tolist())),
        bars=jinja2.filters.Markup(bits_chart([(str(r["name"]), r["act"], r["weight"]) for r in rows])),
        options=options,
        table=table,
    )


def _noise(table: SensitivityTable, name: str, recipe: Recipe) -> float:
    """Noise-to-signal ratio of a layer at its bits; 0 where it is float."""
    precision = recipe[name]
    if precision.act is None and precision.weight is None:
        return 0.0
    return float(10.0 ** (-table.entry(name, precision.act, precision.weight) / 10.0))


def _db(ratio: float | None) -> str:
    if ratio is None:
        return ""
    return "exact" if ratio <= 0 else f"{-10 * math.log10(ratio):.1f}"


def _cost_row(name: str, cost: CostTable, recipe: Recipe) -> dict[str, Any]:
    """Cost of the recipe and how much less it is than each uniform baseline."""
    total = cost.total(recipe)
    less = [100.0 * (1.0 - total / cost.uniform(b, b)) for b in BASELINES]
    return {"name": name, "unit": cost.unit, "total": total, "less": less}


def bits_figure(recipe: Recipe, names: Sequence[str]) -> Any:
    """Bits per layer as bars; needs matplotlib, returns its Figure.

    Args:
        recipe: The bits.
        names: Layers in the order to show.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(5.0, 0.3 * len(names)), 3.2), layout="constrained")
    axes = figure.subplots()
    places = range(len(names))
    for offset, kind in ((-0.2, "weight"), (0.2, "act")):
        bits = [getattr(recipe[name], kind) or 32 for name in names]
        axes.bar([p + offset for p in places], bits, 0.4, label=kind)
    axes.set_xticks(list(places), list(names), rotation=90, fontsize=7)
    axes.set_ylabel("bits")
    axes.legend()
    return figure
