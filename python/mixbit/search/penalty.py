"""The cost of a model under search as a differentiable number, and the recipe it would become."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixbit.assignment.landing import Options, reach
from mixbit.errors import MixbitError, check_choice, did_you_mean
from mixbit.quantizers import Quantizer, quantized_layers
from mixbit.search.quantizers import (
    DECIDED,
    SAMPLED,
    WIDEST,
    FractionalQuantizer,
    GatedQuantizer,
    MixtureQuantizer,
    SearchQuantizer,
)
from mixbit.tables import FLOAT_BITS, Array, CostTable, unit_names

FORMS = ("expected", "separate", "joint")

#: Share of a budgeted search in which the allowed cost falls from where it starts to the budget.
_DESCENT = 0.6
#: How the multiplier of a budget follows: e-folds over the search for a cost that is off by 1 % all the time, what a
#: cost may be off by to count, and the immediate answer in e-folds for a cost that is off by 100 %.
_GAIN, _LARGEST_MISS, _ANSWER = 1.0, 0.25, 4.0
#: Calls after which parameters that have gradients and never moved are taken for absent from the optimizer: more than
#: a step that accumulates gradients has, or a gradient scaler skips at its start.
_PATIENCE = 32
#: Preference for a candidate that the search has all but ruled out.
_LEAST = -30.0


def search_quantizers(model: nn.Module) -> dict[str, SearchQuantizer]:
    """Quantizers under search by module path, each once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SearchQuantizer)}


def check_searching(model: nn.Module) -> dict[str, SearchQuantizer]:
    """The same, refusing a model that has none.

    Raises:
        MixbitError: The model is not prepared for a search.
    """
    found = search_quantizers(model)
    if not found:
        raise MixbitError(
            "model has nothing to search; call mixbit.prepare_(model, mixbit.search.Gates(...), example) first"
        )
    return found


def reachable(model: nn.Module, costs: CostTable) -> tuple[float, float]:
    """The least and the largest cost that a search can end at, in the table's unit.

    Args:
        model: Prepared for a search.
        costs: A cost table of its layers, at all widths of the candidates.

    Returns:
        (least, largest); bounds of them where a table is totalled by maximum.

    Raises:
        MixbitError: The model is not under search, or the table is another model's.
    """
    check_searching(model)
    names = list(costs.layers)
    _check_layers(costs, names, model)
    choices = Choices(model, names)
    choices.check_table(costs)
    return choices.reach(costs)


