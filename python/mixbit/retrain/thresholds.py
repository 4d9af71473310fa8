"""Smaller steps near decision thresholds, around any optimizer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mixbit import ops
from mixbit.errors import MixbitError, check_choice
from mixbit.quantizers import Quantizer, quantized_layers
from mixbit.retrain.shards import local, local_extra, local_scale, local_scales
from mixbit.training import unwrapped

#: What a GradScaler sets on optimizers that divide gradients themselves.
_SCALER = ("grad_scale", "found_inf")
#: Scale and bits of parameters that have no grid.
_ONE = torch.ones(1)


class ThresholdAware(torch.optim.Optimizer):
    """An optimizer whose steps of quantized weights are smaller near the decision thresholds of their grids.

    `w -= lr g(d(w)) update`: the whole update of the wrapped optimizer (after momentum, decay included) is multiplied
    by g, d being the distance of the weight from the nearest threshold of its own grid in steps of it, 0 to 1/2. It
    keeps gradient noise from switching weights back and forth between two levels (the idea: Kim et al., IEEE TNNLS
    32(7), 2021; the formulas are ours, see `mixbit.ops.threshold_aware_step_`). The effect is that of a transient: with
    a learning rate so large that weights reach their stationary distribution, they pile up near the thresholds whatever
    their steps, and it is gone. Use it with the small rates of retraining.

    With a wrapped `torch.optim.SGD`, `Adam` or `AdamW` the steps of all quantized weights are one call that reads and
    writes each weight once; other optimizers step as they do, and their updates are scaled afterwards, at the price of
    a copy of the weights. All other parameters take the wrapped optimizer's own step (where that is SGD's loop over
    float32 parameters on the CPU: one call with the same bits). Parameter groups, state and
    `state_dict` are those of the wrapped optimizer: schedulers, GradScaler and checkpoints work on either.

    Args:
        optimizer: Any optimizer but LBFGS that holds quantized weights of `model`.
        model: Prepared and calibrated. Weights of layers whose weight quantizer is None or off take the plain step.
        shape: How g falls towards a threshold: "step", "linear", "gauss", or "off" (g = 1).
        alpha: g at a threshold, 0 to 1.
        rho: Reach of a threshold in steps of the grid, above 0, up to 1/2.
        on_grad: g multiplies the gradient instead of the update, before decay and momentum.

    Attributes:
        optimizer: The wrapped one.

    Raises:
        MixbitError: The model has no quantized weights, is not calibrated or under search; the optimizer holds none of
            the quantized weights; an argument does not fit.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        shape: str = "step",
        alpha: float = 0.1,
        rho: float = 0.125,
        *,
        on_grad: bool = False,
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise MixbitError(f"optimizer is a {type(optimizer).__name__}; expected a torch.optim.Optimizer")
        if isinstance(optimizer, torch.optim.LBFGS):
            raise MixbitError("optimizer is a LBFGS, which takes several steps in one; expected one of single steps")
        check_choice("shape", shape, ops.STEP_SHAPES)
        if not 0 <= alpha <= 1:
            raise MixbitError(f"alpha={alpha!r}: expected a number from 0 to 1")
        if not 0 < rho <= 0.5:
            raise MixbitError(f"rho={rho!r}: expected a number above 0, up to 0.5")
        self.optimizer = optimizer
        self._layers = quantized_weights(model)
        self._options: dict[str, Any] = {"shape": shape, "alpha": float(alpha), "rho": float(rho)}
        self._on_grad = on_grad
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not any(id(layer.weight) in held for layer in self._layers.values()):
            raise MixbitError(
                "optimizer holds none of the model's quantized weights; make it from the parameters of this model, "
                "after mixbit.prepare_"
            )
        super().__init__(optimizer.param_groups, optimizer.defaults)

    # State and groups are the wrapped optimizer's own objects, whoever replaces them (load_state_dict does).
    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of the wrapped optimizer."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        if value:  # the base class starts with an empty list
            self.optimizer.param_groups = value

    @property
    def state(self) -> Any:
        """That of the wrapped optimizer."""
        return self.optimizer.state

    @state.setter
    def state(self, value: Any) -> None:
        if value:
            self.optimizer.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        """Those of the wrapped optimizer."""
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.optimizer.defaults = value

    # torch.amp.GradScaler asks whether the step itself divides gradients, and leaves two numbers for it.
    @property
    def _step_supports_amp_scaling(self) -> bool:
        return bool(getattr(self.optimizer, "_step_supports_amp_scaling", False))

    def __setattr__(self, name: str, value: Any) -> None:
        owner = self.optimizer if name in _SCALER else self
        object.__setattr__(owner, name, value)

    def __delattr__(self, name: str) -> None:
        object.__delattr__(self.optimizer if name in _SCALER else self, name)

    def _scaler(self) -> dict[str, Any]:
        return {name: getattr(self.optimizer, name, None) for name in _SCALER}

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the wrapped optimizer."""
        if not any(param_group is group for group in self.param_groups):  # the base class adds those that are there
            self.optimizer.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """That of the wrapped optimizer."""
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The state of the wrapped optimizer: a checkpoint fits it with or without this wrapper."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads into the wrapped optimizer."""
        self.optimizer.load_state_dict(state_dict)

    def register_state_dict_pre_hook(self, *args: Any, **kwargs: Any) -> Any:
        """On the wrapped optimizer."""
        return self.optimizer.register_state_dict_pre_hook(*args, **kwargs)

    def register_state_dict_post_hook(self, *args: Any, **kwargs: Any) -> Any:
        """On the wrapped optimizer."""
        return self.optimizer.register_state_dict_post_hook(*args, **kwargs)

    def register_load_state_dict_pre_hook(self, *args: Any, **kwargs: Any) -> Any:
        """On the wrapped optimizer."""
        return self.optimizer.register_load_state_dict_pre_hook(*args, **kwargs)

    def register_load_state_dict_post_hook(self, *args: Any, **kwargs: Any) -> Any:
        """On the wrapped optimizer."""
        return self.optimizer.register_load_state_dict_post_hook(*args, **kwargs)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """A step of the wrapped optimizer, scaled for quantized weights.

        Args:
            closure: Computes the loss again, with gradients; called once, as most optimizers do.

        Returns:
            What the closure returned, else None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with contextlib.nullcontext() if self._options["shape"] == "off" else self._scaled():
            self.optimizer.step()
        return loss

    @contextlib.contextmanager
    def _scaled(self) -> Iterator[None]:
        """Around a step of the wrapped optimizer, between its own hooks: scales the steps of quantized weights."""
        quantizers = {
            id(layer.weight): q
            for layer in self._layers.values()
            if (q := getattr(layer, "weight_quantizer", None)) is not None and q.enabled  # None too once restored
        }
        around = self._fused if fuses(self.optimizer) else self._rescaled
        with contextlib.ExitStack() as stack:

            def start(*_: Any) -> None:
                stack.enter_context(around(quantizers))

            # The last of the hooks: those that were there before may still change gradients.
            stack.callback(self.optimizer.register_step_pre_hook(start).remove)
            yield

    @contextlib.contextmanager
    def _fused(self, quantizers: dict[int, Quantizer]) -> Iterator[None]:
        """Steps the quantized weights in one call a group; the wrapped optimizer sees the other parameters only."""
        groups = self.optimizer.param_groups
        everything = [group["params"] for group in groups]
        with torch.no_grad():
            for group in groups:
                own = [p for p in group["params"] if id(p) in quantizers and p.grad is not None]
                if own:
                    step = self._sgd if isinstance(self.optimizer, torch.optim.SGD) else self._adam
                    step(group, own, [quantizers[id(p)] for p in own])
                    group["params"] = self._rest(group, [p for p in group["params"] if id(p) not in quantizers])
        try:
            yield
        finally:
            for group, params in zip(groups, everything, strict=True):
                group["params"] = params

    def _sgd(self, group: dict[str, Any], own: list[Tensor], quantizers: list[Quantizer]) -> None:
        keeps = group["momentum"] != 0
        fresh = [keeps and self.state[p].get("momentum_buffer") is None for p in own]
        # Zeros are a first momentum but for dampening, which a first step does not have.
        parts = [False] if group["dampening"] == 0 or not any(fresh) else sorted(set(fresh))
        for first in parts:
            chosen = [i for i in range(len(own)) if len(parts) == 1 or fresh[i] == first]
            params = [own[i] for i in chosen]
            self._sgd_step(
                group,
                [local(p) for p in params],
                [local(p.grad) for p in params],
                [local(self._momentum(p)) for p in params] if keeps else [],
                first_step=bool(fresh[chosen[0]] and group["dampening"] != 0),
                on_grad=self._on_grad,
                **self._grids(params, [quantizers[i] for i in chosen]),
                **self._options,
            )

    def _momentum(self, p: Tensor) -> Tensor:
        """The momentum of a parameter, made where there is none yet."""
        state = self.state[p]
        if state.get("momentum_buffer") is None:
            state["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        momentum: Tensor = state["momentum_buffer"]
        return momentum

    def _sgd_step(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], momenta: list[Tensor], **options: Any
    ) -> None:
        ops.threshold_aware_step_(
            params,
            grads,
            momenta,
            lr=group["lr"],
            momentum=group["momentum"],
            dampening=group["dampening"],
            weight_decay=float(group["weight_decay"]),
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            **options,
            **self._scaler(),
        )

    def _rest(self, group: dict[str, Any], params: list[Tensor]) -> list[Tensor]:
        """Steps the other parameters that the op treats bit for bit as torch does; returns those that are left.

        The loop of `torch.optim.SGD` over the many small ones (biases, norms) costs more than all quantized weights.
        """
        if (
            type(self.optimizer) is not torch.optim.SGD
            or group["fused"]
            or isinstance(group["lr"], Tensor)
            or isinstance(group["weight_decay"], Tensor)
            or any(value is not None for value in self._scaler().values())
            or torch.compiler.is_compiling()
        ):
            return params
        keeps = group["momentum"] != 0
        state = self.state
        left: list[Tensor] = []
        # Those with a momentum (or none to keep), and those whose first one this step makes.
        parts: tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]] = ([], [])
        for p in params:
            grad = p.grad
            if not (
                type(p) is nn.Parameter
                and type(grad) is Tensor
                and p.dtype == torch.float32 == grad.dtype
                and p.is_cpu
                and p.layout == torch.strided == grad.layout
                and p.is_contiguous()
            ):
                left.append(p)
                continue
            buffer = state[p].get("momentum_buffer") if keeps else None
            if buffer is None or (type(buffer) is Tensor and buffer.dtype == torch.float32):
                parts[keeps and buffer is None].append((p, grad))
            else:
                left.append(p)
        for first_step, members in enumerate(parts):
            if members:
                self._sgd_step(
                    group,
                    [p for p, _ in members],
                    [grad for _, grad in members],
                    [self._momentum(p) for p, _ in members] if keeps else [],
                    first_step=bool(first_step),
                    scales=[_ONE] * len(members),
                    bit_widths=[_ONE] * len(members),
                    shape="off",
                )
        return left

    def _adam(self, group: dict[str, Any], own: list[Tensor], quantizers: list[Quantizer]) -> None:
        for p in own:
            state = self.state[p]
            if not state:
                at_device = group["capturable"] or group["fused"]
                dtype = torch.get_default_dtype() if not group["fused"] else torch.float32
                if dtype != torch.float64:
                    dtype = torch.float32
                state["step"] = torch.zeros((), dtype=dtype, device=p.device if at_device else "cpu")
                for name in ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])):
                    state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["step"] += 1

        def states(name: str) -> list[Tensor]:
            return [local(self.state[p][name]) for p in own]

        ops.threshold_aware_adam_step_(
            [local(p) for p in own],
            [local(p.grad) for p in own],
            states("exp_avg"),
            states("exp_avg_sq"),
            states("max_exp_avg_sq") if group["amsgrad"] else [],
            states("step"),
            **self._grids(own, quantizers),
            lr=group["lr"],
            betas=tuple(float(b) for b in group["betas"]),  # type: ignore[arg-type]
            eps=group["eps"],
            weight_decay=float(group["weight_decay"]),
            decoupled=group["decoupled_weight_decay"],
            amsgrad=group["amsgrad"],
            maximize=group["maximize"],
            on_grad=self._on_grad,
            **self._options,
            **self._scaler(),
        )
        found = self._scaler()["found_inf"]
        if found is not None:  # the step that was left out does not count
            for p in own:
                self.state[p]["step"] -= (found != 0).to(self.state[p]["step"])

    @contextlib.contextmanager
    def _rescaled(self, quantizers: dict[int, Quantizer]) -> Iterator[None]:
        """Lets the wrapped optimizer step all parameters; the steps of quantized weights are scaled before or after."""
        params = [
            p for group in self.param_groups for p in group["params"] if id(p) in quantizers and p.grad is not None
        ]
        grids = self._grids(params, [quantizers[id(p)] for p in params]) | self._options
        weights = [local(p.detach()) for p in params]
        if self._on_grad:
            kept = [p.grad for p in params]
            with torch.no_grad():
                for p, g in zip(params, ops.threshold_multipliers(weights, **grids), strict=True):
                    scaled = p.grad.clone()
                    local(scaled).mul_(g)
                    p.grad = scaled
            try:
                yield
            finally:
                for p, grad in zip(params, kept, strict=True):
                    p.grad = grad
        else:
            before = [w.clone() for w in weights]
            yield
            ops.scale_updates_(weights, before, **grids)

    def _grids(self, params: list[Tensor], quantizers: list[Quantizer]) -> dict[str, Any]:
        return {
            "scales": local_scales(quantizers),
            "bit_widths": [local_scale(q.bit_width) for q in quantizers],
            "extra_bits": [local_extra(p, q) for p, q in zip(params, quantizers, strict=True)],
            "narrow_range": [q.narrow_range for q in quantizers],
        }


def named_layers(model: nn.Module) -> dict[str, Any]:
    """The prepared layers of a model by their names without those of wrappers (DistributedDataParallel, compiled)."""
    inner = unwrapped(model)
    while (unwound := unwrapped(getattr(inner, "_orig_mod", inner))) is not inner:
        inner = unwound
    found = quantized_layers(inner)
    return {".".join(part for part in name.split(".") if part != "_orig_mod"): m for name, m in found.items()}


def check_grid(name: str, quantizer: Any) -> None:
    """Refuses a layer whose weights have no grid yet.

    Raises:
        MixbitError: It is not calibrated, or its bits are still being searched; names the layer.
    """
    if quantizer.searching:
        raise MixbitError(
            f"layer {name!r}: its bits are still being searched; call mixbit.prepare_(model, "
            "mixbit.search.extract(model)) first"
        )
    try:
        quantizer.check_calibrated()
    except MixbitError as error:
        raise MixbitError(f"layer {name!r}: {error}") from error


def quantized_weights(model: nn.Module) -> dict[str, Any]:
    """The prepared layers of a model with a quantized weight, by their names in the model that was wrapped, if it was.

    Raises:
        MixbitError: There are none; one is not calibrated, or its bits are still being searched.
    """
    layers = {n: m for n, m in named_layers(model).items() if m.weight_quantizer is not None}
    if not layers:
        raise MixbitError("model has no quantized weights; call mixbit.prepare_(model, recipe) first")
    for name, layer in layers.items():
        check_grid(name, layer.weight_quantizer)
    return dict(layers)


def fuses(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the steps of an optimizer are known to the ops: SGD, Adam or AdamW, no subclass, not differentiable."""
    known = type(optimizer) in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
    return known and not any(group.get("differentiable") for group in optimizer.param_groups)
