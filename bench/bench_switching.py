"""The toy experiments behind retraining with extra levels, at full size (seconds to minutes each).

* dynamics: one weight by the straight-through estimator; how often it switches and its squared residual, before and
  after its level in the middle, against the closed forms.
* law: the error that is left where the share f of weights that switch most gets a level, against (1 - f)^3 + f^3.
* ranking: quantized linear regression (512 weights, 2 bits, 4000 steps); who gets levels, and what becomes of them.
* rates: the same with 256 weights at five learning rates; what smaller steps near thresholds do.
* invariants: what an assignment must not change, in a training run of ResNet-8.

Seeds are regressions side by side: rows of one layer that see the same inputs, each with its own weights and noise.

Usage: python bench/bench_switching.py [--again] [--only TEXT] [dynamics | law | ranking | rates | invariants ...]
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
from rows import measure
from torch import Tensor, nn

import mixbit
from mixbit import retrain

SCALE = 0.25


def regression(weight: Tensor, bits: int = 2, scale: float = SCALE) -> nn.Module:
    """Rows of weights [seeds, inputs] on one grid that stays."""
    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    with torch.no_grad():
        model[0].weight.copy_(weight)
    precision = mixbit.LayerPrecision(
        weight=bits, act=None, granularity="per_tensor", rounding="half_up", narrow_range=False
    )
    mixbit.prepare_(model, mixbit.Recipe(default=precision), weight_quantizer="fixed")
    model[0].weight_quantizer.set_(torch.tensor([scale]))
    return model


# One weight -----------------------------------------------------------------------------------------------------------


def dynamics(rate: float, extra: int) -> dict[str, Any]:
    """L = (q(w) - r)^2 / 2 with w <- w - rate (q(w) - r), 20000 steps from 0, the first 4000 not counted."""
    targets = torch.tensor([[0.05, 0.125, 0.25, 0.4, 0.5]])
    model = regression(torch.zeros_like(targets), bits=4, scale=1.0)
    weight, quantizer = model[0].weight, model[0].weight_quantizer
    if extra:
        quantizer.set_extra_bits_(torch.full(weight.shape, extra, dtype=torch.uint8))
    switches, residual, last = torch.zeros_like(targets), torch.zeros_like(targets), quantizer(weight.detach())
    with torch.no_grad():
        for step in range(20000):
            value = quantizer(weight)
            if step >= 4000:
                switches += value != last
                residual += (value - targets).square()
            last = value
            weight -= rate * (value - targets)
    cell = 0.5**extra
    inside = targets / cell - torch.floor(targets / cell)
    return {
        "r": [round(v, 3) for v in targets[0].tolist()],
        "switches a step": [round(v, 4) for v in (switches / 16000)[0].tolist()],
        "2 min(r, 1-r)": [round(v, 4) for v in (2 * torch.minimum(inside, 1 - inside))[0].tolist()],
        "squared residual": [round(v, 4) for v in (residual / 16000)[0].tolist()],
        "r(1-r)": [round(v, 4) for v in (cell**2 * inside * (1 - inside))[0].tolist()],
    }


def law() -> dict[str, Any]:
    """4 million targets, uniform in their cells; a weight is stored at the level next to its target."""
    generator = torch.Generator().manual_seed(0)
    r = torch.rand(4_000_000, generator=generator, dtype=torch.float64)
    near = torch.minimum(r, 1 - r)
    order = near.argsort(descending=True)
    figures: dict[str, Any] = {"f": [], "MSE(f) / MSE(0)": [], "law": []}
    for f in (0.05, 0.1, 0.2, 0.3, 0.5, 0.7):
        flagged = torch.zeros_like(r, dtype=torch.bool)
        flagged[order[: int(f * len(r))]] = True
        half = torch.remainder(r, 0.5) * 2
        coarse, fine = torch.minimum(r, 1 - r).square(), (torch.minimum(half, 1 - half) / 2).square()
        figures["f"].append(f)
        figures["MSE(f) / MSE(0)"].append(round(float(torch.where(flagged, fine, coarse).mean() / coarse.mean()), 4))
        figures["law"].append(round((1 - f) ** 3 + f**3 if f <= 0.5 else 0.25, 4))
    return figures


# Regression -----------------------------------------------------------------------------------------------------------


def appended_(model: nn.Module, flags: Tensor) -> None:
    """What `extra=range` would be: flagged weights get a level outside of their grid instead of one in the middle."""
    quantizer = model[0].weight_quantizer

    def forward(x: Tensor) -> Tensor:
        low, high = quantizer.quant_range()
        top = torch.where(flags, high + 1.0, float(high))
        code = torch.floor(x.detach() / SCALE + 0.5)
        passed = torch.where((x / SCALE >= low) & (x / SCALE <= top), x, x.detach())
        return torch.minimum(code.clamp(min=low), top) * SCALE + (passed - passed.detach())

    quantizer.forward = forward


#: Who gets levels halfway, and what becomes of them: arguments of `assign_`, and what else.
ARMS: dict[str, dict[str, Any]] = {
    "none": {},
    "random f=0.2": {"fraction": 0.2, "by": "random"},
    "snapshot f=0.2": {"fraction": 0.2, "by": "snapshot"},
    "switching f=0.2": {"fraction": 0.2},
    "random f=0.5": {"fraction": 0.5, "by": "random"},
    "snapshot f=0.5": {"fraction": 0.5, "by": "snapshot"},
    "switching f=0.5": {"fraction": 0.5},
    "switching f=0.2, held at the new level": {"fraction": 0.2, "held": True},
    "switching f=0.5, held at the new level": {"fraction": 0.5, "held": True},
    "switching f=0.2, level outside of the grid": {"fraction": 0.2, "appended": True},
    "switching f=0.2, smaller steps": {"fraction": 0.2, "aware": True},
    "oscillations f=0.2": {"fraction": 0.2, "score": "osc"},
    "frozen, no levels": {"freeze": 0.03},
    "3 bits": {"bits": 3},
}


def ranking(arm: str, seeds: int = 8, inputs: int = 512, steps: int = 4000, window: int = 1000) -> dict[str, Any]:
    """Minibatches of 128, label noise 0.1, rate 0.02 along a cosine; levels are given halfway."""
    given = dict(ARMS[arm])
    held, appended, aware, freeze = (given.pop(k, None) for k in ("held", "appended", "aware", "freeze"))
    score, bits = given.pop("score", "adj"), given.pop("bits", 2)
    generator = torch.Generator().manual_seed(0)
    truth = 0.2 * torch.randn(seeds, inputs, generator=generator)
    model = regression(torch.zeros_like(truth), bits, SCALE * 2.0 ** (2 - bits))
    tracker = retrain.SwitchTracker(model, score)
    threshold = retrain.Schedule(freeze, freeze, steps, begin=0.25) if freeze else 0.0
    freezing = retrain.IterativeFreezing(model, threshold) if held or freeze else None
    sgd = torch.optim.SGD(model.parameters(), lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, steps)
    optimizer = retrain.ThresholdAware(sgd, model, rho=0.15) if aware else sgd
    for step in range(steps):
        x = torch.randn(128, inputs, generator=generator)
        y = x @ truth.T + 0.1 * torch.randn(128, seeds, generator=generator)
        optimizer.zero_grad()
        (0.5 * (model(x) - y).square().mean(0).sum()).backward()
        optimizer.step()
        schedule.step()
        if freezing is not None:
            freezing.update_()
        tracker.update_()
        if step + 1 == steps // 2 - window:
            tracker.reset_()
        if step + 1 == steps // 2 and "fraction" in given:
            tracker.assign_(**given, freezing=freezing if held else None)
            if appended:
                appended_(model, tracker.flags("0"))
                model[0].weight_quantizer.clear_extra_bits_()
    errors = (quantized(model) - truth).square().mean(1)
    late = tracker.history()[-steps // 4 :, 0].float().mean() / truth.numel()
    return {"weight MSE": _mean(errors), "of each seed": _listed(errors), "late switches": round(float(late), 4)}


def quantized(model: nn.Module) -> Tensor:
    """The weights as the model uses them."""
    with torch.no_grad():
        return model[0].weight_quantizer(model[0].weight)


#: Learning rate, steps, whether it falls along a cosine.
RATES = {
    "2e-4, 2000 steps": (2e-4, 2000, False),
    "1e-3, 2000 steps": (1e-3, 2000, False),
    "5e-3, 2000 steps": (5e-3, 2000, False),
    "2e-2, 4000 steps": (2e-2, 4000, False),
    "2e-2, 4000 steps, cosine": (2e-2, 4000, True),
}


def rates(rate: str, arm: str, seeds: int = 8, inputs: int = 256) -> dict[str, Any]:
    """Minibatches of 64 near the solution; alpha 0.1, rho 0.15. Late: the last quarter of the steps."""
    lr, steps, falls = RATES[rate]
    generator = torch.Generator().manual_seed(0)
    truth = 0.2 * torch.randn(seeds, inputs, generator=generator)
    model = regression(truth + 0.05 * torch.randn(seeds, inputs, generator=generator))
    tracker = retrain.SwitchTracker(model)
    sgd = torch.optim.SGD(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, steps) if falls else None
    optimizer = retrain.ThresholdAware(sgd, model, arm, rho=0.15) if arm in ("step", "linear") else sgd
    freezing = None
    if arm == "freezing":
        freezing = retrain.IterativeFreezing(model, retrain.Schedule(0.03, 0.03, steps, begin=0.25))
    for _ in range(steps):
        x = torch.randn(64, inputs, generator=generator)
        y = x @ truth.T + 0.1 * torch.randn(64, seeds, generator=generator)
        optimizer.zero_grad()
        (0.5 * (model(x) - y).square().mean(0).sum()).backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        if freezing is not None:
            freezing.update_()
        tracker.update_()
    errors = (quantized(model) - truth).square().mean(1)
    late = tracker.history()[-steps // 4 :, 0].float().mean() / truth.numel()
    distances = retrain.threshold_distances(model)["0"]
    return {
        "late switches": round(float(late), 4),
        "weight MSE": _mean(errors),
        "nearer than 0.15": round(float((distances < 0.15).float().mean()), 3),
    }


def _mean(errors: Tensor) -> float:
    return round(float(errors.mean()), 5)


def _listed(errors: Tensor) -> list[float]:
    return [round(v, 5) for v in errors.tolist()]


# A network ------------------------------------------------------------------------------------------------------------


def invariants() -> dict[str, Any]:
    """ResNet-8 on 512 images, four epochs at 2 bits, a fifth of each layer's weights given levels halfway."""
    weights = mixbit.zoo.data_dir() / "weights/mlperf_tiny_resnet8_cifar10_fp32.npz"
    x, y = mixbit.zoo.cifar10_pixels("train", 512)
    x = x.float()
    first = mixbit.zoo.resnet8(weights=weights).eval()
    names = mixbit.layers(first, x[:2]).names

    def prepared(bits: int) -> nn.Module:
        model = copy.deepcopy(first)
        recipe = mixbit.Recipe.uniform(names, act=4, weight=bits, rounding="half_up", narrow_range=False)
        mixbit.prepare_(model, recipe, x[:2])
        return mixbit.calibrate_(model, x[:128].split(64))

    def trained(bits: int, mechanisms: retrain.Mechanisms | None) -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        model = prepared(bits)
        data = mixbit.training.Images(x, y, 64, seed=0)
        return model, retrain.fit(model, data, epochs=4, lr=0.01, mechanisms=mechanisms, reestimate=False)

    def same(a: nn.Module, b: nn.Module) -> bool:
        return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))

    plain, _ = trained(4, None)
    counted, _ = trained(4, retrain.Mechanisms(threshold_aware="off", count="adj"))
    levels = retrain.Mechanisms(threshold_aware="step", assign_at=(0.5,), fraction=0.2)
    (one, history), (again, twin) = trained(2, levels), trained(2, levels)
    repeatable = same(one, again) and history == twin
    # The assignment alone, element by element.
    tracker = retrain.SwitchTracker(one)
    with torch.no_grad():
        for name in tracker.layers:
            weight = one.get_submodule(name).weight
            weight.add_(0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    tracker.update_()
    scores = {n: tracker.scores(n) for n in tracker.layers}
    latent = {n: p.clone() for n, p in one.named_parameters()}
    distance = {n: _error(one, n) for n in tracker.layers}
    before = {n: tracker.flags(n) for n in tracker.layers}
    given = tracker.assign_(fraction=0.5)
    new = {n: tracker.flags(n) & ~before[n] for n in tracker.layers}
    return {
        "f=0, g=1 is uniform training": same(plain, counted),
        "two runs of one seed are equal": repeatable,
        "latent weights stay": all(torch.equal(p, latent[n]) for n, p in one.named_parameters()),
        "weights that never switched get none": not any((new[n] & (scores[n] == 0)).any() for n in new),
        "no weight moves away from its latent": all(bool((_error(one, n) <= distance[n]).all()) for n in distance),
        "weights given a level": sum(given.values()),
        "loss before and after": [
            round(history.figures[f"loss_{when}_assignment"][0][1], 4) for when in ("before", "after")
        ],
    }


def _error(model: nn.Module, name: str) -> Tensor:
    layer = model.get_submodule(name)
    with torch.no_grad():
        return (layer.weight_quantizer(layer.weight) - layer.weight).abs()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiments", nargs="*", help="all by default")
    parser.add_argument("--only", default="", metavar="TEXT", help="rows whose config has this in its text")
    parser.add_argument("--again", action="store_true", help="measure rows that exist anew")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[tuple[str, dict[str, Any], Callable[[], dict[str, Any]]]] = []
    for rate in (0.01, 0.001):
        for extra in (0, 1):
            config = {"rate": rate, "extra bits": extra}
            rows.append(("dynamics", config, lambda rate=rate, extra=extra: dynamics(rate, extra)))
    rows.append(("law", {"targets": 4_000_000}, law))
    rows += [("ranking", {"arm": arm, "seeds": 8}, lambda arm=arm: ranking(arm)) for arm in ARMS]
    for rate in RATES:
        arms = ["plain", "step", "linear"] + (["freezing"] if rate.startswith("2e-2") else [])
        for arm in arms:
            config = {"rate": rate, "arm": arm, "seeds": 8}
            rows.append(("rates", config, lambda rate=rate, arm=arm: rates(rate, arm)))
    rows.append(("invariants", {"network": "ResNet-8", "images": 512, "epochs": 4}, invariants))
    known = list(dict.fromkeys(name for name, _, _ in rows))
    for name in options.experiments:
        if name not in known:
            parser.error(f"{name!r} is no experiment; expected one of {', '.join(known)}")
    for name, config, figures in rows:
        if (not options.experiments or name in options.experiments) and options.only in str(config):
            row = measure("switching", {"experiment": name, **config}, figures, again=options.again)
            print(name, config, {k: v for k, v in row["figures"].items() if k != "of each seed"}, flush=True)


if __name__ == "__main__":
    main()