class Choices:
    """The operands of a model's layers and their candidates, as tensors over all layers.

    An operand makes one choice, or one for each group of its channels (`SearchQuantizer.choice_channels`).

    Attributes:
        names: Layers in the order of a cost table (or of the model).
        operands: Distinct quantizers; None stands for a float operand.
        candidates: Their bit-widths.
        act: Index into `operands` for each layer.
        weight: The same.
        first: Index of each operand's first choice.
        count: How many choices each operand makes.
        shares: float64 [choices]: the share of its operand that each choice decides.
    """

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        modules = quantized_layers(model)
        self.names = names
        self.operands: list[Quantizer | None] = [None]
        self.act: list[int] = []
        self.weight: list[int] = []
        for name in names:
            module = modules.get(name)
            for quantizer, index in (
                (None if module is None else module.act_quantizer, self.act),
                (None if module is None else module.weight_quantizer, self.weight),
            ):
                places = [i for i, known in enumerate(self.operands) if known is quantizer]
                if not places:
                    self.operands.append(quantizer)
                index.append(places[0] if places else len(self.operands) - 1)
        self.candidates: list[tuple[int, ...]] = [
            (FLOAT_BITS,) if q is None else q.candidates if isinstance(q, SearchQuantizer) else (int(q.bit_width),)
            for q in self.operands
        ]
        self.width = max(len(c) for c in self.candidates)
        kinds: dict[Any, list[int]] = {}
        for i, quantizer in enumerate(self.operands):
            if isinstance(quantizer, SearchQuantizer):
                key = (type(quantizer), quantizer.candidates, getattr(quantizer, "temperature", None))
                kinds.setdefault(key if not isinstance(key[2], Tensor) else key[:2], []).append(i)
        self.kinds = list(kinds.values())
        fixed = [i for i, q in enumerate(self.operands) if not isinstance(q, SearchQuantizer)]
        sizes = [(isinstance(q, SearchQuantizer) and q.choice_channels) or [1] for q in self.operands]
        self.count = [len(own) for own in sizes]
        self.first = [sum(self.count[:i]) for i in range(len(sizes))]
        self.shares: Array = np.concatenate([np.asarray(own) / sum(own) for own in sizes])
        # Rows in the order in which stacking makes them.
        order = [*fixed, *(i for kind in self.kinds for i in kind)]
        self.fixed_rows = len(fixed)
        start = dict(zip(order, np.cumsum([0, *(self.count[i] for i in order)]).tolist(), strict=False))
        self.row = [start[i] + k for i in range(len(sizes)) for k in range(self.count[i])]
        self._mix: Tensor | None = None  # [operands, choices], once it is needed

    def _like(self, kind: list[int]) -> list[SearchQuantizer]:
        return [q for i in kind if isinstance(q := self.operands[i], SearchQuantizer)]

    def _rows(self, function: str, fixed: Tensor, detach: bool) -> Tensor:
        parts = [fixed]
        for kind in self.kinds:
            like = self._like(kind)
            stacked = torch.cat([q.choices for q in like])
            found = getattr(type(like[0]), function)(stacked.detach() if detach else stacked, like)
            parts.append(F.pad(found, (0, self.width - found.shape[1])) if found.dim() == 2 else found)
        return torch.cat(parts)[self.row]

    @property
    def by_channel(self) -> bool:
        """Whether some operand makes several choices."""
        return len(self.row) > len(self.operands)

    def of_operands(self, rows: Tensor) -> Tensor:
        """[choices, n] -> [operands, n]: the mean over the channels of what the choices have."""
        if not self.by_channel:
            return rows
        if self._mix is None or self._mix.device != rows.device:
            owner = np.repeat(np.arange(len(self.operands)), self.count)
            mix = torch.zeros(len(self.operands), len(owner))
            mix[owner, np.arange(len(owner))] = torch.from_numpy(self.shares).float()
            self._mix = mix.to(rows.device)
        return self._mix @ rows

    def check_table(self, table: CostTable) -> None:
        """Refuses a table that does not tell what single channels cost, where some choose for themselves.

        Raises:
            MixbitError: See `CostTable.check_channels`.
        """
        for name, weight in zip(self.names, self.weight, strict=True):
            if self.count[weight] > 1:
                table.check_channels(name)

    def options(self, probabilities: Array) -> Options:
        """What each layer may choose from, and how likely that is; probabilities [choices, candidates].

        A layer whose groups of channels choose stands there once for each group.
        """
        acts = tuple(sorted({b for i in self.act for b in self.candidates[i]}))
        weights = tuple(sorted({b for i in self.weight for b in self.candidates[i]}))
        places = self.places()
        allowed = np.zeros((len(places), len(acts), len(weights)), np.uint8)
        preference = np.full(allowed.shape, _LEAST)
        logs = np.log(np.maximum(probabilities, np.exp(_LEAST)))
        readers = [self.act[i] for i, _ in places]
        sharing = Counter(readers)
        for p, (i, choice) in enumerate(places):
            act, weight = self.act[i], self.weight[i]
            tied = self._parameter(act) is not None and self._parameter(act) is self._parameter(weight)
            shared = sharing[act]
            for j, a in enumerate(self.candidates[act]):
                for k, w in enumerate(self.candidates[weight]):
                    if not tied or a == w:
                        place = (p, acts.index(a), weights.index(w))
                        allowed[place] = 1
                        preference[place] = logs[self.first[act], j] / shared + logs[choice, k]
        names = [self.names[i] for i, _ in places]
        shares = self.shares[[choice for _, choice in places]] if self.by_channel else None
        return Options(names, acts, weights, allowed, readers, preference, shares)

    def places(self) -> list[tuple[int, int]]:
        """(layer, choice of its weight) for every place of `options`."""
        return [(i, self.first[weight] + k) for i, weight in enumerate(self.weight) for k in range(self.count[weight])]

    def reach(self, table: CostTable, asked: float | None = None) -> tuple[float, float]:
        """The least and the largest cost of all choices, see `mixbit.assignment.landing.reach`."""
        return reach(self.options(np.ones((len(self.row), self.width))), table, asked)

    def _parameter(self, index: int) -> Tensor | None:
        quantizer = self.operands[index]
        return quantizer.choice_parameter if isinstance(quantizer, SearchQuantizer) else None

    def device(self) -> torch.device:
        """Where the parameters are."""
        return self._like(self.kinds[0])[0].choice_parameter.device

    def probabilities(self) -> Tensor:
        """[choices, candidates], padded with zeros; differentiable."""
        fixed = torch.zeros(self.fixed_rows, self.width, device=self.device())
        fixed[:, 0] = 1.0
        return self._rows("probabilities", fixed, False)

    def open_shares(self) -> Tensor:
        """C_j of every operand with gates (the mean over its channels), zero for others; [operands, candidates - 1]."""
        fixed = torch.zeros(self.fixed_rows, self.width, device=self.device())
        return self.of_operands(self._rows("open_shares", fixed, False)[:, : self.width - 1])

    @torch.no_grad()
    def decided(self) -> Tensor:
        """Index of the candidate chosen now, int64 [choices]."""
        fixed = torch.zeros(self.fixed_rows, dtype=torch.int64, device=self.device())
        return self._rows("decided", fixed, True)


