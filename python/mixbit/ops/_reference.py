"""Slow, readable twins of the ops in plain PyTorch: what the tests hold the kernels against."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def quant_range(bit_width: Tensor, signed: bool, narrow_range: bool) -> tuple[Tensor, Tensor]:
    """Smallest and largest code per element of `bit_width`."""
    if signed:
        half = 2.0 ** (bit_width - 1)
        return -half + (1 if narrow_range else 0), half - 1
    return torch.zeros_like(bit_width), 2.0**bit_width - 1


def along(parameter: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """A [1] or [channels] parameter, shaped to broadcast against x along `axis`."""
    if axis is None or parameter.numel() == 1:
        return parameter.reshape([1] * x.dim()) if x.dim() else parameter.reshape([])
    shape = [1] * x.dim()
    shape[axis] = -1
    return parameter.reshape(shape)


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bit_width: Tensor,
    *,
    signed: bool = True,
    narrow_range: bool = False,
    axis: int | None = None,
    rounding: str = "half_even",
    gradient: str = "learned_step",
) -> Tensor:
    """Twin of `mixbit.ops.fake_quantize`, forward and (through autograd) gradients."""
    low, high = (along(r, x, axis) for r in quant_range(bit_width, signed, narrow_range))
    s = along(scale, x, axis)
    z_raw = along(zero_point, x, axis)
    z = z_raw + (torch.round(z_raw) - z_raw).detach()
    wide = x.float()
    x_over_scale = wide / s
    code = torch.round(x_over_scale) if rounding == "half_even" else torch.floor(x_over_scale + 0.5)
    code = torch.minimum(torch.maximum(code.detach() + z.detach(), low), high)
    # Spelled-out gradients: inside dx = g, dscale = g (q - v), dzero = 0; outside dscale = g (q - z), dzero = -g s.
    v = x_over_scale + z
    inside = (v.detach() >= low) & (v.detach() <= high)
    within = code - v.detach()
    if gradient == "clip":
        # Between the values of the ends, of which the upper one is outside; no rounding term.
        lower, upper = ((end - z.detach()) * s.detach() for end in (low, high))
        inside = (wide.detach() >= lower) & (wide.detach() < upper)
        within = torch.zeros_like(within)
    y = (code - z.detach()) * s.detach()
    to_x = torch.where(inside, wide, wide.detach())
    to_scale = s * torch.where(inside, within, code - z.detach()).detach()
    to_zero = torch.where(inside, torch.zeros_like(y), -z * s.detach())
    ghost = (to_x - to_x.detach()) + (to_scale - to_scale.detach()) + (to_zero - to_zero.detach())
    # Infinite x makes inf - inf in the ghost; it carries no value, only gradient.
    return (y + torch.nan_to_num(ghost, nan=0.0, posinf=0.0, neginf=0.0)).to(x.dtype)


def extra_level_fake_quantize(
    x: Tensor,
    scale: Tensor,
    bit_width: Tensor,
    extra_bits: Tensor,
    *,
    axis: int | None = None,
    narrow_range: bool = False,
    rounding: str = "half_up",
) -> Tensor:
    """Twin of `mixbit.ops.extra_level_fake_quantize`: each element takes what its own grid gives."""
    y = torch.zeros_like(x)
    for e in range(3):
        local = fake_quantize(
            x,
            scale / 2**e,
            torch.zeros(1),
            bit_width + e,
            narrow_range=narrow_range,
            axis=axis,
            rounding=rounding,
        )
        y = torch.where(extra_bits == e, local, y)
    return y


def quantized_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x_scale: Tensor,
    x_zero_point: Tensor,
    x_bits: Tensor,
    w_scale: Tensor,
    w_bits: Tensor,
    *,
    signed_x: bool,
    w_narrow_range: bool = True,
    rounding: str = "half_even",
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    x_gradient: str = "learned_step",
    w_gradient: str = "learned_step",
) -> Tensor:
    """Twin of `mixbit.ops.quantized_conv2d`."""
    xq = fake_quantize(x, x_scale, x_zero_point, x_bits, signed=signed_x, rounding=rounding, gradient=x_gradient)
    wq = _quantized_weight(weight, w_scale, w_bits, w_narrow_range, rounding, w_gradient)
    return F.conv2d(xq, wq, bias, stride, padding, dilation, groups)


def quantized_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x_scale: Tensor,
    x_zero_point: Tensor,
    x_bits: Tensor,
    w_scale: Tensor,
    w_bits: Tensor,
    *,
    signed_x: bool,
    w_narrow_range: bool = True,
    rounding: str = "half_even",
    x_gradient: str = "learned_step",
    w_gradient: str = "learned_step",
) -> Tensor:
    """Twin of `mixbit.ops.quantized_linear`."""
    xq = fake_quantize(x, x_scale, x_zero_point, x_bits, signed=signed_x, rounding=rounding, gradient=x_gradient)
    wq = _quantized_weight(weight, w_scale, w_bits, w_narrow_range, rounding, w_gradient)
    return F.linear(xq, wq, bias)


def _quantized_weight(
    weight: Tensor, scale: Tensor, bits: Tensor, narrow_range: bool, rounding: str, gradient: str
) -> Tensor:
    axis = 0 if scale.numel() > 1 or bits.numel() > 1 else None
    zero = torch.zeros(1)
    return fake_quantize(
        weight, scale, zero, bits, narrow_range=narrow_range, axis=axis, rounding=rounding, gradient=gradient
    )


def quantization_noise(
    x: Tensor, scales: Tensor, bit_widths: Tensor, *, signed: bool, narrow_range: bool, axis: int | None = None
) -> tuple[Tensor, Tensor]:
    """Twin of `mixbit.ops.quantization_noise`, in double."""
    keep = [] if axis is None else [axis % x.dim()]
    dims = [d for d in range(x.dim()) if d not in keep]

    def total(t: Tensor) -> Tensor:
        return t.double().sum(dims) if dims else t.double()

    noise = []
    for scale, bits in zip(scales, bit_widths, strict=True):
        y = fake_quantize(
            x.float(),
            scale.reshape(-1),
            torch.zeros(1),
            bits.reshape(1),
            signed=signed,
            narrow_range=narrow_range,
            axis=axis,
        )
        noise.append(total((x.double() - y.double()) ** 2))
    return total(x.double() ** 2), torch.stack(noise)


def noise_power(x: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Twin of `mixbit.ops.noise_power`."""
    return (reference.double() ** 2).sum(), ((x.double() - reference.double()) ** 2).sum()


