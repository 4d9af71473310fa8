"""The registry: who takes part in which case, and how each is called.

A contender gives, for a case and its inputs, a `Run`: a function to time, and one that returns its results for the
comparison with the reference. Peers come from the extra `peers`; one that is not installed, or cannot do a case, says
so and is left out.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mixbit import ops
from mixbit.bench.cases import NOISE_BITS, SEARCH_BITS, Case, Inputs, resnet18_weights
from mixbit.ops import _reference


class Unavailable(Exception):
    """A contender cannot take part; the text says why."""


class NoSuchCase(Exception):
    """A contender has nothing to do with a case."""


@dataclass(frozen=True)
class Run:
    """A contender on given inputs.

    Attributes:
        call: What is timed.
        results: Values to compare with the reference: y, and where the case has a backward dx and the gradients of
            what is learned (dscale, dgates, dscales, dweights); None for a limit, which computes something else.
    """

    call: Callable[[], Any]
    results: Callable[[], dict[str, Tensor]] | None = None


@dataclass(frozen=True)
class Contender:
    """A name, a line about it, what it needs, and how it runs.

    Attributes:
        name: Key of the registry.
        about: One line.
        module: A package that must be importable, None for none.
        compiled: Whether it goes through torch.compile.
        make: (case, inputs) -> Run; raises NoSuchCase for cases that are not its own.
    """

    name: str
    about: str
    make: Callable[[Case, Inputs], Run]
    module: str | None = None
    compiled: bool = False

    def prepare(self, case: Case, inputs: Inputs) -> Run:
        """The run, tried once.

        Raises:
            NoSuchCase: The case is not its own.
            Unavailable: It is not installed, or fails on the inputs.
        """
        if self.module is not None:
            try:
                importlib.import_module(self.module)
            except ImportError as error:
                raise Unavailable(f"{self.module} is not installed (pip install 'mixbit[peers]')") from error
            except Exception as error:
                raise Unavailable(f"{self.module} cannot be imported: {_first_line(error)}") from error
        try:
            run = self.make(case, inputs)
            run.call()
        except (NoSuchCase, Unavailable):
            raise
        except Exception as error:
            raise Unavailable(f"fails: {_first_line(error)}") from error
        return run


CONTENDERS: dict[str, Contender] = {}


def _contender(name: str, about: str, **options: Any) -> Callable[[Callable[[Case, Inputs], Run]], Any]:
    def register(make: Callable[[Case, Inputs], Run]) -> Callable[[Case, Inputs], Run]:
        CONTENDERS[name] = Contender(name, about, make, **options)
        return make

    return register


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160] if text else ''}"


def quantizer_run(case: Case, inputs: Inputs, function: Callable[[Tensor], Tensor], leaves: list[Tensor]) -> Run:
    """A Run of a function x -> y; `leaves` are its learned parameters, the first of them its scale if it has one."""
    if case.name == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return function(inputs.x)

        return Run(forward, lambda: {"y": _plain(forward())})
    if case.name not in ("training", "fixed"):
        raise NoSuchCase
    names = ["scale" if leaf.numel() == inputs.scale.numel() else "other" for leaf in leaves[:1]]
    return training_run(inputs, function, dict(zip([*names, "zero_point"], leaves, strict=False)))


def training_run(inputs: Inputs, function: Callable[[Tensor], Tensor], leaves: dict[str, Tensor]) -> Run:
    """A Run of forward and backward of a function x -> y with learned parameters; its results are y, dx, d<name>."""

    def step() -> Tensor:
        for leaf in (inputs.x, *leaves.values()):
            leaf.grad = None
        y = function(inputs.x)
        y.backward(inputs.gradient)
        return y

    def results() -> dict[str, Tensor]:
        y = step()
        found = {"y": _plain(y), "dx": inputs.x.grad}
        found |= {f"d{name}": None if leaf.grad is None else leaf.grad.reshape(-1) for name, leaf in leaves.items()}
        return {k: v.detach().clone() for k, v in found.items() if v is not None}

    return Run(step, results)


def _plain(y: Tensor) -> Tensor:
    """A result without the subclass that some libraries return."""
    return y.detach().as_subclass(Tensor)


def _learns(case: Case) -> bool:
    return case.name == "training"


# Limits ---------------------------------------------------------------------------------------------------------------


@_contender("copy", "out.copy_(x): the bytes of a forward")
def _(case: Case, inputs: Inputs) -> Run:
    if case.name == "weights":
        sources = [torch.randn(shape) for shape in resnet18_weights()]
        targets = [torch.empty_like(s) for s in sources]

        def copies() -> None:
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source)

        return Run(copies)
    if case.name != "forward":
        raise NoSuchCase
    x, out = inputs.x.detach(), torch.empty_like(inputs.x)
    return Run(lambda: out.copy_(x))


@_contender("copy+mul", "out.copy_(x), torch.mul(x, g, out=out): the bytes of forward and backward")
def _(case: Case, inputs: Inputs) -> Run:
    if not case.gradient:
        raise NoSuchCase
    x, out = inputs.x.detach(), torch.empty_like(inputs.x)

    def both() -> None:
        out.copy_(x)
        torch.mul(x, inputs.gradient, out=out)

    return Run(both)


@_contender("x.sum()", "one read")
def _(case: Case, inputs: Inputs) -> Run:
    if case.name != "noise":
        raise NoSuchCase
    return Run(lambda: inputs.x.sum())


# Ours and PyTorch's ---------------------------------------------------------------------------------------------------


@_contender("mixbit", "mixbit.ops")
def _(case: Case, inputs: Inputs) -> Run:
    zero, bits = torch.zeros(1), torch.tensor([float(inputs.bits)])
    if case.name == "noise":
        widths, scales = noise_grids(inputs)
        return Run(
            lambda: ops.quantization_noise(inputs.x, scales, widths, signed=True, narrow_range=True, axis=inputs.axis),
            lambda: {
                "noise": ops.quantization_noise(
                    inputs.x, scales, widths, signed=True, narrow_range=True, axis=inputs.axis
                )[1]
            },
        )
    if case.name == "weights":
        lists = weight_lists(inputs)
        return Run(
            lambda: ops.fake_quantize_foreach(*lists, axis=0),
            lambda: {"y": torch.cat([y.flatten() for y in ops.fake_quantize_foreach(*lists, axis=0)])},
        )
    if case.name == "gated":
        gates, limit = search_gates().requires_grad_(), search_range(inputs)
        options: dict[str, Any] = {"signed": True, "axis": inputs.axis}
        return training_run(
            inputs, lambda x: ops.gated_fake_quantize(x, limit, gates, SEARCH_BITS, **options), {"gates": gates}
        )
    if case.name == "mixture":
        scales, weights = search_scales(inputs).requires_grad_(), search_weights().requires_grad_()
        widths = torch.tensor([float(b) for b in SEARCH_BITS])
        return training_run(
            inputs,
            lambda x: ops.mixture_fake_quantize(x, scales, weights, widths, signed=True, axis=inputs.axis),
            {"scales": scales, "weights": weights},
        )
    scale = inputs.scale.clone().requires_grad_(_learns(case))
    return quantizer_run(
        case, inputs, lambda x: ops.fake_quantize(x, scale, zero, bits, axis=inputs.axis), [scale] * _learns(case)
    )


@_contender("mixbit loop", "mixbit.ops.fake_quantize, tensor by tensor")
def _(case: Case, inputs: Inputs) -> Run:
    if case.name != "weights":
        raise NoSuchCase
    lists = weight_lists(inputs)

    def loop() -> list[Tensor]:
        return [ops.fake_quantize(*one, axis=0) for one in zip(*lists, strict=True)]

    return Run(loop, lambda: {"y": torch.cat([y.flatten() for y in loop()])})


@_contender("aten", "torch.fake_quantize_*, torch._fake_quantize_learnable_*")
def _(case: Case, inputs: Inputs) -> Run:
    low, high, axis = inputs.low, inputs.high, inputs.axis
    scale = inputs.scale.clone().requires_grad_(_learns(case))
    if _learns(case):
        zeros = torch.zeros_like(inputs.scale).requires_grad_()
        per_tensor = torch._fake_quantize_learnable_per_tensor_affine
        per_channel = torch._fake_quantize_learnable_per_channel_affine
        function = (
            (lambda x: per_tensor(x, scale, zeros, low, high))
            if axis is None
            else (lambda x: per_channel(x, scale, zeros, axis, low, high))
        )
        return quantizer_run(case, inputs, function, [scale, zeros])
    whole = torch.zeros(inputs.scale.numel(), dtype=torch.int32)
    if axis is None:
        return quantizer_run(
            case, inputs, lambda x: torch.fake_quantize_per_tensor_affine(x, scale[0], whole[0], low, high), []
        )
    return quantizer_run(
        case, inputs, lambda x: torch.fake_quantize_per_channel_affine(x, scale, whole, axis, low, high), []
    )


class LearnedStep(torch.autograd.Function):
    """A learned-step quantizer written by hand in PyTorch: what torch.compile gets to fuse."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
        """Rounds to the grid and back."""
        ctx.save_for_backward(x, scale)
        ctx.range = (low, high)
        return (torch.clamp(torch.round(x / scale), low, high) * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        """The gradients of LSQ, sums in float32."""
        (grad,) = grads
        x, scale = ctx.saved_tensors
        low, high = ctx.range
        v = x / scale
        q = torch.clamp(torch.round(v), low, high)
        inside = (v >= low) & (v <= high)
        # dx before the sum: in the other order Inductor needs half as much time again.
        dx = torch.where(inside, grad, 0)
        dscale = None
        if ctx.needs_input_grad[1]:
            dims = [d for d in range(x.dim()) if d >= scale.dim() or scale.shape[d] == 1]
            dscale = (grad * torch.where(inside, q - v, q)).sum(dims, keepdim=True).view(scale.shape)
        return dx, dscale, None, None


def _straight_through(x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """The same without a Function: rounding passes gradients by a detour through detach."""
    v = torch.clamp(x / scale, low, high)
    return ((v + (torch.round(v) - v).detach()) * scale).to(x.dtype)


class GridMixture(torch.autograd.Function):
    """A weighted sum of grids written by hand in PyTorch, for gates (`widest`) and for mixtures."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scales: Tensor, weights: Tensor, widest: bool) -> Tensor:
        """Rounds to every grid and adds."""
        ctx.save_for_backward(x, scales, weights)
        ctx.widest = widest
        y = torch.zeros_like(x)
        for s, w, b in zip(scales, weights, SEARCH_BITS, strict=True):
            y = y + w * (torch.clamp(torch.round(x / s), -(2 ** (b - 1)), 2 ** (b - 1) - 1) * s)
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        """With `widest` dx = g inside the last grid, else g times the weights of the grids around x."""
        (grad,) = grads
        x, scales, weights = ctx.saved_tensors
        dims = [d for d in range(x.dim()) if d >= scales.dim() - 1 or scales.shape[d + 1] == 1]
        dx, dscales, dweights = torch.zeros_like(grad), [], []
        for s, w, b in zip(scales, weights, SEARCH_BITS, strict=True):
            low, high = -(2 ** (b - 1)), 2 ** (b - 1) - 1
            v = x / s
            q = torch.clamp(torch.round(v), low, high)
            inside = (v >= low) & (v <= high)
            if not ctx.widest:
                dx = dx + torch.where(inside, w * grad, 0)
            elif b == SEARCH_BITS[-1]:
                dx = torch.where(inside, grad, 0)
            dweights.append((grad * (q * s)).sum())
            if ctx.needs_input_grad[1]:
                dscales.append(w * (grad * torch.where(inside, q - v, q)).sum(dims, keepdim=True).view(s.shape))
        return dx, torch.stack(dscales) if dscales else None, torch.stack(dweights), None


def _grids_straight_through(x: Tensor, scales: Tensor, weights: Tensor, widest: bool) -> Tensor:
    """The same without a Function."""
    y = torch.zeros_like(x)
    for s, w, b in zip(scales, weights, SEARCH_BITS, strict=True):
        low, high = -(2 ** (b - 1)), 2 ** (b - 1) - 1
        v = torch.clamp((x.detach() if widest else x) / s, low, high)
        y = y + w * ((v + (torch.round(v) - v).detach()) * s)
    if widest:
        inside = torch.clamp(x, low * scales[-1], high * scales[-1])
        y = y + (inside - inside.detach())
    return y.to(x.dtype)


def _written_search(case: Case, inputs: Inputs, formula: Callable[..., Tensor], compiled: bool) -> Run:
    gated = case.name == "gated"
    scales = search_scales(inputs)
    if inputs.axis is not None:
        scales = scales.reshape(*scales.shape, *[1] * (inputs.x.dim() - 1))
    learned = (search_gates() if gated else search_weights()).requires_grad_()
    scales.requires_grad_(not gated)

    def function(x: Tensor) -> Tensor:
        return formula(x, scales, _reference.shares(learned) if gated else learned, gated)

    leaves = {"gates": learned} if gated else {"scales": scales, "weights": learned}
    return training_run(inputs, torch.compile(function, dynamic=False) if compiled else function, leaves)


def _written(case: Case, inputs: Inputs, formula: Callable[..., Tensor], compiled: bool) -> Run:
    if case.name in ("gated", "mixture"):
        grids = _grids_straight_through if formula is _straight_through else GridMixture.apply
        return _written_search(case, inputs, grids, compiled)
    if case.name == "weights":
        xs, scales, _, _ = weight_lists(inputs)
        broadcast = [s.reshape(-1, *[1] * (x.dim() - 1)) for x, s in zip(xs, scales, strict=True)]

        def every() -> list[Tensor]:
            return [formula(x, s, inputs.low, inputs.high) for x, s in zip(xs, broadcast, strict=True)]

        call = torch.compile(every, dynamic=False) if compiled else every
        return Run(call, lambda: {"y": torch.cat([y.flatten() for y in call()])})
    if case.name == "noise":
        return _noise_loop(inputs, compiled)
    scale = inputs.broadcast_scale().clone().requires_grad_(_learns(case))
    low, high = inputs.low, inputs.high

    def function(x: Tensor) -> Tensor:
        return formula(x, scale, low, high)

    return quantizer_run(
        case, inputs, torch.compile(function, dynamic=False) if compiled else function, [scale] * _learns(case)
    )


def _noise_loop(inputs: Inputs, compiled: bool) -> Run:
    _, scales = noise_grids(inputs)
    x = inputs.x

    def loop(x: Tensor) -> Tensor:
        found = []
        for b, scale in zip(NOISE_BITS, scales, strict=True):
            s = scale if inputs.axis is None else scale.reshape(-1, *[1] * (x.dim() - 1))
            y = torch.clamp(torch.round(x / s), 1 - 2 ** (b - 1), 2 ** (b - 1) - 1) * s
            dims = [d for d in range(x.dim()) if d != inputs.axis]
            found.append((x - y).float().square().sum(dims))
        return torch.stack(found)

    call = torch.compile(loop, dynamic=False) if compiled else loop
    return Run(lambda: call(x), lambda: {"noise": call(x).double()})


@_contender("eager", "the formula in eager PyTorch, straight through")
def _(case: Case, inputs: Inputs) -> Run:
    return _written(case, inputs, _straight_through, compiled=False)


@_contender("function", "a hand-written autograd.Function in eager PyTorch")
def _(case: Case, inputs: Inputs) -> Run:
    if not case.gradient:
        raise NoSuchCase
    return _written(case, inputs, LearnedStep.apply, compiled=False)


@_contender("compiled eager", "torch.compile of 'eager'", compiled=True)
def _(case: Case, inputs: Inputs) -> Run:
    return _written(case, inputs, _straight_through, compiled=True)


@_contender("compiled function", "torch.compile of 'function'", compiled=True)
def _(case: Case, inputs: Inputs) -> Run:
    if not case.gradient:
        raise NoSuchCase
    return _written(case, inputs, LearnedStep.apply, compiled=True)


# Peers ----------------------------------------------------------------------------------------------------------------


@_contender("brevitas", "brevitas.core.quant.IntQuant", module="brevitas")
def _(case: Case, inputs: Inputs) -> Run:
    from brevitas.core.function_wrapper import Identity
    from brevitas.core.quant import IntQuant

    scale = inputs.broadcast_scale().clone().requires_grad_(_learns(case))
    zero, bits = torch.zeros(1), torch.tensor(float(inputs.bits))
    quantizer = IntQuant(narrow_range=False, signed=True, input_view_impl=Identity())
    return quantizer_run(case, inputs, lambda x: quantizer(scale, zero, bits, x), [scale] * _learns(case))


@_contender("torchao", "torchao.quantization.quant_primitives._fake_quantize_affine", module="torchao")
def _(case: Case, inputs: Inputs) -> Run:
    from torchao.quantization.quant_primitives import _fake_quantize_affine

    scale = inputs.scale.clone().requires_grad_(_learns(case))
    zeros = torch.zeros_like(inputs.scale)
    shape = tuple(inputs.x.shape)
    block = shape if inputs.axis is None else (1, *shape[1:])
    return quantizer_run(
        case,
        inputs,
        lambda x: _fake_quantize_affine(x, block, scale, zeros, torch.int8, inputs.low, inputs.high),
        [scale] * _learns(case),
    )


@_contender("nncf", "nncf.torch symmetric_quantize (compiled extension)", module="nncf")
def _(case: Case, inputs: Inputs) -> Run:
    from nncf.torch.quantization.quantize_functions import symmetric_quantize

    # Its scale is the upper end of the range.
    end = (inputs.broadcast_scale() * inputs.high).clone().requires_grad_(_learns(case))
    levels = 2**inputs.bits
    run = quantizer_run(
        case, inputs, lambda x: symmetric_quantize(x, levels, inputs.low, inputs.high, end, 0.0), [end] * _learns(case)
    )
    return Run(run.call, _without_scale(run))


@_contender("aimet", "aimet_torch QuantizeDequantize", module="aimet_torch")
def _(case: Case, inputs: Inputs) -> Run:
    import aimet_torch.quantization as quantization

    shape = () if inputs.axis is None else tuple(inputs.broadcast_scale().shape)
    quantizer = quantization.affine.QuantizeDequantize(shape=shape, bitwidth=inputs.bits, symmetric=True)
    scale = inputs.broadcast_scale().reshape(shape)
    quantizer.set_range(scale * inputs.low, scale * inputs.high)
    quantizer.requires_grad_(_learns(case))
    run = quantizer_run(case, inputs, quantizer, list(quantizer.parameters()) * _learns(case))
    return Run(run.call, _without_scale(run))


def _without_scale(run: Run) -> Callable[[], dict[str, Tensor]]:
    """Results of a contender that learns something else than a scale."""
    assert run.results is not None
    results = run.results
    return lambda: {k: v for k, v in results().items() if k != "dscale"}


# Inputs of the cases that are not one tensor --------------------------------------------------------------------------


def noise_grids(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Widths [K] and scales [K] or [K, C] of the noise case."""
    widths = torch.tensor([float(b) for b in NOISE_BITS])
    scales = 3.0 / (2.0 ** (widths - 1) - 1)
    if inputs.axis is not None:
        scales = scales[:, None].expand(-1, inputs.x.shape[inputs.axis]).contiguous()
    return widths, scales


def search_range(inputs: Inputs) -> Tensor:
    """Range of the grids of the search cases, [1] or [C]: the clipping of the other cases."""
    return inputs.scale * 2 ** (inputs.bits - 1)


def search_scales(inputs: Inputs) -> Tensor:
    """Steps of the grids over that range, [K] or [K, C]."""
    scales = torch.stack([search_range(inputs) / 2 ** (b - 1) for b in SEARCH_BITS])
    return scales.reshape(-1) if inputs.axis is None else scales


def search_gates() -> Tensor:
    """Gates [K - 1] between shut and open, the most work."""
    return torch.tensor([0.7, 0.4])


def search_weights() -> Tensor:
    """Weights [K] of a mixture."""
    return torch.tensor([0.2, 0.5, 0.3])


def weight_lists(inputs: Inputs) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Weights, scales, zero points and widths of the list case."""
    generator = torch.Generator().manual_seed(1)
    xs = [torch.randn(shape, generator=generator) for shape in resnet18_weights()]
    scales = [torch.full((x.shape[0],), float(inputs.scale[0])) for x in xs]
    return xs, scales, [torch.zeros(1) for _ in xs], [torch.tensor([float(inputs.bits)]) for _ in xs]