class _Cost(nn.Module):
    """One cost table over the candidates of the layers, as buffers."""

    values: Tensor
    out: Tensor
    act: Tensor
    weight: Tensor
    share: Tensor

    def __init__(self, table: CostTable, choices: Choices, device: torch.device) -> None:
        super().__init__()
        choices.check_table(table)
        self.table = table
        self.unit = table.uniform(8, 8)
        if not self.unit > 0:
            raise MixbitError(f"costs in {table.unit!r}: uniform(8, 8) is {self.unit:g}; expected a positive cost")
        k = choices.width
        act, weight = choices.act, choices.weight
        reader = [-1] * len(choices.names)
        if table.values_out is not None and table.consumer is not None:
            reader = [choices.names.index(c) if isinstance(c, str) else -1 for c in table.consumer]
        self.follows = any(r >= 0 for r in reader)
        values = np.zeros((len(choices.names), k, k, k if self.follows else 1))
        for i, name in enumerate(choices.names):
            for a, act_bits in enumerate(choices.candidates[act[i]]):
                for w, weight_bits in enumerate(choices.candidates[weight[i]]):
                    outs: tuple[int | None, ...] = (None,)
                    if reader[i] >= 0:
                        outs = choices.candidates[act[reader[i]]]
                    for o, out in enumerate(outs):
                        if reader[i] < 0:
                            consumer = None if table.consumer is None else table.consumer[i]
                            out = 8 if consumer is None or isinstance(consumer, str) else consumer
                        values[i, a, w, o] = table.entry(name, act_bits, weight_bits, out)
        self.maximum = table.reduce == "max"
        at_8_bit = np.asarray([table.entry(name, 8, 8) for name in choices.names])
        for key, value in {
            "values": torch.tensor(values / self.unit, dtype=torch.float32),
            # Without a reader the output has one width: the first operand (a float one) has the probability 1 there.
            "out": torch.tensor([act[r] if r >= 0 else 0 for r in reader]),
            "act": torch.tensor(act),
            "weight": torch.tensor(weight),
            "share": torch.tensor(at_8_bit / at_8_bit.max(), dtype=torch.float32),
        }.items():
            self.register_buffer(key, value.to(device))

    def expected(self, probabilities: Tensor) -> Tensor:
        """Expected cost in shares of uniform(8, 8), from probabilities [operands, candidates]."""
        act, weight = probabilities[self.act], probabilities[self.weight]
        if self.follows:
            each = torch.einsum("lawo,la,lw,lo->l", self.values, act, weight, probabilities[self.out])
        else:
            each = torch.einsum("law,la,lw->l", self.values[..., 0], act, weight)
        return each.amax() if self.maximum else each.sum()

    def decided(self, index: Tensor, choices: Choices) -> Tensor:
        """Cost of a candidate's index for each choice, in the same unit."""
        if choices.by_channel:
            return self.expected(choices.of_operands(F.one_hot(index, choices.width).to(self.values.dtype)))
        rows = torch.arange(len(self.act), device=index.device)
        out = index[self.out] if self.follows else torch.zeros_like(rows)
        each = self.values[rows, index[self.act], index[self.weight], out]
        return each.amax() if self.maximum else each.sum()


