"""The report: one self-contained HTML file, static, no scripts, the same bytes for the same results."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import jinja2

from mixbit.errors import MixbitError
from mixbit.recipe import Recipe
from mixbit.report.svg import (
    Bar,
    Dot,
    Kernel,
    bits_chart,
    heat_map,
    line_chart,
    paired_bars,
    roofline,
    scatter,
    stacked_bars,
    standalone,
    strips,
)
from mixbit.tables import FLOAT_BITS, CostTable, SensitivityTable, channel_counts, mean_weight_bits

__all__ = [
    "Dot",
    "bits_figure",
    "latency_chart",
    "loss_curve",
    "number",
    "render",
    "roofline_chart",
    "scatter",
    "stacked_bars",
    "standalone",
]

BASELINES = (32, 16, 8)
#: Metrics that are percent.
PERCENT = ("top1", "top5", "coco_map", "ap50")


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
    sweep: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    refinement: Mapping[str, Any] | None = None,
    search: Mapping[str, Any] | None = None,
    runtime: Mapping[str, Any] | None = None,
    distances: Mapping[str, Mapping[str, Sequence[int]]] | None = None,
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
        sweep: The document of a sweep (`sweep.json`); None if not run.
        training: The history of the training at the recipe's bits (`history.json`); None if not trained.
        refinement: How `recipe` was refined (`refinement.json`); None if it was not.
        search: The history of the search that made the recipe (`search.json`); None if another method did.
        runtime: Times of the steps of the integer network (`mixbit-run --profile`); None if not measured.
        distances: Weights of each layer by their distance from the nearest decision threshold, "before" and "after" the
            training (`thresholds.json`); None if not trained.

    Returns:
        HTML.
    """
    found = {name: _noise(table, name, recipe) for name in table.layers}
    noise = {name: ratio for name, ratio in found.items() if ratio is not None}
    total = sum(noise.values()) if len(noise) == len(found) else 0.0
    rows = []
    for layer in layers:
        name = str(layer["name"])
        precision = recipe[name]
        rows.append(
            {
                **layer,
                "act": precision.act,
                "weight": None if precision.weight is None else _shown(recipe, name),
                "channels": ", ".join(f"{n} at {bits}" for bits, n in channel_counts(recipe, name).items()),
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
        number=number,
        table=table,
        sweeps=[] if sweep is None else [_sweep_of(sweep, cost) for cost in sweep["costs"]],
        sweep=sweep,
        training=training,
        curve="" if training is None else jinja2.filters.Markup(loss_curve(training["loss"])),
        switching="" if training is None else jinja2.filters.Markup(switch_curve(training)),
        distances=[] if distances is None else [jinja2.filters.Markup(svg) for svg in distance_pictures(distances)],
        levels=[] if training is None else extra_levels(recipe, training),
        searched=[] if search is None else [jinja2.filters.Markup(svg) for svg in search_pictures(search, assignment)],
        predicted=_predicted(assignment["predicted_sqnr_db"] if refinement is None else recipe.sqnr_db),
        refinement=refinement,
        runtime=runtime,
        slowest=[] if runtime is None else sorted(runtime["steps"], key=lambda step: -step["ms"])[:12],
        roof="" if runtime is None else jinja2.filters.Markup(roofline_chart(runtime)),
        latencies=None if refinement is None else jinja2.filters.Markup(latency_chart(refinement)),
    )


def loss_curve(losses: Sequence[float], points: int = 60) -> str:
    """Loss of a training run over its steps, averaged over windows so that no more than so many points are drawn."""
    window = math.ceil(len(losses) / points)
    parts = [losses[i : i + window] for i in range(0, len(losses), window)]
    ends = [min((i + 1) * window, len(losses)) for i in range(len(parts))]
    means = [(float(end), math.fsum(part) / len(part)) for end, part in zip(ends, parts, strict=True)]
    title = "Loss" if window == 1 else f"Loss, means of {window} steps"
    return line_chart([("loss", means)], ("step", "loss"), title)


def switch_curve(history: Mapping[str, Any]) -> str:
    """Switches per weight and step of a training run, and the share of frozen weights; empty where none was counted."""
    shown = {"switches": "switches per weight and step", "frozen": "frozen weights (share)"}
    figures = [(text, history["figures"].get(name)) for name, text in shown.items()]
    series = [(text, [(float(step), float(value)) for step, value in points]) for text, points in figures if points]
    return line_chart(series, ("step", "share"), "Level switches") if series else ""


def distance_pictures(distances: Mapping[str, Mapping[str, Sequence[int]]]) -> list[str]:
    """Histograms of the distance of weights from their nearest decision threshold, as SVG; none without weights.

    Args:
        distances: "before" and "after": of each layer how many weights are in each bin from 0 to half a step.

    Returns:
        All weights before and after, in percent; and each layer after, in percent of its weights.
    """
    layers = {name: counts for name, counts in distances["after"].items() if sum(counts)}
    if not layers:
        return []
    bins = len(next(iter(layers.values())))
    named = [f"{0.5 * i / bins:.2f} to {0.5 * (i + 1) / bins:.2f}" for i in range(bins)]
    shares = {
        when: _percent([sum(column) for column in zip(*of.values(), strict=True)]) for when, of in distances.items()
    }
    rows = [
        (name, (Bar("before", before, f"{before:.1f} %"), Bar("after", after, f"{after:.1f} %")))
        for name, before, after in zip(named, shares["before"], shares["after"], strict=True)
    ]
    return [
        paired_bars(rows, "Weights by their distance from the nearest threshold, in steps of their grids"),
        stacked_bars(
            [(name, _percent(counts)) for name, counts in layers.items()],
            named,
            "%",
            "Weights of each layer by their distance from the nearest threshold, after training",
        ),
    ]


def _percent(counts: Sequence[int]) -> list[float]:
    total = sum(counts) or 1
    return [100.0 * count / total for count in counts]


def extra_levels(recipe: Recipe, history: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of each layer with extra levels: share of its weights that have them, and its mean bits without an index."""
    rows = []
    for name in history["figures"]:
        layer = name.removeprefix("flagged:")
        extra = recipe.extra_maps.get(layer)
        if layer != name and extra is not None and extra.size:
            bits = (recipe[layer].weight or 0) + float(extra.mean())
            rows.append({"layer": layer, "share": 100.0 * float((extra > 0).mean()), "bits": bits})
    return rows


def search_pictures(history: Mapping[str, Any], report: Mapping[str, Any]) -> list[str]:
    """A search as SVG: its loss, the cost of the bits chosen at each step, and these bits for each operand.

    Args:
        history: Of `mixbit.search.fit`, as a dict.
        report: Of the recipe: "budget_share" by unit, or None.
    """
    figures = history["figures"]
    cost = [(step, value) for step, value in figures["cost"]]
    lines = [("chosen", cost)]
    for share in (report["budget_share"] or {}).values():
        lines.append(("budget", [(cost[0][0], share), (cost[-1][0], share)]))
    rows = [
        (f"{name} {operand}", figures[f"{operand} {name}"])
        for name in (key.removeprefix("act ") for key in figures if key.startswith("act "))
        for operand in ("act", "weight")
    ]
    return [
        loss_curve(history["loss"]),
        line_chart(lines, ("step", "share of uniform 8/8"), "Cost of the bits chosen so far"),
        strips(rows, "step", "Bits of each operand over the search"),
    ]


def number(value: float) -> str:
    """A cost in print."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.4g}"


def latency_chart(refinement: Mapping[str, Any]) -> str:
    """Latency of every layer before and after a refinement (a report of `refine`), as SVG."""
    rows = [
        (
            row["layer"],
            (Bar("before", row["before"], number(row["before"])), Bar("after", row["after"], number(row["after"]))),
        )
        for row in refinement["layers"]
    ]
    return paired_bars(rows, "Latency of each layer before and after refinement")


def roofline_chart(runtime: Mapping[str, Any]) -> str:
    """The layers of an integer network under the roof of the machine that ran it, as SVG.

    Args:
        runtime: What `mixbit-run --profile` wrote.
    """
    kernels = [
        Kernel(
            step["module"] or step["node"],
            float(step["macs"] * runtime["batch"]),
            float(step["value_bytes"] * runtime["batch"] + step["weight_bytes"]),
            max(step["ms"], 1e-6) * 1e-3,
        )
        for step in runtime["steps"]
        if step["macs"] and step["value_bytes"]
    ]
    if not kernels:
        return ""
    title = f"Layers, {runtime['isa']} kernels, {runtime['threads']} thread(s), {runtime['batch']} input(s)"
    return roofline(kernels, runtime["peak_macs_per_second"], runtime["peak_bytes_per_second"], title)


def _predicted(value: float | str | None) -> str:
    return "" if value is None else value if isinstance(value, str) else f"{value:.1f} dB"


def _sweep_of(sweep: Mapping[str, Any], cost: str) -> dict[str, Any]:
    """Pictures and rows of one cost's Pareto fronts."""
    metric = sweep["metric"]
    figures = [("predicted_sqnr_db", "predicted SQNR, an estimate [dB]", None)]
    if metric is not None:
        unit = " [%]" if metric in PERCENT else ""
        figures.insert(0, ("measured", f"{metric} measured, {sweep['network']} networks{unit}", sweep["float"]))
    pictures = []
    for figure, label, reference in figures:
        dots = [
            Dot(
                x=point["shares"][cost],
                y=float(point[figure]),
                series=_series(point),
                name=point["name"],
                label="" if point["bits"] is None else f"{point['bits']} bit",
                on_front=point["on_front"][cost][figure],
                hollow=not point["feasible"],
            )
            for point in sweep["points"]
            if point[figure] is not None and math.isfinite(float(point[figure]))
        ]
        if dots:
            pictures.append(jinja2.filters.Markup(scatter(dots, f"{cost}, share of uniform 8/8", label, reference)))
    rows: dict[Any, dict[str, Any]] = {}
    for point in sorted(sweep["points"], key=lambda p: -p["shares"][cost]):
        if any(point["on_front"][cost].values()):
            # Several wishes may end in one recipe; a row for each would say the same.
            same = (point["costs"][cost], point["predicted_sqnr_db"], point["measured"])
            row = rows.setdefault(same, {**point, "series": [], "front": point["on_front"][cost]})
            row["series"] += [name for name in [_series(point)] if name not in row["series"]]
    return {"cost": cost, "pictures": pictures, "rows": list(rows.values())}


def _series(point: Mapping[str, Any]) -> str:
    return str(point["method"]) if point["mode"] is None else f"{point['method']} ({point['mode']})"


def _noise(table: SensitivityTable, name: str, recipe: Recipe) -> float | None:
    """Noise-to-signal ratio of a layer at its bits; 0 where it is float, None where it was refined to other widths."""
    precision = recipe[name]
    if precision.act is None and precision.weight is None:
        return 0.0
    try:
        return table.noise_ratio(name, recipe)
    except KeyError:
        return None


def _shown(recipe: Recipe, name: str) -> float:
    """Weight bits of a layer, the mean to two digits where its channels differ."""
    bits = round(mean_weight_bits(recipe, name), 2)
    return int(bits) if bits.is_integer() else bits


def _db(ratio: float | None) -> str:
    if ratio is None:
        return ""
    return "exact" if ratio <= 0 else f"{-10 * math.log10(ratio):.1f}"


def _cost_row(name: str, cost: CostTable, recipe: Recipe) -> dict[str, Any]:
    """Cost of the recipe and how much less it is than each uniform baseline, None where the table lacks its width."""
    if recipe.channel_maps:
        try:
            for layer in recipe.channel_maps:
                cost.check_channels(layer)
        except MixbitError:
            # Of one width a layer: what the layers cost whose channels all have the widest.
            name, recipe = f"{name}, at each layer's widest", dataclasses.replace(recipe, channel_maps={})
    try:
        total = cost.total(recipe)
    except KeyError:
        if not recipe.extra_maps:
            raise
        # A table of measured widths may lack those of weights with extra levels.
        name, total = f"{name}, at base bits", cost.total(dataclasses.replace(recipe, extra_maps={}))
    known = {*cost.act_bits} & {*cost.weight_bits}
    less = [100.0 * (1.0 - total / cost.uniform(b, b)) if b in known else None for b in BASELINES]
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
        bits = [mean_weight_bits(recipe, n) if kind == "weight" else recipe[n].act or FLOAT_BITS for n in names]
        axes.bar([p + offset for p in places], bits, 0.4, label=kind)
    axes.set_xticks(list(places), list(names), rotation=90, fontsize=7)
    axes.set_ylabel("bits")
    axes.legend()
    return figure