def mse_scales(x: Tensor, bit_width: int, *, signed: bool, narrow_range: bool) -> tuple[float, float]:
    """(scale, squared error) of the best candidate of a whole tensor, by trying all 81."""
    low, high = (float(r) for r in quant_range(torch.tensor([float(bit_width)]), signed, narrow_range))
    wide = x.double()
    largest = float(wide.abs().max() if signed else wide.max())
    best = (float("nan"), float("inf"))
    for k in range(100, 19, -1):
        scale = k / 100 * largest / high
        error = float(((wide - (wide / scale).round().clamp(low, high) * scale) ** 2).sum())
        if error < best[1]:
            best = (scale, error)
    return best


def optimize_rounding(
    weight: Tensor,
    moments: Tensor,
    scale: Tensor,
    bit_width: Tensor,
    *,
    narrow_range: bool = True,
    damping: float = 0.01,
    sweeps: int = 20,
) -> Tensor:
    """Twin of `mixbit.ops.optimize_rounding`: every move is judged by the objective itself."""
    rows, inputs = weight.shape
    result = torch.empty_like(weight)
    for row in range(rows):
        m = moments[row * moments.shape[0] // rows].double()
        m = m + torch.eye(inputs, dtype=torch.float64) * damping * m.diagonal().mean()
        s = scale[row if scale.numel() > 1 else 0].double()
        b = bit_width[row if bit_width.numel() > 1 else 0].reshape(1)
        low, high = (float(r) for r in quant_range(b, True, narrow_range))
        w = weight[row].double()
        v = (weight[row] / s.float()).double()
        codes = v.round().clamp(low, high)

        def loss(q: Tensor, w: Tensor = w, s: Tensor = s, m: Tensor = m) -> float:
            e = q * s - w
            return float(e @ m @ e)

        for _ in range(sweeps):
            before = codes.clone()
            for i in range(inputs):
                below, above = (float(t[i].clamp(low, high)) for t in (v.floor(), v.ceil()))
                other = codes.clone()
                other[i] = above if float(codes[i]) == below else below
                if loss(other) < loss(codes) * (1 - 1e-12):
                    codes = other
            if torch.equal(codes, before):
                break
        result[row] = codes.float() * s.float()
    return result


def sample_gates(gate_logits: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """Twin of `mixbit.ops.sample_gates`."""
    logits = gate_logits if noise.dim() == 1 else gate_logits.unsqueeze(1)
    s = torch.sigmoid((torch.log(noise) - torch.log1p(-noise) + logits) / temperature)
    stretched = s * 1.2 - 0.1
    # A clamp of torch passes the gradient on at its ends; the derivative of a gate that is shut or open is 0.
    moving = (stretched > 0) & (stretched < 1)
    return torch.where(moving, stretched, stretched.detach().clamp(0, 1))


def gated_steps(scale_range: Tensor, precisions: Sequence[int], signed: bool) -> list[Tensor]:
    """Step of the grid at each precision: range / (2^b - 1), or 2 range / 2^b in two's complement."""
    return [scale_range / float(2 ** (b - 1) if signed else 2**b - 1) for b in precisions]


def shares(gates: Tensor) -> Tensor:
    """What each precision contributes: z_1...z_k (1 - z_(k+1)); [K - 1, ...] -> [K, ...].

    `Q_0 + sum_j z_1...z_j (Q_j - Q_(j-1))` with its terms ordered by Q: gates of 0 and 1 then give one Q exactly.
    """
    open_up_to = [torch.ones_like(gates[0])]
    for gate in gates:  # not torch.cumprod, which multiplies in double
        open_up_to.append(open_up_to[-1] * gate)
    return torch.stack([a - b for a, b in itertools.pairwise(open_up_to)] + open_up_to[-1:])


def gated_fake_quantize(
    x: Tensor,
    scale_range: Tensor,
    gates: Tensor,
    precisions: Sequence[int],
    *,
    signed: bool,
    axis: int | None = None,
    form: str = "difference",
) -> Tensor:
    """Twin of `mixbit.ops.gated_fake_quantize`, forward and (through autograd) gradients."""
    wide = x.float()
    steps = [along(s.detach(), x, axis) for s in gated_steps(scale_range, precisions, signed)]
    levels = []
    code = value = torch.zeros(1)
    for k, (step, bits) in enumerate(zip(steps, precisions, strict=True)):
        low, high = quant_range(torch.tensor([float(bits)]), signed, False)
        v = wide.detach() / step
        if form == "difference" or k == 0:
            code = torch.round(v)
        else:
            # Each level of the grid before is a level here, `ratio` codes from the next one.
            before = precisions[k - 1]
            ratio = 2.0 ** (bits - before) if signed else (2.0**bits - 1) / (2.0**before - 1)
            code = code * ratio + torch.round((wide.detach() - value) / step)
        code = torch.minimum(torch.maximum(code, low), high)
        value = code * step
        levels.append(value)
    inside = (v >= low) & (v <= high)
    to_x = torch.where(inside, wide, wide.detach())
    ghost = to_x - to_x.detach()
    if form == "residual":
        step = along(gated_steps(scale_range, precisions, signed)[-1], x, axis)
        to_scale = step * torch.where(inside, code - v, code).detach()
        ghost = ghost + (to_scale - to_scale.detach())
    weights = shares(gates)
    if weights.dim() == 2:
        weights = weights.reshape([len(precisions), -1] + [1] * (x.dim() - 1))
    y = weights[0] * levels[0]
    for weight, level in zip(weights[1:], levels[1:], strict=True):
        y = y + weight * level
    # Infinite x makes inf - inf in the ghost; it carries no value, only gradient.
    return (y + torch.nan_to_num(ghost, nan=0.0, posinf=0.0, neginf=0.0)).to(x.dtype)


def mixture_fake_quantize(
    x: Tensor, scales: Tensor, weights: Tensor, bit_widths: Tensor, *, signed: bool, axis: int | None = None
) -> Tensor:
    """Twin of `mixbit.ops.mixture_fake_quantize`, forward and (through autograd) gradients."""
    y = None
    for scale, weight, bits in zip(scales, weights, bit_widths, strict=True):
        level = fake_quantize(x.float(), scale.reshape(-1), torch.zeros(1), bits.reshape(1), signed=signed, axis=axis)
        y = weight * level if y is None else y + weight * level
    assert y is not None
    return y.to(x.dtype)


def expected_cost(
    act_logits: Tensor, weight_logits: Tensor, values: Tensor, form: str, temperature: float = 0.5
) -> Tensor:
    """Twin of `mixbit.ops.expected_cost`, in double."""
    shift = temperature * math.log(11.0)  # -T ln(-lo / hi) of the stretch -0.1 ... 1.1

    def opened(logits: Tensor) -> Tensor:
        """C_0 = 1, C_j: the probability that the first j gates are open, [L, K]."""
        c = torch.cumprod(torch.sigmoid(logits.double() + shift), 1)
        return torch.cat([torch.ones_like(c[:, :1]), c], 1)

    act, weight, v = opened(act_logits), opened(weight_logits), values.double()
    if form == "expected":
        p_act, p_weight = (torch.cat([c[:, :-1] - c[:, 1:], c[:, -1:]], 1) for c in (act, weight))
        total = torch.einsum("la,lw,law->", p_act, p_weight, v)
    elif form == "separate":
        total = (act[:, 1:] * v[:, 1:, 0]).sum() + (weight[:, 1:] * v[:, 0, 1:]).sum()
    else:
        total = torch.einsum("la,lw,law->", act[:, 1:], weight[:, 1:], v[:, 1:, 1:])
    return total.to(act_logits.dtype)


def level_codes(
    weight: Tensor,
    scale: Tensor,
    bit_width: Tensor,
    extra_bits: Tensor | None = None,
    *,
    narrow_range: bool = False,
    axis: int | None = None,
    rounding: str = "half_up",
) -> Tensor:
    """Codes of weights on the grids of bit_width + extra_bits bits at the step scale / 2^extra_bits; float32."""
    extra = torch.zeros_like(weight, dtype=torch.float32)
    if extra_bits is not None and extra_bits.numel():
        extra = extra_bits.float()
    low, high = quant_range(along(bit_width, weight, axis) + extra, True, narrow_range)
    v = weight.float() / (along(scale, weight, axis) / 2.0**extra)
    code = torch.round(v) if rounding == "half_even" else torch.floor(v + 0.5)
    return torch.minimum(torch.maximum(code, low), high)


def update_level_switches_(
    weight: Tensor,
    codes: Tensor,
    state: dict[str, Tensor],
    *,
    score: str,
    momentum: float = 0.01,
    **grid: Any,
) -> int:
    """Twin of `mixbit.ops.update_level_switches_` for one weight; `state` holds marks, counts and runs."""
    code = level_codes(weight, **grid)
    code = torch.where(code.isnan(), codes.float(), code).to(torch.int32)
    change = code - codes.int()
    if score == "ema":
        oscillates = change.sign() * state["marks"] == -1
        updated = torch.where(oscillates, momentum, 0.0) + (1 - torch.tensor(momentum)) * state["counts"]
        state["counts"].copy_(torch.where(updated >= 2.0**-100, updated, 0.0))
    for index in change.nonzero().tolist():
        at = tuple(index)
        d = int(change[at])
        if score in ("adj", "pair") and abs(d) == 1:
            if score == "pair":
                pair = min(int(code[at]), int(codes[at]))
                state["runs"][at] = min(int(state["runs"][at]) + 1, 32767) if pair == int(state["marks"][at]) else 1
                state["marks"][at] = pair
                state["counts"][at] = max(int(state["counts"][at]), int(state["runs"][at]))
            else:
                state["counts"][at] = min(int(state["counts"][at]) + 1, 32767)
        elif score in ("osc", "ema"):
            direction = 1 if d > 0 else -1
            if score == "osc" and direction * int(state["marks"][at]) == -1:
                state["counts"][at] = min(int(state["counts"][at]) + 1, 32767)
            state["marks"][at] = direction
    codes.copy_(code)
    return int((change != 0).sum())


def freeze_oscillating_(
    weight: Tensor,
    codes: Tensor,
    marks: Tensor,
    frequencies: Tensor,
    averages: Tensor,
    *,
    threshold: float,
    momentum: float = 0.01,
    scale: Tensor,
    extra_bits: Tensor | None = None,
    axis: int | None = None,
    **grid: Any,
) -> int:
    """Twin of `mixbit.ops.freeze_oscillating_` for one weight."""
    units = torch.full_like(averages, 4.0)
    if extra_bits is not None and extra_bits.numel():
        units = 4.0 / 2.0 ** extra_bits.float()
    m = torch.tensor(momentum)
    code = level_codes(weight, scale, extra_bits=extra_bits, axis=axis, **grid) * units
    code = torch.where(code.isnan(), codes.float(), code)
    direction = (code - codes.float()).sign()
    free = marks != 2
    oscillates = direction * marks == -1
    frequency = torch.where(oscillates, momentum, 0.0) + (1 - m) * frequencies
    frequency = torch.where(frequency >= 2.0**-100, frequency, 0.0)
    frozen = free & (frequency > torch.tensor(threshold)) if threshold > 0 else torch.zeros_like(free)
    stays = free & ~frozen
    held = torch.round(averages / units) * units  # the average before this step's code
    averages.copy_(torch.where(stays, m * code + (1 - m) * averages, averages))
    frequencies.copy_(torch.where(free, frequency, frequencies))
    codes.copy_(torch.where(frozen, held, torch.where(stays, code, codes.float())))
    marks.copy_(torch.where(frozen, 2, torch.where(stays & (direction != 0), direction, marks.float())))
    level = codes.float() * (along(scale, weight, axis) / 4)
    weight.copy_(torch.where(marks == 2, level, weight.float()))
    return int((marks == 2).sum())


def threshold_distance(
    weight: Tensor, scale: Tensor, bit_width: Tensor, extra_bits: Tensor | None, narrow_range: bool
) -> Tensor:
    """Distance of each weight from the nearest threshold (k + 1/2) step of its own grid, in steps, at most 1/2."""
    extra = torch.zeros_like(weight) if extra_bits is None else extra_bits.float()
    v = weight.float() / (along(scale, weight, 0) / 2.0**extra)
    low, high = quant_range(along(bit_width, weight, 0) + extra, True, narrow_range)
    nearest = torch.minimum(torch.maximum(v.floor() + 0.5, low + 0.5), high - 0.5)
    return (v - nearest).abs().nan_to_num(nan=0.5).clamp(max=0.5)


def step_multiplier(distance: Tensor, shape: str, alpha: float, rho: float) -> Tensor:
    """The multiplier of a step at a distance from a threshold; float32."""
    a, r = (torch.tensor(v, dtype=torch.float32) for v in (alpha, rho))
    if shape == "step":
        return torch.where(distance < r, a, torch.ones(()))
    if shape == "linear":
        return torch.where(distance < r, torch.addcmul(a, 1 - a, distance / r), torch.ones(()))
    if shape == "gauss":
        return 1 - (1 - a) * torch.exp(-((distance / r) ** 2))
    return torch.ones_like(distance)


def sgd_step(
    weight: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None,
    multiplier: Tensor,
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    first_step: bool = False,
    on_grad: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Twin of `mixbit.ops.threshold_aware_step_` for one weight: new weight and momentum, operations of torch's SGD."""
    w, g = weight.float(), grad.float()
    buffer = None if momentum_buffer is None else momentum_buffer.float()
    g = -g if maximize else g
    g = g * multiplier if on_grad else g
    g = g.add(w, alpha=weight_decay) if weight_decay else g
    update = g
    if momentum:
        assert buffer is not None
        buffer = g.clone() if first_step else (buffer * momentum).add(g, alpha=1 - dampening)
        update = g.add(buffer, alpha=momentum) if nesterov else buffer
    rate = torch.tensor(lr, dtype=torch.float32) * (torch.ones(()) if on_grad else multiplier)
    new = torch.addcmul(w, -rate.expand_as(w), update)
    return new.to(weight.dtype), None if buffer is None else buffer.to(weight.dtype)


def scaled_update(before: Tensor, after: Tensor, multiplier: Tensor) -> Tensor:
    """Twin of `mixbit.ops.scale_updates_` for one weight."""
    old, new = before.float(), after.float()
    return torch.where(multiplier == 1, new, torch.addcmul(old, multiplier, new - old)).to(before.dtype)


def adam_step(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    multiplier: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = True,
    maximize: bool = False,
    on_grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Twin of `mixbit.ops.threshold_aware_adam_step_` for one weight: new weight and moments, operations of torch's."""
    w, g, m, v = (t.float().clone() for t in (weight, grad, exp_avg, exp_avg_sq))
    g = -g if maximize else g
    g = g * multiplier if on_grad else g
    g = g.add(w, alpha=weight_decay) if weight_decay and not decoupled else g
    new = w * (1 - lr * weight_decay) if decoupled else w.clone()
    m.lerp_(g, 1 - betas[0])
    v.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
    largest = None if max_exp_avg_sq is None else torch.maximum(max_exp_avg_sq.float(), v)
    # torch's own square root in float32 is not always the nearest number; through double it is.
    root = (v if largest is None else largest).double().sqrt().float() / math.sqrt(1 - betas[1] ** step)
    new.addcdiv_(m, root + eps, value=-lr / (1 - betas[0] ** step))
    new = new if on_grad else scaled_update(w, new, multiplier)
    dtype = weight.dtype
    return new.to(dtype), m.to(dtype), v.to(dtype), None if largest is None else largest.to(dtype)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Twin of `mixbit.ops.pack_bits`, bit by bit."""
    n = codes.shape[-1]
    stream = torch.zeros(*codes.shape[:-1], (n * bits + 7) // 8 * 8, dtype=torch.int64)
    for bit in range(bits):
        stream[..., bit : n * bits : bits] = codes.long() >> bit & 1
    places = 2 ** torch.arange(8)
    return (stream.unflatten(-1, (stream.shape[-1] // 8, 8)) * places).sum(-1).to(torch.uint8)


def unpack_bits(packed: Tensor, bits: int, n: int, signed: bool) -> Tensor:
    """Twin of `mixbit.ops.unpack_bits`, bit by bit; int64."""
    stream = (packed.long()[..., None] >> torch.arange(8) & 1).flatten(-2)
    codes = torch.zeros(*packed.shape[:-1], n, dtype=torch.int64)
    for bit in range(bits):
        place = -(2**bit) if signed and bit == bits - 1 else 2**bit
        codes += stream[..., bit : n * bits : bits] * place
    return codes


def requantize(
    total: Tensor, multiplier: Tensor, zero_point: int, low: int, high: int, axis: int | None = None
) -> Tensor:
    """Twin of `mixbit.ops.requantize`: one product in float32, one rounding to even, one clamp."""
    if axis is not None and multiplier.numel() > 1:
        multiplier = multiplier.reshape([-1 if i == axis % total.dim() else 1 for i in range(total.dim())])
    steps = torch.round(total.to(torch.float32) * multiplier)
    codes = steps.double().clamp(low - zero_point, high - zero_point) + zero_point
    return codes.to(torch.int8 if low < 0 else torch.uint8)


def int_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    multiplier: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    x_zero_point: int,
    y_zero_point: int,
    y_low: int,
    y_high: int,
) -> Tensor:
    """Twin of `mixbit.ops.int_conv2d`: the sums in float64, which holds every integer of 32 bits."""
    total = torch.nn.functional.conv2d(
        x.double() - x_zero_point,
        weight.double(),
        None if bias is None else bias.double(),
        tuple(stride),
        tuple(padding),
        tuple(dilation),
        groups,
    )
    return requantize(total.to(torch.int32), multiplier, y_zero_point, y_low, y_high, 1)


def int_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    multiplier: Tensor,
    x_zero_point: int,
    y_zero_point: int,
    y_low: int,
    y_high: int,
) -> Tensor:
    """Twin of `mixbit.ops.int_linear`, in float64 as well."""
    total = (x.double() - x_zero_point) @ weight.double().T + (0 if bias is None else bias.double())
    return requantize(total.to(torch.int32), multiplier, y_zero_point, y_low, y_high, -1)