class Penalty(nn.Module):
    """What a model under search costs, to be added to the loss; and the clock of the search.

    Each call in training mode counts as one step. With `strength` the penalty is strength times the cost in shares of
    `costs.uniform(8, 8)`. With `budget` it steers itself: a multiplier grows while the cost (first the expected one,
    then more and more that of the choices made) is above what the step allows and shrinks while it is below; `extract`
    lands on the budget.

    Forms: "expected" is the expected cost of the drawn bit-widths. "separate" and "joint" are the regularizers of Free
    Bits over gates: sum_l s_l (sum_j C_j^w P_j + sum_j C_j^a P_j) and sum_l s_l sum_ij C_i^a C_j^w P_i P_j, where s_l
    is the layer's cost at 8/8 over that of the costliest layer, C_j the probability that the gates up to j are open and
    P_j the width they open; a fixed operand's width counts in "joint" alone.

    Args:
        model: Prepared for a search.
        costs: A cost table of its layers, or {table: weight of its cost} for several.
        strength: Multiplies the cost.
        budget: Largest cost of the result in the table's own unit, or {table: largest cost}.
        form: "expected", "separate" or "joint".
        total_steps: Steps of the whole search; needed with a budget.
        start_step: Until then all candidates stay at their widest and the penalty is 0.
        warmup_steps: Steps in which the strength rises to its value.
        final_temperature: Of mixtures, reached from their first one in equal ratios over `total_steps`.

    Attributes:
        layers: Names of the tables' layers.

    Raises:
        MixbitError: The model is not under search, the table is another model's, both or none of strength and budget,
            a budget outside what can be reached, or a form that the quantizers do not have.
    """

    weights: Tensor
    step: Tensor
    limits: Tensor
    log_multiplier: Tensor
    start_cost: Tensor
    start_temperature: Tensor

    def __init__(
        self,
        model: nn.Module,
        costs: CostTable | Mapping[CostTable, float],
        *,
        strength: float | None = None,
        budget: float | Mapping[CostTable, float] | None = None,
        form: str = "expected",
        total_steps: int | None = None,
        start_step: int = 0,
        warmup_steps: int = 0,
        final_temperature: float | None = None,
    ) -> None:
        super().__init__()
        found = check_searching(model)
        check_choice("form", form, FORMS)
        self.form = form
        if (strength is None) == (budget is None):
            raise MixbitError(f"strength={strength} and budget={budget}: expected exactly one of them")
        for argument, value in (
            ("total_steps", total_steps),
            ("start_step", start_step),
            ("warmup_steps", warmup_steps),
        ):
            if value is not None and (not isinstance(value, int) or value < (1 if argument == "total_steps" else 0)):
                raise MixbitError(f"{argument}={value!r}: expected a whole number of steps")
        if total_steps is None and (budget is not None or final_temperature is not None):
            raise MixbitError("total_steps is None; a budget and a final temperature need the length of the search")
        if total_steps is not None and start_step >= total_steps:
            raise MixbitError(f"start_step={start_step}: expected less than total_steps={total_steps}")
        tables = _weighted("costs", costs, 1.0)
        if strength is not None:
            if not (math.isfinite(strength) and strength >= 0):
                raise MixbitError(f"strength={strength!r}: expected a finite number >= 0")
            tables = {table: strength * weight for table, weight in tables.items()}
        budgets: dict[CostTable, float] = {}
        if budget is not None:
            if not isinstance(budget, Mapping) and len(tables) > 1:
                raise MixbitError("budget is one number for several tables; expected {table: largest cost}")
            given = budget if isinstance(budget, Mapping) else {next(iter(tables)): budget}
            budgets = _weighted("budget", given, 1.0)
            tables = {table: 1.0 for table in budgets}
        self.layers = names = list(next(iter(tables)).layers)
        for table in tables:
            _check_layers(table, names, model)
        # Lists, so that neither the model nor the tables become a part of the penalty's state.
        self._choices = [Choices(model, names)]
        device = self._choices[0].device()
        self._costs = [_Cost(table, self._choices[0], device) for table in tables]
        self._quantizers = [found]
        self._fractional = [[q for q in found.values() if isinstance(q, FractionalQuantizer)]]
        self._mixtures = [[q for q in found.values() if isinstance(q, MixtureQuantizer)]]
        kinds = {type(q) for q in found.values()}
        if form != "expected" and kinds != {GatedQuantizer}:
            raise MixbitError(f'form={form!r} is defined for gates; expected "expected" for this search')
        if form != "expected" and budget is not None:
            raise MixbitError(f'form={form!r}: a budget is about a cost; expected form="expected"')
        self.total_steps, self.start_step, self.warmup_steps = total_steps, start_step, warmup_steps
        self.final_temperature = final_temperature
        self.register_buffer("weights", torch.tensor(list(tables.values()), dtype=torch.float32, device=device))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device=device))
        self.budgeted = bool(budgets)
        limits = [limit / cost.unit for cost, limit in zip(self._costs, budgets.values(), strict=False)]
        self.register_buffer("limits", torch.tensor(limits, dtype=torch.float32, device=device))
        self.register_buffer("log_multiplier", torch.full((len(limits),), -3.0, device=device))
        self.register_buffer("start_cost", torch.zeros(len(limits), device=device))
        if mixtures := self._mixtures[0]:
            self.register_buffer("start_temperature", mixtures[0].temperature.clone())
        for table, limit in budgets.items():
            least, most = self._choices[0].reach(table, limit)
            if not least * (1 - 1e-12) <= limit <= most * (1 + 1e-12):
                raise MixbitError(
                    f"budget={limit:g} {table.unit}: the candidates reach {least:g} to {most:g}; expected a number "
                    "between"
                )
        self._calls = 0
        self._before: list[Tensor] = []
        object.__setattr__(model, "mixbit_costs", tuple((table, budgets.get(table)) for table in tables))
        if start_step > 0:
            self._set_phase(WIDEST)

    def forward(self) -> Tensor:
        """The penalty, a scalar on the model's device; in training mode also one step of the clock."""
        choices = self._choices[0]
        self._follow_device()
        if self.training and not torch.compiler.is_compiling():
            self._watch()
        if self.form == "expected":
            probabilities = choices.of_operands(choices.probabilities())
            costs = torch.stack([cost.expected(probabilities) for cost in self._costs])
        else:
            costs = torch.stack([self._free_bits(cost) for cost in self._costs])
        weights = self._steered(costs) / self.limits if self.budgeted else self.weights
        if not self.training:
            return (weights * costs).sum()
        ramp = ((self.step - self.start_step + 1) / max(self.warmup_steps, 1)).clamp(0, 1)
        started = (self.step >= self.start_step).to(costs.dtype)
        penalty = (weights * costs).sum() * ramp * started
        self._tick()
        return penalty

    def _follow_device(self) -> None:
        """Moves to where the model is now."""
        device = self._choices[0].device()
        if self.step.device != device:
            self.to(device)
        for cost in self._costs:
            if cost.values.device != device:
                cost.to(device)

    def _free_bits(self, cost: _Cost) -> Tensor:
        """The published regularizers over gates, see the class."""
        choices = self._choices[0]
        shares = choices.open_shares()
        wide = shares.new_tensor([[*w[1:], *[0] * (choices.width - len(w))] for w in choices.candidates])
        fixed = shares.new_tensor([w[0] if len(w) == 1 else 0 for w in choices.candidates])
        each = (shares * wide).sum(1)
        act, weight = each[cost.act], each[cost.weight]
        if self.form == "separate":
            return (cost.share * (act + weight)).sum()
        return (cost.share * (act + fixed[cost.act]) * (weight + fixed[cost.weight])).sum()

    @torch.no_grad()
    def _steered(self, now: Tensor) -> Tensor:
        """The budgets' multipliers, moved by how far the expected costs are from what this step allows."""
        total = self.total_steps
        assert total is not None
        if self.training:
            self.start_cost.copy_(torch.where(self.step == 0, now, self.start_cost))
        done = ((self.step - self.start_step) / (_DESCENT * (total - self.start_step))).clamp(0, 1)
        start = torch.maximum(self.start_cost, self.limits)
        # In equal ratios: the last bits are the dearest.
        allowed = start * (self.limits / start) ** done
        # The expected cost moves first, but an open mind about a gate costs more than what it will be decided to.
        index = self._choices[0].decided()
        chosen = torch.stack([cost.decided(index, self._choices[0]) for cost in self._costs])
        miss = ((1 - done) * torch.log(now / allowed) + done * torch.log(chosen / allowed)).clamp(
            -_LARGEST_MISS, _LARGEST_MISS
        )
        if self.training:
            moving = (self.step >= self.start_step).to(miss.dtype)
            self.log_multiplier.add_(moving * _GAIN * 100 * miss / total).clamp_(-12.0, 6.0)
        return torch.exp(self.log_multiplier + _ANSWER * miss)

    @torch.no_grad()
    def _tick(self) -> None:
        self.step.add_(1)
        for quantizer in self._fractional[0]:
            quantizer.clamp_()
        if self.start_step > 0:
            self._set_phase(torch.where(self.step >= self.start_step, SAMPLED, WIDEST))
        if self.final_temperature is not None and self.total_steps is not None and self._mixtures[0]:
            done = (self.step / self.total_steps).clamp(0, 1)
            temperature = self.start_temperature * (self.final_temperature / self.start_temperature) ** done
            for mixture in self._mixtures[0]:
                mixture.temperature.copy_(temperature)

    @torch.no_grad()
    def _set_phase(self, phase: Tensor | float) -> None:
        for quantizer in self._quantizers[0].values():
            # What freeze_ has decided stays so.
            quantizer.phase.copy_(torch.where(quantizer.phase == DECIDED, quantizer.phase, phase))

    def _watch(self) -> None:
        """Finds parameters of the search that have gradients and never move."""
        self._calls += 1
        if self._calls > _PATIENCE:
            return
        parameters = [q.choice_parameter for q in self._quantizers[0].values()]
        if self._calls == 1:
            self._before = [p.detach().clone() for p in parameters]
            return
        if self._calls < _PATIENCE:
            return
        pushed = [p.grad is not None and bool(p.grad.any()) for p in parameters]
        still = [torch.equal(p.detach(), b) for p, b in zip(parameters, self._before, strict=True)]
        if any(pushed) and all(still):
            raise MixbitError(
                "the parameters of the search have gradients but do not move: they are not in the optimizer, or their "
                "learning rate is 0; add mixbit.search.param_groups(model, lr=...) to its parameters"
            )

    def costs(self) -> dict[str, float]:
        """Cost of the recipe chosen now, by unit, in the tables' own units."""
        self._follow_device()
        choices = self._choices[0]
        index = choices.decided()
        found = (float(cost.decided(index, choices)) * cost.unit for cost in self._costs)
        return dict(zip(self.units(), found, strict=True))

    def units(self) -> dict[str, float]:
        """uniform(8, 8) of each cost, by unit."""
        names = unit_names(cost.table for cost in self._costs).values()
        return dict(zip(names, (cost.unit for cost in self._costs), strict=True))

    def bits(self) -> tuple[list[float], list[float]]:
        """(act, weight) bits chosen now, in the order of `layers`; the mean where channels choose."""
        choices = self._choices[0]
        index = choices.decided().tolist()
        means = []
        for i, candidates in enumerate(choices.candidates):
            own = range(choices.first[i], choices.first[i] + choices.count[i])
            means.append(sum(float(choices.shares[c]) * candidates[index[c]] for c in own))
        return [means[i] for i in choices.act], [means[i] for i in choices.weight]


def _weighted(argument: str, given: Any, default: float) -> dict[CostTable, float]:
    if isinstance(given, CostTable):
        given = {given: default}
    if not isinstance(given, Mapping) or not given or not all(isinstance(t, CostTable) for t in given):
        raise MixbitError(f"{argument} is a {type(given).__name__}; expected a CostTable or {{CostTable: number}}")
    for value in given.values():
        if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
            raise MixbitError(f"{argument}: {value!r}; expected finite numbers >= 0")
    return {table: float(value) for table, value in given.items()}


def _check_layers(table: CostTable, names: list[str], model: nn.Module) -> None:
    modules = quantized_layers(model)
    for name in modules:
        if name not in table.layers:
            raise MixbitError(f"costs have no layer {name!r} of the model{did_you_mean(name, table.layers)}")
    every = dict(model.named_modules())
    for name in table.layers:
        if name not in every:
            raise MixbitError(f"costs are of another model: it has no layer {name!r}{did_you_mean(name, every)}")
    if list(table.layers) != names:
        raise MixbitError("costs: the tables list different layers; expected tables of one model")
